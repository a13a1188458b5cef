"""The graph path is the eager one; what captures rely on is checked on the CPU too."""

from dataclasses import replace

import cuda_graph_checks as checks
import numpy as np
import pytest
import torch
from cuda_graph_checks import METHODS, Unpadded
from small_policy import Frames
from test_sessions import ReadBacks

from safe_pruner_node.engine.build import check_path, choose_runner, load_policy
from safe_pruner_node.engine.graphs import GraphRunner
from safe_pruner_node.engine.policy import PolicyEngine
from safe_pruner_node.engine.runner import EagerRunner
from safe_pruner_node.engine.session import PolicySession
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pruning.settings import load_preset
from safe_pruner_node.pruning.unchanging import snapshot
from safe_pruner_node.types import PolicyInput

PADDED = 1e-5
"""Of the greatest action: sums over a padded prompt run in another order."""
CPU = torch.device("cpu")
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@on_cuda
def test_cuda_graphs_are_the_eager_path():
    checks.check_small_policy()


@on_cuda
def test_cuda_graphs_of_nano_are_the_eager_path():
    checks.time_nano(steps=10)


def test_every_method_is_the_eager_one_and_is_captured_once(model, frames):
    checks.compare(model, frames, METHODS, runner=Unpadded(CPU))  # to the bit
    _, first = checks.compare(model, frames, METHODS, PADDED)
    once = GraphRunner(CPU)
    session = PolicySession(model, METHODS["vanilla"], runner=once)
    for settings in METHODS.values():
        session.set_pruner(settings)
        for t in range(len(frames)):
            frames.step(session, t)
    assert first.captures == once.captures  # there every method was played twice


def test_what_captures_depend_on(model, frames):
    runner = GraphRunner(CPU)
    session = PolicySession(model, METHODS["vanilla"], runner=runner)

    def new(settings, frames=frames, **step):
        before = runner.captures
        session.set_pruner(settings)
        for t in (0, 1):
            frames.step(session, t, **step)
        return runner.captures - before

    pruned = replace(METHODS["safe"], gamma=-1.0)
    assert new(METHODS["vanilla"]) == 3  # vision, prefill, denoise
    # Match, early, judge; late and denoise of the keyframe and of the pruned step.
    assert new(pruned) == 7
    assert new(replace(pruned, gamma=-0.5, max_age=7)) == 0
    assert new(METHODS["vanilla"]) == 0
    assert new(METHODS["random"]) == 3  # no matching before: early, late, denoise
    assert new(replace(pruned, rho=0.5)) == 5  # another K: from the judgement on
    assert new(replace(pruned, deep=(2,))) == 5
    assert new(replace(pruned, query_rows="action_probe")) == 6  # a probe, and what follows it
    assert new(pruned, prompt="another of that length") == 0
    assert new(pruned, Frames(n_text=9)) == 0  # the same bucket
    assert new(pruned, Frames(n_text=33)) == 6  # vision and matching are shared
    assert new(pruned, cameras=("head", "left_wrist")) == 8
    other = PolicySession(model, pruned, runner=runner)  # as the rehearsal of a warm-up
    frames.step(other, 0)
    before = runner.captures
    session.set_flow_steps(2)
    assert new(METHODS["vanilla"]) == 1
    session.set_flow_steps(3)
    assert new(pruned) == 0
    assert runner.captures == before + 1


@pytest.mark.parametrize("method", ["vanilla", "safe", "safe, action probe"])
def test_other_prompt_lengths_and_cameras_in_between(model, frames, method):
    ours = PolicySession(model, METHODS[method], runner=GraphRunner(CPU))
    theirs = PolicySession(model, METHODS[method])
    longer = Frames(n_text=35, seed=1)  # another bucket
    for t in range(6):
        for played, cameras in ((frames, 3), (longer, 3), (frames, 2), (longer, 1)):
            names = ("head", "left_wrist", "right_wrist")[:cameras]
            a, b = (played.step(session, t, cameras=names) for session in (ours, theirs))
            scale = float(b.actions.abs().max())
            torch.testing.assert_close(a.actions, b.actions, rtol=0, atol=PADDED * scale)
            assert a.decision.reason == b.decision.reason


@pytest.mark.parametrize("method", ["safe", "safe, action probe"])
def test_sessions_that_share_captures_do_not_mix(model, frames, method):
    runner = GraphRunner(CPU)
    alone = PolicySession(model, METHODS[method], runner=GraphRunner(CPU))
    ours, stranger = (PolicySession(model, METHODS[method], runner=runner) for _ in range(2))
    for t in range(len(frames)):
        a, b = frames.step(ours, t), frames.step(alone, t)
        frames.step(stranger, len(frames) - 1 - t)
        assert torch.equal(a.actions, b.actions)
        assert (a.decision.keep is None) == a.decision.keyframe


class Examined(EagerRunner):
    """Refuses stages that a capture would not take, or that change what they are given."""

    def run(self, stage, fixed, *inputs):
        leaves = [leaf for leaf in _leaves(inputs) if isinstance(leaf, torch.Tensor)]
        before = [leaf.clone() for leaf in leaves]
        with ReadBacks() as read, FromTheHost() as made:
            result = super().run(stage, fixed, *inputs)
        assert (read.names, made.names) == ([], []), stage
        assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True)), stage
        return result


class FromTheHost(ReadBacks):
    """Lists the calls that make a tensor of Python's numbers."""

    NAMES = frozenset(["tensor", "as_tensor", "from_numpy", "asarray", "scalar_tensor"])


@pytest.mark.parametrize("bucket", [None, 32])
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_stages_are_pure_and_stay_on_the_device(model, frames, settings, bucket):
    runner = Examined()
    runner.prompt_bucket = bucket
    session = PolicySession(model, settings, runner=runner)
    for t in range(4):
        frames.step(session, t)


