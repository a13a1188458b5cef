"""What pruning must not change, and what it must: session against slow, masked references."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from slow_reference import PaddedForward, SlowSafe

from safe_pruner_node.pruning.settings import PrunerSettings

VANILLA = PrunerSettings(method="vanilla", rho=0.0)
SAFE = PrunerSettings(camera_floor=2, gamma=0.5)
MODES = ("text", "action_probe")
DEEP = (0, 4, 5)
TOLERANCE = 2e-5

modes = pytest.mark.parametrize("mode", MODES)


def play(session, frames, **identity):
    return [frames.step(session, t, **identity) for t in range(len(frames))]


def assert_same_actions(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.actions, b.actions, rtol=0, atol=TOLERANCE)


def test_vanilla_is_the_plain_model(session, frames, model):
    for t, step in enumerate(play(session(VANILLA), frames)):
        images = list(frames.images[t][:, None])
        plain = model.sample_actions(images, frames.tokens, frames.noise[t])
        torch.testing.assert_close(step.actions, plain, rtol=0, atol=TOLERANCE)
        assert step.decision.keep is None
        assert not step.decision.keyframe


@modes
@pytest.mark.parametrize("method", ["safe", "fastv", "random"])
def test_rho_0_equals_vanilla(session, frames, mode, method):
    settings = replace(SAFE, method=method, rho=0.0, gamma=-1.0, query_rows=mode)
    pruned = play(session(settings), frames)
    assert_same_actions(pruned, play(session(VANILLA), frames))
    gathered = [s.decision.keep for s in pruned if s.decision.keep is not None]
    assert len(gathered) >= len(frames) - 1  # the pruned path ran, with every token
    assert all(keep.tolist() == list(range(48)) for keep in gathered)


@modes
def test_gamma_above_1_equals_vanilla_every_step(session, frames, mode):
    steps = play(session(replace(SAFE, gamma=1.01, query_rows=mode)), frames)
    assert_same_actions(steps, play(session(VANILLA), frames))
    assert all(s.decision.keyframe for s in steps)
    assert [s.decision.reason for s in steps] == ["first"] + ["kappa"] * (len(frames) - 1)


@modes
def test_gamma_minus_1_gives_exactly_one_keyframe(session, frames, mode):
    steps = play(session(replace(SAFE, gamma=-1.0, query_rows=mode)), frames)
    assert [s.decision.keyframe for s in steps] == [True] + [False] * (len(frames) - 1)
    changed = [
        (a.actions - b.actions).abs().max()
        for a, b in zip(steps, play(session(VANILLA), frames), strict=True)
    ]
    assert changed[0] <= TOLERANCE  # the keyframe is a full step
    assert min(changed[1:]) > 1e-3  # pruning is no no-op in this model


@modes
def test_the_same_frame_again_has_kappa_1_and_the_identity_as_match(session, frames, mode):
    safe = session(replace(SAFE, query_rows=mode))
    first = frames.step(safe, 0)
    again = frames.step(safe, 0)
    assert first.decision.reason == "first"
    assert again.decision.kappa == pytest.approx(1.0, abs=1e-6)
    assert safe.pruner._shown.pi.tolist() == list(range(48))


@modes
def test_lambda_0_is_fastv_with_the_same_rows(session, frames, mode):
    settings = replace(SAFE, lambda_=0.0, gamma=-1.0, query_rows=mode)
    safe = play(session(settings), frames)
    fastv = play(session(replace(settings, method="fastv")), frames)
    forecast = play(session(replace(settings, lambda_=0.5)), frames)
    for a, b in zip(safe[1:], fastv[1:], strict=True):  # FastV has no keyframe
        assert a.decision.keep.tolist() == b.decision.keep.tolist()
        torch.testing.assert_close(a.actions, b.actions, rtol=0, atol=0)
    assert any(
        a.decision.keep.tolist() != b.decision.keep.tolist()
        for a, b in zip(safe[1:], forecast[1:], strict=True)
    )


@modes
def test_gather_equals_masking_and_trimmed_equals_padded(session, frames, model, mode):
    """Against a padded forward in which pruned tokens are computed but never seen."""
    safe = session(replace(SAFE, gamma=-1.0, query_rows=mode))
    for t in range(3):
        step = frames.step(safe, t)
        padded = PaddedForward(model, frames.padded(t), 3, 3)
        assert padded.prefix_len == 48 + frames.n_text < padded.x.shape[1]
        masked, _ = padded.late(step.decision.keep, DEEP)
        torch.testing.assert_close(step.actions, masked, rtol=0, atol=TOLERANCE)


@modes
def test_suffix_positions_keep_the_unpruned_offset(session, frames, model, mode):
    safe = session(replace(SAFE, gamma=-1.0, query_rows=mode))
    frames.step(safe, 0)
    step = frames.step(safe, 1)
    keep = step.decision.keep
    padded = PaddedForward(model, frames.padded(1), 3, 3)
    right, _ = padded.late(keep, DEEP)
    wrong, _ = padded.late(keep, DEEP, offset=len(keep) + frames.n_text)
    torch.testing.assert_close(step.actions, right, rtol=0, atol=TOLERANCE)
    assert (step.actions - wrong).abs().max() > 1e-3


@modes
@pytest.mark.parametrize(
    ("within_camera", "floor"), [(False, 0), (True, 2)], ids=["paper", "robot"]
)
def test_a_session_takes_the_decisions_of_the_papers_algorithms(
    session, frames, model, mode, within_camera, floor
):
    """Algorithms 1 and 2 in loops on padded, masked forwards: same keyframes, tokens, actions."""
    settings = replace(SAFE, match_within_camera=within_camera, camera_floor=floor, query_rows=mode)
    probe = session(replace(settings, gamma=-1.0))
    kappas = [s.decision.kappa for s in play(probe, frames)][1:]
    gamma = (sorted(kappas)[2] + sorted(kappas)[3]) / 2  # so that some steps fall below it
    slow = SlowSafe(
        rho=settings.rho,
        lambda_=settings.lambda_,
        gamma=gamma,
        within_camera=within_camera,
        floor=floor,
        per_camera=16,
    )
    seen = set()
    for t, step in enumerate(play(session(replace(settings, gamma=gamma)), frames)):
        padded = PaddedForward(model, frames.padded(t), 3, 3)
        early = padded.early(mode)
        keyframe, kappa, keep = slow.decide(padded.z, early)
        actions, deep = padded.late(keep, DEEP)
        if keyframe:
            slow.refresh(padded.z, early, deep)
        assert step.decision.keyframe == keyframe
        assert step.decision.kappa == pytest.approx(kappa, abs=1e-5, nan_ok=True)
        kept = step.decision.keep
        assert (None if kept is None else kept.tolist()) == keep
        torch.testing.assert_close(step.actions, actions, rtol=0, atol=TOLERANCE)
        seen.add(step.decision.reason)
    assert seen == {"first", "kappa", ""}


@pytest.mark.parametrize("steps", ["mean", "first", "last"])
@modes
def test_deep_saliency_is_that_of_the_chosen_denoise_steps(session, frames, model, mode, steps):
    safe = session(replace(SAFE, denoise_steps=steps, query_rows=mode))
    frames.step(safe, 0)
    padded = PaddedForward(model, frames.padded(0), 3, 3)
    padded.steps = 3
    maps = []
    run = padded.expert_pass

    def record(x_t, time, cache, masks, seen, start):
        v_t = run(x_t, time, cache, masks, seen, start)
        maps.append([seen[layer] for layer in DEEP])
        return v_t

    padded.expert_pass = record
    padded.late(None, DEEP)
    expected = {"mean": np.mean(maps, 0), "first": maps[0], "last": maps[-1]}[steps]
    np.testing.assert_allclose(safe.pruner.reference.deep.numpy(), expected, atol=1e-6)
