"""The graph path is the eager one; what captures rely on is checked on the CPU too."""

from dataclasses import replace

import cuda_graph_checks as checks
import numpy as np
import pytest
import torch
from cuda_graph_checks import METHODS
from small_policy import Frames
from test_sessions import ReadBacks

from safe_pruner_node.engine.build import choose_runner, load_policy
from safe_pruner_node.engine.graphs import GraphRunner
from safe_pruner_node.engine.policy import PolicyEngine
from safe_pruner_node.engine.runner import EagerRunner
from safe_pruner_node.engine.session import PolicySession
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.pruning.settings import load_preset
from safe_pruner_node.types import PolicyInput

CPU = torch.device("cpu")
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@on_cuda
def test_cuda_graphs_are_the_eager_path():
    checks.check_small_policy()


@on_cuda
def test_cuda_graphs_of_nano_are_the_eager_path():
    checks.time_nano(steps=10)


def test_every_method_is_the_eager_one_and_is_captured_once(model, frames):
    _, first = checks.compare(model, frames, METHODS)  # to the bit
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
    assert new(pruned) == 5  # early; late and denoise of the keyframe and of the pruned step
    assert new(replace(pruned, gamma=-0.5, lambda_=0.4, camera_floor=0)) == 0
    assert new(METHODS["vanilla"]) == 0
    assert new(METHODS["random"]) == 0
    assert new(replace(pruned, rho=0.5)) == 2  # another K
    assert new(replace(pruned, deep=(2,))) == 1  # the keyframe's denoising
    assert new(replace(pruned, query_rows="action_probe")) == 5  # a probe, and what follows it
    assert new(pruned, prompt="another of that length") == 0
    assert new(pruned, Frames(n_text=9)) == 5  # vision is shared
    assert new(pruned, cameras=("head", "left_wrist")) == 6
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
    longer = Frames(n_text=9, seed=1)
    for t in range(6):
        for played, cameras in ((frames, 3), (longer, 3), (frames, 2), (longer, 1)):
            names = ("head", "left_wrist", "right_wrist")[:cameras]
            a, b = (played.step(session, t, cameras=names) for session in (ours, theirs))
            assert torch.equal(a.actions, b.actions)
            assert a.decision.reason == b.decision.reason


@pytest.mark.parametrize("method", ["safe", "safe, action probe"])
def test_sessions_that_share_captures_do_not_mix(model, frames, method):
    runner = GraphRunner(CPU)
    alone = PolicySession(model, METHODS[method])
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


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_stages_are_pure_and_stay_on_the_device(model, frames, settings):
    session = PolicySession(model, settings, runner=Examined())
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
    runner = GraphRunner(CPU)
    ours = PolicyEngine(checkpoint, tokenizer, safe, runner=runner)
    theirs = PolicyEngine(checkpoint, tokenizer, safe)
    ours.warm_up(lambda *_: None)
    warm = runner.captures
    random = np.random.default_rng(0)
    for t in range(3):
        images = {name: random.integers(0, 256, (90, 160, 3), np.uint8) for name in ("a", "b", "c")}
        for prompt in ("warm up", "pick up the red cube"):
            inputs = PolicyInput(images, np.zeros(16), prompt)
            (a, report), (b, eager) = ours.step(inputs), theirs.step(inputs)
            assert np.array_equal(a, b)
            assert list(report.stage_ms) == list(eager.stage_ms)
            assert report.engine == "graphs cpu fp32, 1 thread"
        ours.reset()
        theirs.reset()
        if t == 0:
            seen = runner.captures
    assert warm == 6
    assert runner.captures == seen  # a reset keeps them


def test_auto_takes_graphs_on_cuda_alone():
    assert choose_runner("auto", CPU).path == "eager"
    assert choose_runner("eager", torch.device("cuda")).path == "eager"


def _leaves(value):
    from safe_pruner_node.engine.graphs import _leaves

    return list(_leaves(value))