def double(x):
    return x * 2


def add(extra, x, y):
    return x + y + extra


def test_runner_copies_inputs_in_and_writes_one_result():
    runner = GraphRunner(CPU)
    x = torch.ones(3)
    doubled = runner.run(double, (), x)
    x.fill_(9.0)
    total = runner.run(add, (1,), doubled, x)
    assert total.tolist() == [12.0] * 3  # the first result did not follow x
    again = runner.run(double, (), torch.zeros(3))
    assert again is doubled  # the same memory, written anew
    assert runner.run(add, (1,), again, torch.zeros(3)) is total
    assert total.tolist() == [1.0] * 3
    assert x.tolist() == [9.0] * 3  # no buffer of ours
    assert runner.captures == 2
    runner.run(double, (), x)
    swapped = runner.run(add, (1,), x, again)
    assert swapped is not total
    assert (swapped.tolist(), again.tolist()) == ([28.0] * 3, [18.0] * 3)
    runner.run(double, (), torch.ones(4))
    runner.run(double, (), torch.ones(3).double())
    assert runner.captures == 5


def layers(x):
    return [(x + 1, x * 10), (x + 2, x * 20)]


def total(cache, y):
    return sum(a + b for a, b in cache) + y


def test_a_result_of_many_tensors_may_be_given_on_whole_or_in_parts():
    runner = GraphRunner(CPU)
    cache = runner.run(layers, (), torch.ones(2))
    whole = runner.run(total, (), cache, torch.zeros(2))
    assert whole.tolist() == [35.0] * 2
    runner.run(layers, (), torch.full((2,), 2.0))
    assert runner.run(total, (), cache, torch.ones(2)) is whole
    assert whole.tolist() == [68.0] * 2  # what is in the result now
    assert runner.captures == 2
    parts = runner.run(total, (), list(cache), torch.ones(2))
    assert parts.tolist() == [68.0] * 2
    assert runner.captures == 3


def test_what_nobody_writes_is_brought_once():
    runner = GraphRunner(CPU)
    kept, other = snapshot(torch.ones(3)), snapshot(torch.full((3,), 4.0))
    runner.run(double, (), torch.zeros(3))
    assert runner.run(double, (), kept).tolist() == [2.0] * 3
    kept.fill_(5.0)  # against the rules, to see whether it is read
    assert runner.run(double, (), kept).tolist() == [2.0] * 3
    assert runner.run(double, (), other).tolist() == [8.0] * 3
    assert runner.run(double, (), kept).tolist() == [10.0] * 3
    assert runner.run(double, (), torch.zeros(3)).tolist() == [0.0] * 3
    assert runner.run(double, (), kept).tolist() == [10.0] * 3
    assert runner.captures == 1


@pytest.mark.parametrize("method", ["safe", "safe, action probe"])
@torch.inference_mode()
def test_a_keyframe_is_brought_once(model, frames, method):
    session = PolicySession(
        model, replace(METHODS[method], gamma=-1.0, max_age=None), runner=GraphRunner(CPU)
    )
    for t in range(3):  # captured, and then brought
        frames.step(session, t)
    expected = frames.step(session, 3).actions
    reference = session.pruner.reference
    for tensor in (reference.z, reference.early, reference.deep):
        tensor.fill_(float("nan"))  # against the rules, to see whether it is read
    assert torch.equal(frames.step(session, 3).actions, expected)


def test_what_ran_before_in_a_step_is_part_of_a_kind():
    """Else a stage captured without one before it might share memory with that one's result."""
    runner = GraphRunner(CPU)
    x = torch.ones(3)

    def step(*, between):
        doubled = runner.run(double, (), x)
        y = runner.run(add, (1,), doubled, doubled) if between else None
        return runner.run(add, (5,), doubled, x), y

    straight, _ = step(between=False)
    detour, _ = step(between=True)
    assert detour is not straight
    assert step(between=False)[0] is straight
    assert step(between=True)[0] is detour


def test_engine_on_graphs(small_checkpoint):
    safe = replace(load_preset(None, "robot"), gamma=-1.0)
    settings = EngineSettings(small_checkpoint, device="cpu", threads=1, pruner=safe)
    checkpoint, tokenizer = load_policy(settings)
    ours = PolicyEngine(checkpoint, tokenizer, safe, runner=GraphRunner(CPU))
    theirs = PolicyEngine(checkpoint, tokenizer, safe)
    ours.warm_up(lambda *_: None, prompt="pick up the red cube")
    random = np.random.default_rng(0)
    for t in range(4):
        images = {name: random.integers(0, 256, (90, 160, 3), np.uint8) for name in ("a", "b", "c")}
        inputs = PolicyInput(images, random.uniform(-1, 1, 16), "pick up the red cube")
        if t == 0:  # the resolution of the images is new
            assert ours.step(inputs)[1].stage_ms["capture"] > 0.0
            ours.reset()
            theirs.step(inputs)
            theirs.reset()
            continue
        (a, report), (b, eager) = ours.step(inputs), theirs.step(inputs)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
        assert list(report.stage_ms) == list(eager.stage_ms)
        assert report.text_tokens == eager.text_tokens
        assert report.engine == "graphs cpu fp32, 1 thread"


def test_graphs_are_for_cuda_alone(model):
    assert choose_runner("auto", model).path == "eager"
    assert choose_runner("eager", model).path == "eager"
    for path in ("graphs", "fused"):
        with pytest.raises(ConfigError, match=rf"path: found {path}, on device cpu"):
            check_path(path, CPU)
    check_path("graphs", torch.device("cuda"))


def _leaves(value):
    from safe_pruner_node.engine.graphs import _leaves

    return list(_leaves(value))
