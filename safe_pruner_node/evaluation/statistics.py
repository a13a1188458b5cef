"""Intervals and tests for counts of successes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from scipy.stats import binomtest, norm


@dataclass(frozen=True)
class Interval:
    """A rate and where it may lie, all in 0..1; NaN without a trial."""

    rate: float
    low: float
    high: float


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a binomial rate (Wilson 1927), without continuity correction.

    Args:
        successes: At most `trials`.
        trials: 0 gives NaN.
        confidence: Two-sided.
    """
    if not trials:
        return Interval(math.nan, math.nan, math.nan)
    z = float(norm.ppf(0.5 + confidence / 2))
    rate = successes / trials
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    spread = rate * (1 - rate) / trials + z**2 / (4 * trials**2)
    half = z * math.sqrt(spread) / (1 + z**2 / trials)
    return Interval(rate, max(0.0, centre - half), min(1.0, centre + half))


@dataclass(frozen=True)
class PairedTest:
    """McNemar's exact test.

    Attributes:
        pairs: Episodes that both methods have run.
        gained: Of them, those that only this method solved.
        lost: Those that only the other one solved.
        p: Two-sided; 1 when nothing differs, NaN without a pair.
    """

    pairs: int
    gained: int
    lost: int
    p: float


def mcnemar(ours: Mapping[Hashable, bool], theirs: Mapping[Hashable, bool]) -> PairedTest:
    """Whether two methods solve the same episodes equally often (exact binomial, two-sided).

    Args:
        ours: Episode to success.
        theirs: The same of the other method; only episodes in both count.
    """
    shared = ours.keys() & theirs.keys()
    gained = sum(ours[key] and not theirs[key] for key in shared)
    lost = sum(theirs[key] and not ours[key] for key in shared)
    if not shared:
        return PairedTest(0, 0, 0, math.nan)
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return PairedTest(len(shared), gained, lost, p)
