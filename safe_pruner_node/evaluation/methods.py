"""The methods of the table, as pruner settings at one rho.

Two of them are defined by what SAFE did on the same episodes and so come after it:
`without_division` renews its reference as often, only blindly; `fastv_equal_flops` may keep as many
tokens as SAFE's computation, keyframes included, would pay for. Beside these methods any other
preset of the pruners file may take part, to see what a setting does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.results import Line
from safe_pruner_node.pruning.flops import PrefillSize, executed_prefill
from safe_pruner_node.pruning.settings import PrunerSettings, load_preset

VANILLA, RANDOM, FASTV, SAFE = "vanilla", "random", "fastv", "safe"
WITHOUT_FORECAST, WITHOUT_DIVISION = "without_forecast", "without_division"
FASTV_EQUAL_FLOPS = "fastv_equal_flops"

METHODS = (
    VANILLA,
    RANDOM,
    FASTV,
    SAFE,
    WITHOUT_FORECAST,
    WITHOUT_DIVISION,
    FASTV_EQUAL_FLOPS,
)
AFTER_SAFE = (WITHOUT_DIVISION, FASTV_EQUAL_FLOPS)
"""Methods whose settings come from SAFE's episodes."""


@dataclass(frozen=True)
class Presets:
    """Where settings come from.

    Attributes:
        file: Presets file; None takes the shipped one.
        gamma: Overrides the keyframe threshold of SAFE's preset.
    """

    file: Path | None = None
    gamma: float | None = None

    def safe(self, rho: float) -> PrunerSettings:
        """SAFE-Pruner, preset `robot`, at a rho.

        Raises:
            ConfigError: The file, the preset, rho or gamma is wrong.
        """
        settings = load_preset(self.file, "robot", rho)
        return settings if self.gamma is None else replace(settings, gamma=self.gamma)


def check_methods(names: Sequence[str], file: Path | None = None) -> None:
    """Refuse unknown methods, and those that come after SAFE without it.

    Args:
        names: Of `METHODS`, or presets.
        file: Presets file; None takes the shipped one.

    Raises:
        ConfigError: Names it.
    """
    for name in names:
        if name not in METHODS:
            try:
                load_preset(file, name)
            except ConfigError as error:
                if error.key != "pruner":  # there is such a preset, and it is wrong
                    raise
                expected = f"one of {', '.join(METHODS)}, or a preset: {error.expected}"
                raise ConfigError("parameter", "--methods", name, expected) from None
        if name in AFTER_SAFE and SAFE not in names:
            raise ConfigError(
                "parameter", "--methods", f"{name} without {SAFE}", f"{SAFE} too, it sets the rest"
            )
    if not names or len(set(names)) != len(names):
        raise ConfigError("parameter", "--methods", list(names), "each method once")


def table_rho(method: str, rho: float) -> float:
    """Under which rho the episodes of a method are filed: vanilla has one set for all tables."""
    return 0.0 if method == VANILLA else rho


def method_settings(
    method: str, rho: float, presets: Presets, safe_lines: Sequence[Line] = ()
) -> PrunerSettings:
    """The pruner of a method.

    Args:
        method: One of `METHODS`, or a preset.
        rho: Share of the visual tokens that is dropped.
        presets: Where SAFE, FastV and the rest are described.
        safe_lines: SAFE's episodes at this rho; only for the methods that come after it.

    Raises:
        ConfigError: The presets are wrong, or SAFE's episodes are missing.
    """
    builders: dict[str, Callable[[], PrunerSettings]] = {
        VANILLA: lambda: load_preset(presets.file, "vanilla"),
        RANDOM: lambda: load_preset(presets.file, "random", rho),
        FASTV: lambda: load_preset(presets.file, "fastv", rho),
        SAFE: lambda: presets.safe(rho),
        WITHOUT_FORECAST: lambda: replace(presets.safe(rho), lambda_=0.0),
        WITHOUT_DIVISION: lambda: replace(
            presets.safe(rho), division="fixed", interval=equal_interval(safe_lines)
        ),
        FASTV_EQUAL_FLOPS: lambda: _fastv_at_cost(presets, rho, safe_lines),
    }
    if method in AFTER_SAFE and not safe_lines:
        raise ConfigError("results", method, f"no episode of {SAFE}", f"{SAFE}'s episodes first")
    if method not in builders:
        return load_preset(presets.file, method, rho)
    return replace(builders[method](), name=method)


def keyframe_rate(lines: Sequence[Line]) -> float:
    """Keyframes per policy step, first ones included; NaN without a step."""
    queries = sum(line["queries"] for line in lines)
    return sum(line["keyframes"] for line in lines) / queries if queries else math.nan


def equal_interval(safe_lines: Sequence[Line]) -> int:
    """The fixed interval that would have made as many keyframes in the same episodes."""
    lengths = [int(line["queries"]) for line in safe_lines]
    keyframes: int = sum(line["keyframes"] for line in safe_lines)

    def surplus(interval: int) -> int:
        return abs(sum(-(-length // interval) for length in lengths) - keyframes)

    return min(range(1, max(lengths, default=1) + 1), key=surplus)


def _fastv_at_cost(presets: Presets, rho: float, safe_lines: Sequence[Line]) -> PrunerSettings:
    """FastV with the number of tokens whose exact prefill costs what SAFE's did on average."""
    fastv = load_preset(presets.file, "fastv", rho)
    queries = sum(line["queries"] for line in safe_lines)
    cost: float = sum(line["flops"]["exact"] for line in safe_lines) / queries
    text = round(sum(line["text_tokens"] for line in safe_lines) / queries)
    visual = sum(safe_lines[0]["visual_tokens"].values())
    size = PrefillSize(**safe_lines[0]["prefill"])

    def surplus(kept: int) -> float:
        return abs(executed_prefill(visual + text, size, fastv.layer, kept + text) - cost)

    kept = min(range(1, visual + 1), key=surplus)
    return replace(fastv, rho=1.0 - kept / visual)
