"""Engines that misbehave on request, for the fault tests. No torch: they spawn in 0.3 s."""

from __future__ import annotations

import os
import signal
import time

import numpy as np

from safe_pruner_node.engine.base import Engine
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.types import Flops, StepReport

TOKENS = 256
IMAGE_SIDE = 224
KEPT = np.arange(0, TOKENS, 4)


class FakeEngine(Engine):
    """Answers every step with the state it was given; the prompt says how to misbehave."""

    def __init__(self, settings):
        self.settings = settings
        self.pruner = settings.pruner
        self.query = 0
        self.prompt = ""

    def step(self, inputs, noise=None):  # noqa: ARG002
        word, _, argument = inputs.prompt.partition(" ")
        if word == "hang":
            time.sleep(1000)
        elif word == "sleep":
            time.sleep(float(argument))
        elif word == "raise":
            raise RuntimeError("the engine\nbroke")
        elif word == "memory":
            raise MemoryError("no more")
        elif word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif word == "refuse":
            raise ConfigError("observation", "prompt", "refuse", "another prompt")
        self.query += 1
        cameras = list(inputs.images)
        report = StepReport(
            pruner=self.pruner.method,
            query=self.query,
            keyframe=False,
            keyframe_reason="",
            kappa=1.0,
            gamma=self.pruner.gamma,
            rho=self.pruner.rho,
            visual_tokens=dict.fromkeys(cameras, TOKENS),
            kept_tokens=dict.fromkeys(cameras, len(KEPT)),
            kept_indices=dict.fromkeys(cameras, KEPT),
            text_tokens=10,
            flops=Flops(1.0, 1.0, 1.0),
            engine=f"fake, ready for {self.prompt!r}",
            stage_ms={"model": 0.0},
        )
        return np.tile(inputs.state, (50, 1)), report

    def reset(self):
        self.query = 0

    def set_pruner(self, settings):
        settings.check_depth(10)
        self.pruner = settings

    def set_prompt(self, prompt, progress):
        word, _, argument = prompt.partition(" ")
        progress(f"making ready for {prompt!r}", 1.0)
        if word == "slow":
            time.sleep(float(argument))
        elif word == "refuse":
            raise ConfigError("observation", "prompt", "refuse", "another prompt")
        self.prompt = prompt

    @property
    def image_side(self):
        return IMAGE_SIDE

    def describe(self):
        return "fake"

    def warm_up(self, progress, *, prompt="", cameras=3):
        progress(f"warming up: {prompt!r}, {cameras} cameras", 1.0)


def good(settings):
    return FakeEngine(settings)


def misconfigured(settings):
    raise ConfigError(settings.checkpoint, "norm_stats", "7 numbers", "16")


def wordy(settings):
    missing = ", ".join(f"key.{i}" for i in range(100_000))
    raise ConfigError(settings.checkpoint, "missing keys", missing, "none missing")


def broken(settings):  # noqa: ARG001
    raise OSError("no such device")


def hangs_at_start(settings):  # noqa: ARG001
    time.sleep(1000)


def dies_once(settings):
    """Dies in the first life, works in the second: the checkpoint folder remembers."""
    mark = settings.checkpoint / "died"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return FakeEngine(settings)
