"""When a keyframe is forced, and that sessions do not know of each other."""

from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from safe_pruner_node.engine.session import PolicySession
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.checkpoint import mixed_dtype
from safe_pruner_node.pruning.settings import PrunerSettings

SAFE = PrunerSettings(camera_floor=2, gamma=-1.0)
modes = pytest.mark.parametrize("mode", ["text", "action_probe"])


@modes
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": "put it down"}, "prompt"),
        ({"cameras": ("head", "left_wrist")}, "cameras"),
        ({"cameras": ("head", "right_wrist", "left_wrist")}, "cameras"),
        ({"resolution": (112, 56)}, "resolution"),
        ({"checkpoint": "b"}, "checkpoint"),
    ],
)
def test_another_scene_forces_a_keyframe_and_is_then_the_reference(
    session, frames, mode, change, reason
):
    safe = session(replace(SAFE, query_rows=mode))
    frames.step(safe, 0)
    assert not frames.step(safe, 1).decision.keyframe
    changed = frames.step(safe, 2, **change)
    assert (changed.decision.keyframe, changed.decision.reason) == (True, reason)
    assert not frames.step(safe, 2, **change).decision.keyframe
    assert frames.step(safe, 2).decision.reason == reason  # and back


@modes
def test_reset_gives_a_keyframe_and_restarts_the_count(session, frames, mode):
    safe = session(replace(SAFE, query_rows=mode))
    first = frames.step(safe, 0)
    frames.step(safe, 1)
    safe.reset()
    again = frames.step(safe, 0)
    assert (again.decision.reason, again.query) == ("first", 0)
    torch.testing.assert_close(again.actions, first.actions, rtol=0, atol=0)


@modes
def test_maximum_age_counts_policy_queries(session, frames, mode):
    safe = session(replace(SAFE, max_age=3, query_rows=mode))
    reasons = [frames.step(safe, t).decision.reason for t in range(8)]
    assert reasons == ["first", "", "", "age", "", "", "age", ""]


@modes
def test_fixed_division_ignores_kappa(session, frames, mode):
    safe = session(replace(SAFE, division="fixed", interval=4, gamma=1.01, query_rows=mode))
    steps = [frames.step(safe, t).decision for t in range(8)]
    assert [s.reason for s in steps] == ["first", "", "", "", "interval", "", "", ""]
    assert all(-1.0 <= s.kappa <= 1.0 for s in steps[1:])  # reported all the same


@modes
def test_two_sessions_on_one_model_do_not_mix(model, frames, mode):
    settings = replace(SAFE, query_rows=mode)
    alone = PolicySession(model, settings)
    expected = [frames.step(alone, t) for t in range(4)]
    one, other = PolicySession(model, settings), PolicySession(model, settings)
    for t in range(4):
        step = frames.step(one, t)
        torch.testing.assert_close(step.actions, expected[t].actions, rtol=0, atol=0)
        stranger = frames.step(other, 7 - t)
        assert stranger.decision.reason == ("first" if t == 0 else "")
        if t == 2:
            other.reset()
            frames.step(other, 5)


def test_nan_saliency_is_a_keyframe_not_a_pruned_step(session, frames):
    safe = session(SAFE)
    frames.step(safe, 0)
    with torch.inference_mode():
        safe.pruner.reference.early.fill_(float("nan"))
    assert frames.step(safe, 1).decision.reason == "kappa"


class ReadBacks(TorchFunctionMode):
    """Lists the calls that bring a tensor's value to Python or make a size depend on it."""

    NAMES = frozenset(
        [
            "__float__",
            "__int__",
            "__bool__",
            "__index__",
            "item",
            "tolist",
            "numpy",
            "cpu",
            "nonzero",
            "masked_select",
        ]
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if (name := getattr(function, "__name__", "")) in self.NAMES:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@modes
def test_kappa_is_the_only_value_read_back_in_a_step(session, frames, mode):
    safe = session(replace(SAFE, query_rows=mode))
    frames.step(safe, 0)
    with ReadBacks() as pruned:
        assert not frames.step(safe, 1).decision.keyframe
    safe.set_pruner(PrunerSettings(method="vanilla", rho=0.0))
    with ReadBacks() as vanilla:
        frames.step(safe, 1)
    assert (pruned.names, vanilla.names) == (["__float__"], [])


def test_changing_the_pruner_begins_a_session_and_a_bad_one_changes_nothing(session, frames):
    safe = session(SAFE)
    frames.step(safe, 0)
    with pytest.raises(ConfigError, match=r"robot\.layer: found 6, expected 1\.\.5"):
        safe.set_pruner(replace(SAFE, layer=6))
    assert frames.step(safe, 1).decision.reason == ""
    safe.set_pruner(replace(SAFE, rho=0.5))
    step = frames.step(safe, 1)
    assert (step.query, step.decision.reason) == (0, "first")
    assert len(frames.step(safe, 2).decision.keep) == 24


def test_floors_that_exceed_k_are_refused(session, frames):
    safe = session(replace(SAFE, rho=0.75, camera_floor=5))
    message = r"robot\.camera_floor: found 5, expected at most 4: 12 tokens are kept over 3"
    with pytest.raises(ConfigError, match=message):
        frames.step(safe, 0)
    safe.set_pruner(replace(SAFE, rho=0.75, camera_floor=4))
    frames.step(safe, 0)
    keep = frames.step(safe, 1).decision.keep
    assert [int((keep // 16 == camera).sum()) for camera in range(3)] == [4, 4, 4]


@modes
def test_runs_in_openpis_mixed_bf16(model, frames, mode):
    mixed = PolicySession(model, SAFE).model.__class__(model.config).eval()
    mixed.load_state_dict(model.state_dict())
    for name, parameter in mixed.named_parameters():
        parameter.data = parameter.data.to(mixed_dtype(name))
    safe = PolicySession(mixed, replace(SAFE, query_rows=mode))
    exact = PolicySession(model, replace(SAFE, query_rows=mode))
    for t in range(3):
        ours, theirs = frames.step(safe, t), frames.step(exact, t)
        assert ours.decision.reason == theirs.decision.reason
        assert ours.actions.dtype == torch.float32
        scale = theirs.actions.abs().mean()
        assert (ours.actions - theirs.actions).abs().mean() < 0.5 * scale
    reference = safe.pruner.reference
    assert reference.deep.dtype == reference.early.dtype == torch.float32
