"""Sizes of a π0.5 model: the vision tower, the language model, the action expert."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from safe_pruner_node.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP vision transformer.

    Attributes:
        width: Channels per image token.
        depth: Transformer layers.
        mlp: Hidden channels of each layer's MLP.
        heads: Attention heads; they divide ``width``.
        patch: Side of one square patch, pixels.
        image: Side of the square input image, pixels.
    """

    width: int
    depth: int
    mlp: int
    heads: int
    patch: int = 14
    image: int = 224

    @property
    def tokens(self) -> int:
        """Image tokens per camera: one per patch."""
        return (self.image // self.patch) ** 2


@dataclass(frozen=True)
class GemmaConfig:
    """Gemma decoder: the language model (VLM) or the action expert.

    Attributes:
        width: Channels per token.
        depth: Transformer layers.
        mlp: Hidden channels of each layer's gated MLP.
        heads: Query heads.
        kv_heads: Key/value heads, shared by groups of query heads.
        head_dim: Channels per head.
    """

    width: int
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Pi05Config:
    """Everything that decides the shapes of a π0.5 model and of its inputs.

    Attributes:
        vision: The vision tower.
        vlm: The language model that reads image and text tokens.
        expert: The action expert; it reads the language model's keys and values, so depth,
            heads, kv_heads and head_dim are the same as the language model's.
        vocab_size: Rows of the text embedding.
        action_dim: Channels of one action; a robot's own actions are zero-padded to it.
        horizon: Actions per chunk.
        flow_steps: Euler steps of flow matching.
        max_prompt_tokens: Text tokens kept of a prompt.
        name: What to call this size in reports.
    """

    vision: VisionConfig
    vlm: GemmaConfig
    expert: GemmaConfig
    vocab_size: int
    action_dim: int = 32
    horizon: int = 50
    flow_steps: int = 10
    max_prompt_tokens: int = 200
    name: str = "pi05"

    def __post_init__(self) -> None:
        self.validate("Pi05Config")

    def validate(self, source: str | Path) -> None:
        """Check that the sizes fit each other.

        Args:
            source: Where the numbers came from, for the error.

        Raises:
            ConfigError: A number is not positive, or two parts do not fit together.
        """
        for key, value in _numbers(asdict(self)):
            if value < 1:
                raise ConfigError(source, key, value, "a positive integer")
        if self.vision.width % self.vision.heads:
            raise ConfigError(
                source, "vision.heads", self.vision.heads, f"a divisor of {self.vision.width}"
            )
        if self.vision.image % self.vision.patch:
            raise ConfigError(
                source, "vision.image", self.vision.image, f"a multiple of {self.vision.patch}"
            )
        if self.vlm.heads % self.vlm.kv_heads:
            raise ConfigError(
                source, "vlm.kv_heads", self.vlm.kv_heads, f"a divisor of {self.vlm.heads}"
            )
        for key in ("depth", "heads", "kv_heads", "head_dim"):
            vlm, expert = getattr(self.vlm, key), getattr(self.expert, key)
            if vlm != expert:
                raise ConfigError(source, f"expert.{key}", expert, f"{vlm}, as in vlm.{key}")
        for key, value in (
            ("vlm.head_dim", self.vlm.head_dim),
            ("expert.width", self.expert.width),
        ):
            if value % 2:
                raise ConfigError(source, key, value, "an even number")

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, source: str | Path, data: object | None = None) -> Pi05Config:
        """Read a configuration written by `to_json`, strictly.

        Args:
            source: The JSON file; only named in errors when ``data`` is given.
            data: The already parsed JSON value.

        Raises:
            ConfigError: The file, a key, a type or a value is not what it should be.
        """
        if data is None:
            data = read_json(source)
        top = _build_arguments(cls, data, source, "")
        top["vision"] = _build(VisionConfig, top["vision"], source, "vision")
        top["vlm"] = _build(GemmaConfig, top["vlm"], source, "vlm")
        top["expert"] = _build(GemmaConfig, top["expert"], source, "expert")
        try:
            return cls(**top)
        except ConfigError as error:  # the same complaint, naming the file
            raise ConfigError(source, error.key, error.found, error.expected) from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ConfigError: The file is missing, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(path, "", error.strerror, "a readable JSON file") from None
    except ValueError as error:
        raise ConfigError(path, "", f"invalid JSON ({error})", "a JSON object") from None
    if not isinstance(value, dict):
        raise ConfigError(path, "", type(value).__name__, "a JSON object")
    return value


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int):
            found.append((f"{prefix}{key}", value))
    return found


def _build(kind: type[T], data: object, source: str | Path, where: str) -> T:
    return kind(**_build_arguments(kind, data, source, where))


def _build_arguments(kind: type, data: object, source: str | Path, where: str) -> dict[str, Any]:
    """Check names and types of one JSON object against the fields of a dataclass."""
    prefix = f"{where}." if where else ""
    if not isinstance(data, dict):
        raise ConfigError(source, where, type(data).__name__, "a JSON object")
    known = {field.name: field for field in fields(kind)}
    for key in data:
        if key not in known:
            raise ConfigError(source, f"{prefix}{key}", "an unknown key", f"one of {sorted(known)}")
    for key, field in known.items():
        wanted = {"int": int, "str": str}.get(str(field.type))  # None: a nested object
        if key not in data:
            # optional fields have a default in the dataclass
            if field.default is field.default_factory:
                raise ConfigError(source, f"{prefix}{key}", "nothing", "a value")
        elif wanted and (not isinstance(data[key], wanted) or isinstance(data[key], bool)):
            raise ConfigError(source, f"{prefix}{key}", repr(data[key]), f"{field.type}")
    return dict(data)


PI05 = Pi05Config(
    vision=VisionConfig(width=1152, depth=27, mlp=4304, heads=16),  # SigLIP So400m/14
    vlm=GemmaConfig(width=2048, depth=18, mlp=16384, heads=8, kv_heads=1, head_dim=256),
    expert=GemmaConfig(width=1024, depth=18, mlp=4096, heads=8, kv_heads=1, head_dim=256),
    vocab_size=257152,
)
"""The published model (openpi `pi05_base` and its descendants)."""

NANO = Pi05Config(
    vision=VisionConfig(width=192, depth=4, mlp=768, heads=3),
    vlm=GemmaConfig(width=192, depth=10, mlp=768, heads=4, kv_heads=1, head_dim=64),
    expert=GemmaConfig(width=192, depth=10, mlp=768, heads=4, kv_heads=1, head_dim=64),
    vocab_size=1024,
    action_dim=16,
    horizon=30,
    name="nano",
)
"""Small enough for a CPU, every mechanism kept: 256 tokens per camera, MQA, adaRMS, flow."""

TINY = Pi05Config(
    vision=VisionConfig(width=16, depth=2, mlp=24, heads=2, image=28),
    vlm=GemmaConfig(width=16, depth=4, mlp=32, heads=2, kv_heads=1, head_dim=8),
    expert=GemmaConfig(width=8, depth=4, mlp=16, heads=2, kv_heads=1, head_dim=8),
    vocab_size=64,
    horizon=5,
    max_prompt_tokens=24,
    name="tiny",
)
"""For tests: a few thousand parameters, four tokens per camera."""
