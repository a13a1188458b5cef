"""The comparison with fp32 lets right paths through and finds each kind of wrong one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_gpu_side import CPU, Faulty, make_bench, small_policy

from safe_pruner_node.engine.graphs import GraphRunner
from safe_pruner_node.engine.runner import EagerRunner
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.bench_gpu.cases import (
    FIXED,
    MODES,
    NOTHING_DROPPED,
    SAFE,
    Case,
    Played,
    all_cases,
    play,
)
from safe_pruner_node.evaluation.bench_gpu.comparison import compare
from safe_pruner_node.evaluation.bench_gpu.correctness import correctness, reference
from safe_pruner_node.evaluation.bench_gpu.methods import FULL, KEYFRAME
from safe_pruner_node.evaluation.bench_gpu.policy import in_fp32
from safe_pruner_node.evaluation.bench_gpu.queries import BASE

SEEDS = 3


@pytest.fixture(scope="module")
def exact():
    return in_fp32(small_policy())


@pytest.fixture(scope="module")
def judge(exact):
    """What is said about a runner in one mode of the base shape."""

    def complaints(runner, mode=FULL):
        case = Case(BASE, mode)
        truth = play(case, exact, EagerRunner(), SEEDS)
        bf16 = play(case, small_policy(), EagerRunner(), SEEDS)
        ours = play(case, small_policy(), runner, SEEDS)
        return compare(ours, bf16, truth, chooses=case.chooses).complaints

    return complaints


@pytest.mark.parametrize("mode", MODES)
def test_graphs_are_right(judge, mode):
    assert judge(GraphRunner(CPU), mode) == []


def louder(result, _):
    actions, saliency = result
    return actions * 1.05, saliency


def last_row_stays(result, calls, kept=[]):  # noqa: B006 - the point: it outlives the call
    actions, saliency = result
    if calls == 1:
        kept[:] = [actions[:, -1].clone()]
    actions[:, -1] = kept[0]
    return actions, saliency


def drifts(result, calls):
    actions, saliency = result
    return actions * (1 + 0.01 * calls), saliency


def one_nan(result, calls):
    actions, saliency = result
    actions[0, 0, 0] = float("nan") if calls == 2 else actions[0, 0, 0]
    return actions, saliency


def other_camera(result, _):
    return result.roll(result.shape[0] // 3, 0)


def late_values_of_other_tokens(cache, _):
    *early, (k, v) = cache
    return [*early, (k, v.flip(2))]


@pytest.mark.parametrize(
    ("stage", "spoil", "mode", "complaint"),
    [
        ("denoise", louder, FULL, "of bf16 eager's"),
        ("denoise", louder, KEYFRAME, "of bf16 eager's"),
        ("denoise", last_row_stays, FULL, "actions left from the query before"),
        ("denoise", drifts, FULL, "when asked again"),
        ("denoise", one_nan, FULL, "not finite"),
        ("see", other_camera, FULL, "of bf16 eager's"),
        ("see", other_camera, SAFE, "% other tokens"),
        ("prefill_late", late_values_of_other_tokens, FIXED, "of bf16 eager's"),
        ("prefill_late", late_values_of_other_tokens, NOTHING_DROPPED, "of bf16 eager's"),
    ],
)
def test_a_wrong_path_is_named(judge, stage, spoil, mode, complaint):
    assert complaint in "; ".join(judge(Faulty(stage, spoil), mode))


def test_a_pruned_step_that_keeps_everything_has_to_be_the_full_one(exact):
    full, same = (
        play(Case(BASE, mode), exact, EagerRunner(), SEEDS) for mode in (FULL, NOTHING_DROPPED)
    )
    bf16 = play(Case(BASE, FULL), small_policy(), EagerRunner(), SEEDS)
    assert (
        compare(same, bf16=replace(bf16, keep=same.keep), reference=same, full=full).complaints
        == []
    )
    wrong = replace(full, actions=full.actions * 1.1)
    (line,) = compare(
        same, bf16=replace(bf16, keep=same.keep), reference=same, full=wrong
    ).complaints
    assert "off its own full step" in line


def played(keep, scale=1.0):
    random = np.random.default_rng(0)
    actions = random.normal(size=(2, 4, 32)).astype(np.float32)
    actions[1] += scale - 1
    return Played(actions, np.array(keep), actions[0])


def test_given_tokens_have_to_be_the_same_and_chosen_ones_nearly():
    truth, one_off = played([range(200), range(200)]), played([range(200), range(1, 201)])
    kwargs = {"bf16": truth, "reference": truth}
    assert compare(one_off, **kwargs).complaints == ["0.2 % other tokens"]
    assert compare(one_off, **kwargs, chooses=True).complaints == []
    many_off = played([range(200), range(10, 210)])
    assert compare(many_off, **kwargs, chooses=True).complaints == ["2.5 % other tokens"]


def test_another_number_of_tokens_is_no_matter_of_degree():
    truth, fewer = played([range(9), range(9)]), played([range(8), range(8)])
    with pytest.raises(ValueError, match="8 tokens kept instead of 9"):
        compare(fewer, bf16=truth, reference=truth)


def test_a_step_of_another_kind_is_not_compared():
    def blind(z, _):
        return z * float("nan")  # kappa is then NaN, and the step a keyframe

    with pytest.raises(RuntimeError, match="keyframe is True"):
        play(Case(BASE, SAFE), small_policy(), Faulty("see", blind), SEEDS)


def test_sections_judge_every_case_and_stop_in_time(tmp_path):
    (*_, known) = reference(make_bench(tmp_path, EagerRunner()))
    assert [(row["mode"], row["shape"]["prompt"]) for row in known["cases"]] == [
        (case.mode, case.shape.prompt) for case in all_cases()
    ]
    (*_, found) = correctness(make_bench(tmp_path, GraphRunner(CPU)))
    assert [row["complaints"] for row in found["cases"]] == [[]] * len(all_cases())
    full_error = {row["mode"]: row["full_error"] for row in found["cases"]}
    assert full_error[NOTHING_DROPPED] < 0.02
    assert full_error[FULL] is None
    (*_, wrong) = correctness(make_bench(tmp_path, Faulty("denoise", louder)))
    assert all(row["complaints"] for row in wrong["cases"] if not row["chooses"])


def test_without_a_reference_there_is_no_verdict(tmp_path):
    with pytest.raises(ConfigError, match=r"reference\.npz"):
        next(correctness(make_bench(Path(tmp_path), EagerRunner())))


def test_steps_are_played_on_the_models_device_in_its_type():
    case = Case(BASE, FULL)
    actions = play(case, small_policy(), EagerRunner(), 1).actions
    assert actions.shape == (1, BASE.horizon, small_policy().config.action_dim)
    assert small_policy().dtype == torch.bfloat16
