"""Intervals and paired tests against values from elsewhere."""

import math

import pytest

from safe_pruner_node.evaluation.statistics import mcnemar, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (85, 100, 0.7672, 0.9069),  # R: prop.test(85, 100, correct = FALSE)
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 2, 0.0945, 0.9055),
    ],
)
def test_wilson_interval(successes, trials, low, high):
    interval = wilson(successes, trials)
    assert interval.rate == successes / trials
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_no_trial_has_no_interval():
    assert math.isnan(wilson(0, 0).low)


def solved(text):
    """'101' is {0: True, 1: False, 2: True}."""
    return {i: digit == "1" for i, digit in enumerate(text)}


def test_mcnemar_is_the_exact_binomial_over_discordant_pairs():
    ours, theirs = solved("1" * 10 + "0" * 2 + "11"), solved("0" * 10 + "1" * 2 + "11")
    test = mcnemar(ours, theirs)
    assert (test.pairs, test.gained, test.lost) == (14, 10, 2)
    assert test.p == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(theirs, ours).p == pytest.approx(test.p)


def test_mcnemar_counts_shared_episodes_only():
    test = mcnemar(solved("1110"), {0: False, 7: False})
    assert (test.pairs, test.gained, test.lost, test.p) == (1, 1, 0, 1.0)
    assert mcnemar(solved("11"), solved("11")).p == 1.0
    assert math.isnan(mcnemar(solved("1"), {}).p)
