"""What is rehearsed at configure is what the steps need, and nothing is captured after it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_pruner_node.engine.build import load_policy
from safe_pruner_node.engine.graphs import GraphRunner
from safe_pruner_node.engine.policy import PolicyEngine
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.engine.warm_up import TYPICAL_PROMPT, prompt_lengths, prompt_sizes
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.tokenizer import PromptTokenizer, discretize
from safe_pruner_node.pruning.settings import PrunerSettings, load_preset
from safe_pruner_node.types import PolicyInput

SAFE = load_preset(None, "robot")
PROMPT = "pick up the red cube"
LONG = " ".join([PROMPT] * 4)


class DigitByDigit(PromptTokenizer):
    """As PaliGemma's, which has no pieces for whole numbers: the state moves the length."""

    def encode(self, prompt, state):
        bins = "" if state is None else " ".join(map(str, discretize(state)))
        text = f"Task: {prompt}, State: {bins};\nAction: "
        return np.array([ord(c) for c in text][: self.max_tokens])


@pytest.fixture(scope="module")
def policy(small_checkpoint):
    checkpoint, tokenizer = load_policy(EngineSettings(small_checkpoint, device="cpu", threads=1))
    return checkpoint, DigitByDigit(tokenizer.model_path, 200)


@pytest.fixture
def engine(policy):
    return PolicyEngine(*policy, SAFE, runner=GraphRunner(torch.device("cpu")))


def view(t, cameras=2, prompt=PROMPT, lowest=-1.5):
    random = np.random.default_rng(t)
    images = {str(i): random.integers(0, 256, (90, 160, 3), np.uint8) for i in range(cameras)}
    return PolicyInput(images, random.uniform(lowest, 1.5, 16), prompt)


def warm_up(engine, progress=lambda *_: None):
    """As the worker does it: only a step knows the cameras' resolution."""
    engine.warm_up(progress, prompt=PROMPT, cameras=2)
    engine.step(view(0))
    engine.reset()


def test_what_the_runner_notes_is_said_before_anything_is_captured(engine):
    told = []
    engine._session.runner.notes = ("flow: slowly", "for want of a GPU")
    engine.warm_up(lambda text, _: told.append(text), prompt=PROMPT, cameras=2)
    assert told[:2] == ["flow: slowly", "for want of a GPU"]
    assert told[2].startswith("capturing 1/4")


def test_every_step_after_it_finds_its_captures(engine):
    told = []
    warm_up(engine, lambda *line: told.append(line))
    runner = engine._session.runner
    warm = runner.captures
    kinds, sizes = set(), set()
    for gamma in (SAFE.gamma, 1.01, -1.0):
        engine.set_pruner(replace(SAFE, gamma=gamma))
        for t in range(8):
            _, report = engine.step(view(t, lowest=-1.5 if t % 4 else 0.0))
            assert "capture" not in report.stage_ms
            kinds.add(report.keyframe)
            sizes.add(-(-report.text_tokens // 32) * 32)
    assert kinds == {True, False}
    assert sizes == {96, 128}
    assert runner.captures == warm
    texts, fractions = zip(*told, strict=True)
    assert texts == (
        "capturing 1/4: keyframe, 128 prompt tokens",
        "capturing 2/4: pruned step, 128 prompt tokens",
        "capturing 3/4: keyframe, 96 prompt tokens",
        "capturing 4/4: pruned step, 96 prompt tokens",
        "warm",
    )
    assert list(fractions) == sorted(fractions)
    assert told[-1] == ("warm", 1.0)


def test_a_new_bucket_is_captured_once_and_said(engine):
    engine.warm_up(lambda *_: None, prompt=PROMPT, cameras=2)
    engine.step(view(0))
    _, first = engine.step(view(1, prompt=LONG))
    engine.reset()
    _, again = engine.step(view(2, prompt=LONG))
    assert first.stage_ms["capture"] > 0.0
    assert min(first.stage_ms.values()) >= 0.0  # taken out of the stages it happened in
    assert "capture" not in again.stage_ms


def test_another_prompt_is_captured_when_it_is_set_and_only_once(engine):
    warm_up(engine)
    told = []
    for prompt, expected in ((LONG, 2), (PROMPT, 0), (LONG, 0)):
        told.clear()
        engine.set_prompt(prompt, lambda *line: told.append(line))
        assert len(told) >= expected
        assert bool(told) == bool(expected)
        for t in range(3):
            assert "capture" not in engine.step(view(t, prompt=prompt))[1].stage_ms


def test_another_prompt_does_not_begin_a_new_session(engine):
    warm_up(engine)
    engine.step(view(0))
    engine.set_prompt(LONG, lambda *_: None)
    _, report = engine.step(view(1))
    assert report.query == 1
    assert not report.keyframe


def test_a_prompt_before_anything_is_warm_costs_nothing(engine):
    engine.set_prompt(LONG, lambda *_: pytest.fail("nothing is to be captured yet"))
    assert engine._session.runner.captures == 0


def test_another_resolution_costs_the_resize_alone(engine):
    """And is said; the model's stages see what they saw."""
    warm_up(engine)
    captures = engine._session.runner.captures
    larger = {name: image.repeat(2, 0).repeat(2, 1) for name, image in view(1).images.items()}
    _, first = engine.step(replace(view(1), images=larger))
    assert first.stage_ms["capture"] > 0.0
    assert engine._session.runner.captures == captures + 1
    assert "capture" not in engine.step(replace(view(2), images=larger))[1].stage_ms


def test_another_method_is_captured_when_it_is_set(engine):
    warm_up(engine)
    others = [
        replace(SAFE, rho=0.5),
        replace(SAFE, query_rows="action_probe"),
        PrunerSettings(method="vanilla", rho=0.0),
        replace(SAFE, method="fastv"),
        replace(SAFE, method="random"),
    ]
    for settings_ in others:
        engine.set_pruner(settings_)
        for t in range(3):
            assert "capture" not in engine.step(view(t))[1].stage_ms


def test_a_method_that_does_not_fit_the_cameras_is_refused_and_the_old_one_stays(engine):
    engine.warm_up(lambda *_: None, prompt=PROMPT, cameras=2)
    with pytest.raises(ConfigError, match=r"camera_floor: found 40, expected at most 16"):
        engine.set_pruner(replace(SAFE, camera_floor=40))
    assert engine.step(view(0))[1].rho == SAFE.rho


def test_a_prompt_nobody_knows_yet_is_said(engine):
    told = []
    engine.warm_up(lambda text, _: told.append(text))
    assert told[0] == f"no prompt yet: warming up for one as long as '{TYPICAL_PROMPT}'"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1.5, 1.5), min_size=16, max_size=16))
def test_no_state_makes_a_prompt_shorter_or_longer_than_said(policy, state):
    _, tokenizer = policy
    shortest, longest = prompt_lengths(tokenizer, PROMPT, 16)
    assert shortest <= len(tokenizer.encode(PROMPT, np.array(state))) <= longest
    untold = len(tokenizer.encode(PROMPT, None))
    assert prompt_lengths(tokenizer, PROMPT, None) == (untold, untold) < (shortest, longest)


@given(st.integers(1, 200), st.integers(0, 100), st.integers(1, 64))
def test_sizes_hold_every_length_and_no_more(shortest, span, bucket):
    sizes = prompt_sizes(shortest, shortest + span, bucket)
    needed = {-(-n // bucket) * bucket for n in range(shortest, shortest + span + 1)}
    assert list(sizes) == sorted(needed, reverse=True)
    assert prompt_sizes(shortest, shortest + span, None) == (shortest + span,)
