"""Finding gamma: the threshold of kappa at which so many policy steps become keyframes.

A keyframe changes every kappa after it, so quantiles of recorded kappas only say where to try next;
what counts is the rate of a closed-loop run with that gamma.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.methods import keyframe_rate
from safe_pruner_node.evaluation.results import Line

TOLERANCE = 0.015
DECIMALS = 5
"""Of gamma, as it is tried and as it is written into the preset."""
TRIES = 8


@dataclass(frozen=True)
class Trial:
    """One closed-loop run.

    Attributes:
        gamma: What was tried.
        rate: Keyframes per policy step, first ones included.
        first_share: Of it, what the first step of every episode makes up.
        kappas: Every kappa that was compared with gamma.
        queries: Policy steps.
        keyframes: Of them, keyframes.
        episodes: Episodes.
        successes: Of them, solved.
    """

    gamma: float
    rate: float
    first_share: float
    kappas: tuple[float, ...]
    queries: int
    keyframes: int
    episodes: int
    successes: int

    @classmethod
    def of(cls, gamma: float, lines: Sequence[Line]) -> Trial:
        """What a run with this gamma came to."""
        queries = sum(line["queries"] for line in lines)
        begun = sum(line["queries"] > 0 for line in lines)
        return cls(
            gamma=gamma,
            rate=keyframe_rate(lines),
            first_share=begun / queries if queries else math.nan,
            kappas=tuple(k for line in lines for k in line["kappas"] if k is not None),
            queries=queries,
            keyframes=sum(line["keyframes"] for line in lines),
            episodes=len(lines),
            successes=sum(bool(line["success"]) for line in lines),
        )


def find_gamma(
    measure: Callable[[float], Trial | None], first: float, target: float
) -> tuple[Trial | None, list[Trial]]:
    """Try gammas until the rate is within `TOLERANCE` of the target.

    Args:
        measure: Runs the calibration episodes with a gamma; None when there was no time.
        first: Where to begin.
        target: Keyframes per policy step, first ones included.

    Returns:
        The trial that hit, None when none did; and all of them.

    Raises:
        ConfigError: First steps alone are more than the target.
    """
    trials: list[Trial] = []
    gamma = round(first, DECIMALS)
    while len(trials) < TRIES:
        trial = measure(gamma)
        if trial is None:
            return None, trials
        trials.append(trial)
        if not trial.queries or trial.first_share > target + TOLERANCE:
            raise ConfigError(
                "parameter",
                "--keyframe-rate",
                f"{target:g}",
                f"more than {trial.first_share:.3g}: the first step of every episode is a keyframe",
            )
        if abs(trial.rate - target) <= TOLERANCE:
            return trial, trials
        following = next_gamma(trials, target)
        if any(following == tried.gamma for tried in trials):
            break
        gamma = following
    return None, trials


def next_gamma(trials: Sequence[Trial], target: float) -> float:
    """Where to try next: the quantile that the last run suggests, kept inside the bracket."""
    last = trials[-1]
    low = max((t.gamma for t in trials if t.rate < target), default=-1.0)
    high = min((t.gamma for t in trials if t.rate > target), default=1.0)
    share = (target - last.first_share) * last.queries / max(len(last.kappas), 1)
    quantile = float(np.quantile(last.kappas, np.clip(share, 0.0, 1.0))) if last.kappas else low
    if low < quantile < high and len(trials) < 4:
        return round(quantile, DECIMALS)
    if low == -1.0 or high == 1.0:  # one side is still open: what was seen bounds it
        low, high = max(low, min(last.kappas)), min(high, max(last.kappas))
    return round((low + high) / 2, DECIMALS)


def evidence(found: Trial | None, trials: Sequence[Trial], about: dict[str, Any]) -> dict[str, Any]:
    """What goes into gamma.json.

    Args:
        found: The trial that hit; None when none did.
        trials: All of them, in order.
        about: Checkpoint, split, rho, target, date.
    """
    return {
        "gamma": None if found is None else found.gamma,
        **about,
        "tolerance": TOLERANCE,
        "trials": [
            {k: v for k, v in asdict(trial).items() if k != "kappas"}
            | {"kappa_percentiles": _percentiles(trial.kappas)}
            for trial in trials
        ],
    }


def write_evidence(values: dict[str, Any], path: Path) -> None:
    """Write gamma.json."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def preset_line(found: Trial, checkpoint: str, date: str) -> str:
    """The line for config/pruners.yaml."""
    return (
        f"gamma: {found.gamma:.{DECIMALS}f}  # {100 * found.rate:.1f} % keyframes on "
        f"{found.episodes} calibration episodes, checkpoint {checkpoint}, {date}"
    )


def _percentiles(kappas: Sequence[float]) -> dict[str, float]:
    wanted = (1, 5, 10, 25, 50, 75, 90)
    if not kappas:
        return {}
    return {f"p{q}": round(float(np.percentile(kappas, q)), DECIMALS) for q in wanted}
