"""The pruner's fused arithmetic is the plain one, on a GPU or in Triton's interpreter."""

# ruff: noqa: E402 - what follows the skips needs Triton

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

import triton_interpreter  # noqa: F401
from cuda_graph_checks import METHODS, SAFE
from fused_prefix_checks import random_policy
from fused_pruner_checks import check_judge, check_match, problem, tokens
from test_fused import POLICY

from safe_pruner_node.engine import fused_pruner
from safe_pruner_node.engine.fused import FusedRunner
from safe_pruner_node.engine.kernels.early_votes import MOST_KEYS
from safe_pruner_node.engine.runner import EagerRunner
from safe_pruner_node.engine.session import PolicySession
from safe_pruner_node.pruning import judgement, matching
from safe_pruner_node.pruning.selection import Selection, select

interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="on a GPU this is what make bench-gpu does"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
SIZES = {"camera": 24, "text": 5, "slots": 8, "suffix": 6, "heads": 4, "dim": 24, "floor": 3}
REPLACED = {
    matching.correspond: fused_pruner.correspond,
    judgement.judge: fused_pruner.judge,
}


def small(**change):
    return problem(**SIZES | {"cameras": 2, "device": DEVICE} | change)


class FusedPruner(EagerRunner):
    """Runs nothing but the pruner's functions in kernels."""

    def run(self, stage, fixed, *inputs):
        return super().run(REPLACED.get(stage, stage), fixed, *inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("camera", [16, 70, 130])
@pytest.mark.parametrize("within", [True, False])
def test_the_nearest_token_is_found(dtype, camera, within):
    for common in (1.0, 20.0):
        z, reference = tokens(2, 0.5, DEVICE, common, dtype, width=72, camera=camera)
        check_match(z, reference, (camera, camera) if within else None)


def test_a_tie_goes_to_the_lowest_index():
    rows = torch.randn(3, 32, device=DEVICE).bfloat16()
    reference = rows.repeat_interleave(50, 0).roll(7, 0)  # each 50 times, over blocks
    pi = fused_pruner.correspond(None, reference, reference)
    assert pi.tolist() == matching.correspond(None, reference, reference).tolist()
    assert set(pi.tolist()) == {0, 7, 57}


def test_nothing_behind_a_camera_is_nearer_than_what_is_unlike():
    z, reference = tokens(2, 0.5, DEVICE, 20.0, width=32, camera=70)
    for cameras in ((70, 70), None):
        ours = fused_pruner.correspond(cameras, -z, reference)
        assert ours.tolist() == matching.correspond(cameras, -z, reference).tolist()


def test_a_blank_reference_and_rows_of_nan_give_the_plain_indices():
    z, reference = tokens(2, 0.5, DEVICE, width=32, camera=70)
    z[3], z[75] = float("nan"), float("nan")
    blank = torch.zeros_like(reference)
    broken = reference.clone()
    broken[[9, 66, 100]] = float("nan")
    for other in (reference, blank, broken):
        for cameras in ((70, 70), None):
            ours = fused_pruner.correspond(cameras, z, other)
            assert ours.tolist() == matching.correspond(cameras, z, other).tolist()


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("over", ["visual", "all"])
@pytest.mark.parametrize("rows", ["text", "last_text", "action_probe"])
def test_judgement_is_the_plain_one(rows, over, padded):
    for kv_heads in (1, 2):
        check_judge(small(rows=rows, over=over, padded=padded, kv_heads=kv_heads))


@pytest.mark.parametrize(
    "change",
    [
        {"lambda_": 0.0},
        {"lambda_": 1.0},
        {"floor": 0},
        {"floor": 30, "share": 1.0},
        {"cameras": 3, "camera": 40},
        {"dtype": torch.float32},
        {"dim": 64, "heads": 1},
        {"text": 70, "slots": 96},
    ],
    ids=str,
)
def test_other_sizes_and_settings(change):
    check_judge(small(**change))


@pytest.mark.parametrize("rows", ["text", "last_text"])
def test_padding_has_no_voice(rows):
    p = small(rows=rows, over="all")
    expected = p(fused_pruner.judge)
    p.query[:, :, 5:] = float("nan")
    p.keys[:, :, 48 + 5 : 48 + 8] = float("nan")
    found = p(fused_pruner.judge)
    assert torch.equal(found.early, expected.early)
    assert found.early.isfinite().all()


def test_a_nan_that_votes_is_seen_in_kappa():
    p = small()
    p.query[0, 0, 0, 0] = float("nan")
    found, plain = p(fused_pruner.judge), p(judgement.judge)
    assert found.early.isnan().all()
    assert found.kappa.isnan()
    assert found.keep.tolist() == plain.keep.tolist()


@pytest.mark.parametrize("floor", [0, 1, 9, 40])
@pytest.mark.parametrize("cameras", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_ranks_are_the_plain_selection(floor, cameras, seed):
    random = torch.Generator().manual_seed(seed)
    n = cameras * 40
    scores = torch.randint(-3, 4, (n,), generator=random).float()  # many ties
    # One camera is better than the others: the floors matter.
    scores[:40] += 4
    for odd in ("nan", "inf", "-inf"):
        scores[torch.randint(n, (3,), generator=random)] = float(odd)
    scores = scores.to(DEVICE)
    least = max(1, cameras * min(floor, 40))
    pi, ones = torch.arange(n, device=DEVICE), torch.ones(n, device=DEVICE)
    for k in {least, (least + n) // 2, n}:
        selection = Selection(k, floor, (40,) * cameras)
        keep, kappa = fused_pruner._choose(selection, scores, ones, pi, ones)
        assert keep.tolist() == select(selection, scores).tolist()
        assert kappa == pytest.approx(1.0, abs=1e-6)


def test_kappa_is_a_cosine_of_the_reference_carried_over():
    selection, zeros = Selection(1, 0, (2,)), torch.zeros(2, device=DEVICE)
    pi = torch.tensor([1, 1], device=DEVICE)
    seen, reference = torch.tensor([[3.0, 4.0], [9.0, -2.0]], device=DEVICE)
    _, kappa = fused_pruner._choose(selection, zeros, seen, pi, reference)
    assert float(kappa) == pytest.approx(-7 / (5 * 2**0.5))
    _, kappa = fused_pruner._choose(selection, zeros, zeros, pi, reference)
    assert float(kappa) == 0.0


def test_what_the_kernels_are_not_for_is_left_to_the_plain_functions():
    z, reference = tokens(1, 0.5, DEVICE, width=32, camera=40)
    ours = fused_pruner.correspond((30, 10), z, reference)
    assert torch.equal(ours, matching.correspond((30, 10), z, reference))
    p = small()
    for other in (
        replace(p, selection=replace(p.selection, tokens=(30, 18))),
        small(camera=MOST_KEYS // 2 + 8),
        replace(p, keys=p.keys.float()),
    ):
        assert torch.equal(other(fused_pruner.judge).early, other(judgement.judge).early)


@interpreted
@pytest.mark.parametrize("method", [name for name in METHODS if name.startswith("safe")])
def test_sessions_decide_alike(model, frames, method):
    settings = replace(METHODS[method], camera_floor=min(3, METHODS[method].camera_floor))
    ours = PolicySession(model, settings, runner=FusedPruner())
    theirs = PolicySession(model, settings)
    for t in range(len(frames)):
        a, b = frames.step(ours, t).decision, frames.step(theirs, t).decision
        assert a.reason == b.reason
        assert a.kappa == pytest.approx(b.kappa, abs=1e-5, nan_ok=True)
        assert (a.keep is None) == (b.keep is None)
        assert a.keep is None or a.keep.tolist() == b.keep.tolist()


@interpreted
@pytest.mark.parametrize("name", ["correspond", "judge"])
def test_a_fused_runner_runs_them(monkeypatch, frames, name):
    def refuse(*_):
        raise RuntimeError(name)

    monkeypatch.setattr(fused_pruner, name, refuse)
    model = random_policy(POLICY, "cpu", lambda _: torch.float32)
    session = PolicySession(model, SAFE, runner=FusedRunner(model))
    with pytest.raises(RuntimeError, match=name):
        frames.step(session, 0)
