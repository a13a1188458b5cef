"""The results file: one JSON line per episode, appended at once, never two kinds in one file.

An episode is named by method, rho, task, split and index. Every line says of itself under which
checkpoint, settings and pruner it came about, so that a file needs nothing beside it; a file with
lines of others is refused and not mixed.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pruning.settings import PrunerSettings

Line = Mapping[str, Any]


@dataclass(frozen=True)
class EpisodeKey:
    """What an episode is called.

    Attributes:
        method: Name of the method.
        rho: Share of the visual tokens that its table is about; 0 for vanilla.
        task: Name of the task.
        split: Whose seeds.
        index: Number within the split.
    """

    method: str
    rho: float
    task: str
    split: str
    index: int

    @classmethod
    def of(cls, line: Line) -> EpisodeKey:
        """The key of a line."""
        return cls(line["method"], line["rho"], line["task"], line["split"], line["index"])


def pruner_to_json(pruner: PrunerSettings) -> dict[str, Any]:
    """Settings without the names that only speak to people, as JSON would read them back."""
    values = {k: v for k, v in asdict(pruner).items() if k not in {"name", "source"}}
    return dict(json.loads(json.dumps(values)))


def pruner_from_json(values: Mapping[str, Any], name: str) -> PrunerSettings:
    """Settings of a line.

    Raises:
        ConfigError: They are not those of a pruner.
    """
    try:
        return PrunerSettings(**{**values, "deep": tuple(values["deep"]), "name": name})
    except (TypeError, KeyError) as error:
        raise ConfigError("results", "pruner", error, "settings of a pruner") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line; a last one that was cut off in the middle is left out.

    Raises:
        ConfigError: Unreadable, or a line that is not an episode.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(path, "", error, "a readable results file") from None
    lines = []
    for number, row in enumerate(text.split("\n")[:-1], start=1):  # what follows the last \n is cut
        try:
            line = json.loads(row)
            EpisodeKey.of(line)
        except (ValueError, KeyError, TypeError):
            raise ConfigError(path, f"line {number}", row[:40], "one episode as JSON") from None
        lines.append(line)
    return lines


class Results:
    """A results file that is being written; one writer at a time.

    Args:
        path: Made when it is not there; a last line that was cut off is removed.
        checkpoint: Identity of the weights that every line must have.
        settings: What every line must have run under.

    Raises:
        ConfigError: Lines of another checkpoint or other settings, two lines of one episode, or
            another process that writes.
    """

    def __init__(self, path: Path, checkpoint: str, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._checkpoint = checkpoint
        self._settings = json.loads(json.dumps(settings))
        self._by_key: dict[EpisodeKey, dict[str, Any]] = {}
        self._pruners: dict[tuple[str, float], dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        try:
            self._lock()
            self._file.truncate(path.read_bytes().rfind(b"\n") + 1)  # a line that was cut off
            for number, line in enumerate(read_lines(path), start=1):
                self._take(line, f"line {number}")
        except ConfigError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Every episode so far."""
        return list(self._by_key.values())

    def __contains__(self, key: EpisodeKey) -> bool:
        return key in self._by_key

    def pruner_of(self, method: str, rho: float) -> PrunerSettings | None:
        """Settings that the lines of a method have; None while there is none.

        Raises:
            ConfigError: They are not those of a pruner.
        """
        values = self._pruners.get((method, rho))
        return None if values is None else pruner_from_json(values, method)

    def check_pruner(self, method: str, rho: float, pruner: PrunerSettings) -> None:
        """Refuse a method that has run under other settings.

        Raises:
            ConfigError: Names the first setting that differs.
        """
        known = self._pruners.get((method, rho))
        if known is not None:
            _require_same(self.path, f"{method} at rho {rho:g}", known, pruner_to_json(pruner))

    def append(self, line: Line) -> None:
        """Add an episode; it is in the file when this returns."""
        self._take(dict(line), "new line")
        self._file.write(_dump(line))
        self._file.flush()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = "another process that writes it"
            raise ConfigError(self.path, "", found, "one writer at a time") from None

    def _take(self, line: dict[str, Any], where: str) -> None:
        key = EpisodeKey.of(line)
        _require_same(
            self.path, where, {"checkpoint": line["checkpoint"]}, {"checkpoint": self._checkpoint}
        )
        _require_same(self.path, where, line["settings"], self._settings)
        if key in self._by_key:
            raise ConfigError(self.path, where, f"{key} a second time", "every episode once")
        first = self._pruners.setdefault((key.method, key.rho), line["pruner"])
        _require_same(self.path, f"{where}, {key.method}", line["pruner"], first)
        self._by_key[key] = line


def _dump(line: Line) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _require_same(path: Path, where: str, found: Line, expected: Line) -> None:
    for key in {**expected, **found}:
        ours, theirs = expected.get(key), found.get(key)
        if ours != theirs:
            raise ConfigError(
                path,
                f"{where}: {key}",
                theirs,
                f"{ours}, as in this call; --out another folder keeps the two apart",
            )
