"""Which settings each method has, in which order episodes run, and how gamma is found."""

from collections import Counter
from itertools import product

import numpy as np
import pytest

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.calibration import TOLERANCE, Trial, find_gamma
from safe_pruner_node.evaluation.methods import (
    METHODS,
    Presets,
    check_methods,
    equal_interval,
    method_settings,
)
from safe_pruner_node.evaluation.schedule import Entrant, ordered_jobs
from safe_pruner_node.pruning.flops import PrefillSize, executed_prefill
from safe_pruner_node.pruning.settings import load_preset

SIZE = {"width": 192, "mlp": 768, "depth": 10, "heads": 4, "kv_heads": 1, "head_dim": 64}
VISUAL, TEXT, LAYER = 768, 50, 3


def safe_episode(queries, keyframes):
    """An episode of SAFE at rho 0.75 with so many keyframes."""
    full = executed_prefill(VISUAL + TEXT, PrefillSize(**SIZE))
    pruned = executed_prefill(VISUAL + TEXT, PrefillSize(**SIZE), LAYER, VISUAL // 4 + TEXT)
    return {
        "queries": queries,
        "keyframes": keyframes,
        "flops": {"exact": keyframes * full + (queries - keyframes) * pruned},
        "text_tokens": TEXT * queries,
        "visual_tokens": {"head": 256, "left_wrist": 256, "right_wrist": 256},
        "prefill": SIZE,
    }


def test_methods_differ_from_safe_in_what_they_are_named_after():
    presets = Presets(gamma=0.9)
    episodes = [safe_episode(40, 4), safe_episode(20, 2)]
    of = {name: method_settings(name, 0.9, presets, episodes) for name in METHODS}
    assert of["vanilla"].is_vanilla
    assert {of[name].rho for name in METHODS[1:-1]} == {0.9}
    safe = vars(of["safe"])
    assert safe["gamma"] == 0.9

    def changed(name):
        return {k for k, v in vars(of[name]).items() if v != safe[k]} - {"name"}

    assert changed("without_forecast") == {"lambda_"}
    assert changed("without_division") == {"division"}  # every 10, the preset's own interval
    assert (of["fastv"].method, of["random"].method) == ("fastv", "random")


def test_the_fixed_interval_makes_as_many_keyframes():
    assert equal_interval([safe_episode(45, 4), safe_episode(30, 3)]) == 12  # 4 + 3
    assert equal_interval([safe_episode(45, 1), safe_episode(30, 1)]) == 45
    assert equal_interval([safe_episode(5, 5)]) == 1


def test_fastv_at_safes_flops_costs_the_same():
    episodes = [safe_episode(40, 4), safe_episode(20, 2)]
    fastv = method_settings("fastv_equal_flops", 0.75, Presets(), episodes)
    assert fastv.rho < 0.75  # the keyframes' tokens are shared out
    cost = sum(e["flops"]["exact"] for e in episodes) / 60
    kept = fastv.kept(VISUAL)
    ours = executed_prefill(VISUAL + TEXT, PrefillSize(**SIZE), LAYER, kept + TEXT)
    one_token = executed_prefill(VISUAL + TEXT, PrefillSize(**SIZE), LAYER, kept + TEXT + 1) - ours
    assert abs(ours - cost) <= one_token / 2


def test_another_preset_may_take_part(tmp_path):
    check_methods(["vanilla", "paper"])
    assert method_settings("paper", 0.9, Presets()).camera_floor == 0
    file = tmp_path / "pruners.yaml"
    file.write_text("presets: {mine: {method: safe, lambda: 1.0}, bad: {method: safe, layer: 0}}")
    check_methods(["mine"], file)
    assert method_settings("mine", 0.5, Presets(file)).lambda_ == 1.0
    with pytest.raises(ConfigError, match=r"bad\.layer: found 0"):
        check_methods(["bad"], file)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["vanila"], "vanila, expected one of vanilla, .* or a preset: one of fastv"),
        (["vanilla", "without_division"], "without safe"),
        (["safe", "safe"], "'safe', 'safe'"),
        ([], r"\[\]"),
    ],
)
def test_methods_that_make_no_sense(names, found):
    with pytest.raises(ConfigError, match=found):
        check_methods(names)


def test_any_beginning_of_the_jobs_is_balanced():
    entrants = [
        Entrant(name, rho, load_preset(None, "vanilla"))
        for name, rho in product("abc", (0.75, 0.9))
    ]
    jobs = ordered_jobs(entrants, ["x", "y", "z"], "evaluation", range(5, 9))
    assert len(set(map(repr, jobs))) == len(jobs) == 6 * 3 * 4
    assert {job.index for job in jobs} == {5, 6, 7, 8}
    for length in range(18, len(jobs) + 1):
        counts = Counter((job.method, job.rho, job.task) for job in jobs[:length])
        assert max(counts.values()) - min(counts.values()) <= 1


def closed_loop(gamma, episodes=30, queries=40):
    """Kappa falls with the age of the keyframe, plus noise: a keyframe changes what follows."""
    random = np.random.default_rng(0)
    lines = []
    for _ in range(episodes):
        kappas, keyframes, age = [None], 1, 0
        for _ in range(queries - 1):
            age += 1
            kappa = 0.99 - 0.02 * age**0.5 + random.normal(0, 0.01)
            kappas.append(kappa)
            if kappa < gamma:
                keyframes, age = keyframes + 1, 0
        lines.append(
            {"queries": queries, "keyframes": keyframes, "kappas": kappas, "success": False}
        )
    return Trial.of(gamma, lines)


@pytest.mark.parametrize("first", [0.5, 0.92, 0.999])
def test_gamma_is_found_in_closed_loop(first):
    found, trials = find_gamma(closed_loop, first, 0.08)
    assert found is not None
    assert abs(closed_loop(found.gamma).rate - 0.08) <= TOLERANCE
    assert len(trials) <= 6


def test_a_rate_below_the_first_steps_share_is_refused():
    with pytest.raises(ConfigError, match="the first step of every episode"):
        find_gamma(lambda gamma: closed_loop(gamma, queries=8), 0.9, 0.08)
