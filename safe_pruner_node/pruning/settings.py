"""Which pruner runs and how: validated, picklable, free of torch.

The control process builds these and hands them to the worker, so this module may import
neither torch nor anything that does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.resources import resource

METHODS = ("vanilla", "safe", "fastv", "random")
QUERY_ROWS = ("text", "last_text", "action_probe")
SOFTMAX_OVER = ("visual", "all")
DENOISE_STEPS = ("mean", "first", "last")
DIVISIONS = ("adaptive", "fixed")

PRESETS_FILE = "config/pruners.yaml"


@dataclass(frozen=True)
class PrunerSettings:
    """Settings of one pruning method. Every construction validates.

    Attributes:
        method: ``vanilla``, ``safe``, ``fastv`` or ``random``.
        rho: Share of the valid visual tokens that is dropped, in [0, 1).
        layer: ``ls`` of the paper: so many VLM layers see every token.
        lambda_: Weight of the forecast against the early saliency (Eq. 5), in [0, 1].
        gamma: A step whose kappa (Eq. 6) is below this is a keyframe. Above 1 every step is
            one, -1 leaves only the first.
        deep: Expert layers whose saliency is forecast; negative counts from the last.
        query_rows: Rows that vote early: ``text`` (VLM text rows of layer ls-1), ``last_text``
            (only the last of them, as FastV) or ``action_probe`` (action rows of expert layer
            ls-1 in denoise step 1).
        match_within_camera: Match a token only with reference tokens of its own camera.
        camera_floor: Tokens every camera keeps at least, inside the fixed total.
        max_age: Queries after which the reference is renewed anyway; None is never.
        softmax_over: Keys the saliency softmax runs over: ``visual`` (Eq. 1) or ``all``.
        denoise_steps: Denoise steps the deep saliency is taken from: ``mean`` of all,
            ``first`` or ``last``.
        division: ``adaptive`` renews the reference by kappa, ``fixed`` every ``interval``
            queries (the paper's ablation "without division").
        interval: Queries between keyframes under ``division: fixed``.
        seed: Seed of the ``random`` method.
        name: Preset name, for reports and errors.
        source: File the preset came from, for errors.
    """

    method: str = "safe"
    rho: float = 0.75
    layer: int = 3
    lambda_: float = 0.5
    gamma: float = 0.503
    deep: tuple[int, ...] = (0, -2, -1)
    query_rows: str = "text"
    match_within_camera: bool = True
    camera_floor: int = 16
    max_age: int | None = None
    softmax_over: str = "visual"
    denoise_steps: str = "mean"
    division: str = "adaptive"
    interval: int = 10
    seed: int = 0
    name: str = field(default="robot", compare=False)
    source: str = field(default=PRESETS_FILE, compare=False)

    def __post_init__(self) -> None:
        self._require_choice("method", self.method, METHODS)
        self._require_number("rho", self.rho, 0.0, 1.0, upper_open=True)
        self._require_int("layer", self.layer, minimum=1)
        self._require_number("lambda", self.lambda_, 0.0, 1.0)
        self._require_number("gamma", self.gamma, -1.0, 2.0)
        self._require_deep()
        self._require_choice("query_rows", self.query_rows, QUERY_ROWS)
        if not isinstance(self.match_within_camera, bool):
            raise self.error("match_within_camera", self.match_within_camera, "true or false")
        self._require_int("camera_floor", self.camera_floor, minimum=0)
        if self.max_age is not None:
            self._require_int("max_age", self.max_age, minimum=1)
        self._require_choice("softmax_over", self.softmax_over, SOFTMAX_OVER)
        self._require_choice("denoise_steps", self.denoise_steps, DENOISE_STEPS)
        self._require_choice("division", self.division, DIVISIONS)
        self._require_int("interval", self.interval, minimum=1)
        self._require_int("seed", self.seed, minimum=0)

    @property
    def is_vanilla(self) -> bool:
        """True when nothing is ever pruned by construction."""
        return self.method == "vanilla"

    def error(self, key: str, found: object, expected: str) -> ConfigError:
        """A ConfigError that names this preset's file and key."""
        return ConfigError(self.source, f"{self.name}.{key}", found, expected)

    def check_depth(self, depth: int) -> None:
        """Check the layer indices against a model.

        Args:
            depth: Layers of the VLM (and of the expert, which has as many).

        Raises:
            ConfigError: ``layer`` leaves no layer to prune, or ``deep`` names none.
        """
        if self.is_vanilla:
            return
        if self.layer >= depth:
            raise self.error("layer", self.layer, f"1..{depth - 1}: the model has {depth} layers")
        for index in self.deep:
            if not -depth <= index < depth:
                raise self.error(
                    "deep", list(self.deep), f"indices in {-depth}..{depth - 1}: {depth} layers"
                )

    def deep_layers(self, depth: int) -> tuple[int, ...]:
        """The deep set as ascending, distinct layer indices of a model with ``depth`` layers."""
        return tuple(sorted({index % depth for index in self.deep}))

    def kept(self, n_visual: int) -> int:
        """K: visual tokens kept on a pruned step, round((1 - rho) N_vis), at least 1."""
        return max(1, round((1.0 - self.rho) * n_visual))

    def check_tokens(self, tokens_per_camera: Mapping[str, int]) -> None:
        """Check the camera floor against the cameras actually present.

        Args:
            tokens_per_camera: Camera to valid visual tokens.

        Raises:
            ConfigError: The floors of all cameras together exceed K.
        """
        if self.is_vanilla or not tokens_per_camera:
            return
        keep = self.kept(sum(tokens_per_camera.values()))
        floors = sum(min(self.camera_floor, n) for n in tokens_per_camera.values())
        if floors > keep:
            raise self.error(
                "camera_floor",
                self.camera_floor,
                f"at most {keep // len(tokens_per_camera)}: {keep} tokens are kept over "
                f"{len(tokens_per_camera)} cameras at rho {self.rho:g}",
            )

    def _require_choice(self, key: str, value: object, choices: tuple[str, ...]) -> None:
        if value not in choices:
            raise self.error(key, value, "one of " + ", ".join(choices))

    def _require_number(
        self, key: str, value: object, low: float, high: float, *, upper_open: bool = False
    ) -> None:
        bound = f"a number in [{low:g}, {high:g}{')' if upper_open else ']'}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, value, bound)
        inside = low <= value < high if upper_open else low <= value <= high
        if not math.isfinite(value) or not inside:
            raise self.error(key, value, bound)

    def _require_int(self, key: str, value: object, *, minimum: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(key, value, f"an integer of at least {minimum}")

    def _require_deep(self) -> None:
        entries: object = self.deep
        whole = isinstance(entries, tuple) and all(type(index) is int for index in entries)
        if not whole or not self.deep:
            raise self.error("deep", entries, "a list of expert layer indices, e.g. [0, -2, -1]")


_YAML_KEYS = {
    "lambda" if f.name == "lambda_" else f.name: f.name
    for f in fields(PrunerSettings)
    if f.name not in {"name", "source"}
}


def load_preset(path: str | Path | None, name: str, rho: float | None = None) -> PrunerSettings:
    """Read one preset.

    Args:
        path: The presets file; None takes the shipped one.
        name: Preset name (``vanilla``, ``paper``, ``robot``...).
        rho: Overrides the preset's pruning ratio.

    Returns:
        The validated settings.

    Raises:
        ConfigError: Unreadable file, unknown preset or key, value of a wrong type or range.
    """
    file = resource(PRESETS_FILE) if path is None else Path(path)
    presets = _read_presets(file)
    if name not in presets:
        raise ConfigError(file, "pruner", name, "one of " + ", ".join(sorted(presets)))
    settings = _from_mapping(presets[name], name, str(file))
    if rho is None:
        return settings
    try:
        return replace(settings, rho=rho)
    except ConfigError as error:
        raise ConfigError("parameter", "rho", error.found, error.expected) from None


def _read_presets(file: Path) -> Mapping[str, Any]:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(file, "", "no such file", "a pruner presets file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(file, "", error, "a readable YAML file") from None
    presets = document.get("presets") if isinstance(document, dict) else None
    if not isinstance(presets, dict) or not presets:
        raise ConfigError(file, "presets", type(presets).__name__, "a mapping of preset names")
    return presets


def _from_mapping(values: object, name: str, source: str) -> PrunerSettings:
    if not isinstance(values, dict):
        raise ConfigError(source, name, type(values).__name__, "a mapping of settings")
    for key in values:
        if key not in _YAML_KEYS:
            raise ConfigError(
                source, f"{name}.{key}", "an unknown key", "one of " + ", ".join(_YAML_KEYS)
            )
    if "method" not in values:
        raise ConfigError(source, f"{name}.method", "nothing", "one of " + ", ".join(METHODS))
    arguments = {_YAML_KEYS[key]: value for key, value in values.items()}
    if isinstance(arguments.get("deep"), list):
        arguments["deep"] = tuple(arguments["deep"])
    return PrunerSettings(**arguments, name=name, source=source)
