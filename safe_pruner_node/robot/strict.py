"""YAML files read strictly: whatever is wrong becomes one line with file, key, found, expected.

pydantic does the checking (types, ranges, unknown keys, nested data classes); this module only
turns its first complaint into a `ConfigError` and refuses repeated keys, which PyYAML lets pass.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from safe_pruner_node.errors import ConfigError

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Configuration of every data class that is read from a file."""

T = TypeVar("T")

_UNKNOWN_KEY = "unexpected_keyword_argument"
_EXPECTED = {
    "missing": "a value, this key is required",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
    "dataclass_type": "a mapping of keys to values",
}
"""pydantic's error type to words for people who write YAML, where its own speak of Python."""
_LONGEST_VALUE = 80


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader for which every key is text and given once, as the YAML standard asks."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                problem = "a key that is not text" if key.tag != "tag:yaml.org,2002:str" else None
                if problem is None and key.value in seen:
                    problem = f"key {key.value!r} a second time"
                if problem is not None:
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path, schema: type[T]) -> T:
    """Reads a YAML file into a pydantic data class.

    Args:
        path: The file.
        schema: A ``pydantic.dataclasses.dataclass`` configured with `STRICT`.

    Raises:
        ConfigError: The file is missing, is not YAML, or does not fit the schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(path, "", reason, "a readable YAML file") from None
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - derived from SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(
            path, line, error.problem, "valid YAML, every key text and given once"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(path, "", error, "valid YAML") from None
    if not isinstance(data, dict):
        raise ConfigError(path, "", shown(data), "a mapping of keys to values")
    try:
        # By way of JSON: there strict still reads a list as a tuple.
        as_json = json.dumps(data, default=str)
    except ValueError as error:
        raise ConfigError(path, "", error, "YAML without an alias to itself") from None
    try:
        return TypeAdapter(schema).validate_json(as_json, strict=True)
    except ValidationError as error:
        # A misspelt key is unknown and missing at once: the unknown one is what to mend.
        errors = sorted(error.errors(), key=lambda item: item["type"] != _UNKNOWN_KEY)
        raise _config_error(path, schema, errors[0]) from None


def shown(value: object) -> str:
    """A value as an error line quotes it, shortened."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """``"x"? known are ...``: the nearest of the known names first, then all of them."""
    names = list(known)
    nearest = difflib.get_close_matches(word, names, n=1)
    guess = f"{nearest[0]!r} perhaps; " if nearest else ""
    return f"{guess}one of {', '.join(names)}"


def matching(pattern: str, expected: str) -> AfterValidator:
    """A check of a text field; ``expected`` is what the error line says."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise PydanticCustomError("pattern", "{expected}", {"expected": expected})
        return text

    return AfterValidator(check)


def _config_error(path: Path, schema: type, error: ErrorDetails) -> ConfigError:
    location = tuple(step for step in error["loc"] if step != "[key]")
    key = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location)[1:]
    if error["type"] == _UNKNOWN_KEY:
        names = [field.name for field in dataclasses.fields(_type_at(schema, location[:-1]))]
        return ConfigError(path, key, "an unknown key", did_you_mean(str(location[-1]), names))
    found = "nothing" if error["type"] == "missing" else shown(error["input"])
    expected = _EXPECTED.get(error["type"], error["msg"])
    return ConfigError(path, key, found, expected.removeprefix("Input should be "))


def _type_at(schema: Any, location: tuple[int | str, ...]) -> Any:  # noqa: ANN401 - any type
    """The data class that describes the mapping at a place in the file."""
    for step in location:
        if dataclasses.is_dataclass(schema):
            schema = typing.get_type_hints(schema)[str(step)]
        else:
            schema = typing.get_args(schema)[-1 if isinstance(step, str) else 0]
        inner = [kind for kind in typing.get_args(schema) if dataclasses.is_dataclass(kind)]
        is_optional = type(None) in typing.get_args(schema)
        schema = inner[0] if is_optional and inner else schema
    return schema
