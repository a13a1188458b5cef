"""The engine: observation in, chunk and report out, around one session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safe_pruner_node.engine import stages
from safe_pruner_node.engine.base import Engine, Progress
from safe_pruner_node.engine.fp8 import is_fp8
from safe_pruner_node.engine.nvjpeg import NvJpeg
from safe_pruner_node.engine.report import step_report
from safe_pruner_node.engine.runner import Runner
from safe_pruner_node.engine.session import PolicySession, SessionStep, camera_context
from safe_pruner_node.engine.staging import Staging
from safe_pruner_node.engine.timing import StageTimer
from safe_pruner_node.engine.warm_up import (
    TYPICAL_PROMPT,
    prompt_lengths,
    prompt_sizes,
    rehearsal,
    step_kinds,
)
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.checkpoint import Checkpoint
from safe_pruner_node.pi05.model import Pi05
from safe_pruner_node.pi05.tokenizer import PromptTokenizer
from safe_pruner_node.pi05.transforms import NormStats
from safe_pruner_node.pruning.settings import PrunerSettings
from safe_pruner_node.types import DeviceImage, FloatArray, PolicyInput, RgbImage, StepReport


@dataclass(frozen=True)
class _Expected:
    """What the next steps will most likely bring: what the last warm-up or step did."""

    prompt: str
    cameras: int


class PolicyEngine(Engine):
    """π0.5 with a pruner on one device.

    Args:
        checkpoint: The loaded checkpoint; it needs its normalisation statistics.
        tokenizer: Its tokenizer.
        pruner: The method of the first session.
        flow_steps: Euler steps; None takes the checkpoint's.
        seed: Seed of the denoise noise.
        state_in_prompt: True writes the discretised state into the prompt.
        runner: Runs the model's stages; None runs them eagerly.
        decoder: Decodes JPEGs into the device's memory; None takes decoded images only.

    Raises:
        ConfigError: The checkpoint has no statistics, or the pruner does not fit the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: PromptTokenizer,
        pruner: PrunerSettings,
        *,
        flow_steps: int | None = None,
        seed: int = 0,
        state_in_prompt: bool = True,
        runner: Runner | None = None,
        decoder: NvJpeg | None = None,
    ) -> None:
        if checkpoint.norm_stats is None:
            raise ConfigError(checkpoint.stats_path, "", "no such file", "the policy's statistics")
        self._checkpoint = checkpoint
        self._stats: NormStats = checkpoint.norm_stats
        self._tokenizer = tokenizer
        self._session = PolicySession(checkpoint.model, pruner, flow_steps, runner)
        self._staging = Staging(checkpoint.model.device)
        self._decoder = decoder
        self._seed = seed
        self._state_in_prompt = state_in_prompt
        self._episode = 0
        self._expected: _Expected | None = None
        self._rehearsed: set[tuple[PrunerSettings, int, int, int]] = set()
        # Once: to look through a model's layers takes longer than a stage.
        self._description = _describe(checkpoint.model, self._session.runner)

    def step(
        self, inputs: PolicyInput, noise: NDArray[np.float64] | None = None
    ) -> tuple[FloatArray, StepReport]:
        """Run one policy query; see `Engine.step`."""
        self._check(inputs)
        if self._expected is not None:
            self._expected = _Expected(inputs.prompt, len(inputs.images))
        config = self._checkpoint.config
        if noise is not None and noise.shape != (config.horizon, config.action_dim):
            expected = f"[{config.horizon}, {config.action_dim}]"
            raise ConfigError("noise", "shape", list(noise.shape), expected)
        return self._run(self._session, inputs, noise)

    def _run(
        self, session: PolicySession, inputs: PolicyInput, noise: NDArray[np.float64] | None
    ) -> tuple[FloatArray, StepReport]:
        config, device = self._checkpoint.config, self._checkpoint.model.device
        runner, timer = session.runner, StageTimer(device)
        with timer.stage("resize", runner):
            images = enumerate(inputs.images.values())
            pixels = [self._on_device(camera, image) for camera, image in images]
            fixed = (self.image_side, self._checkpoint.origin)
            batch = runner.run(stages.fit, fixed, pixels)  # [C, 3, S, S]
        # A view is no stage's result to the runner: what follows does not depend on the cameras'
        # resolution, and need not be captured again for another one.
        z = session.see(batch.view_as(batch), timer)
        # Only now, because a GPU is busy seeing while this is made ready.
        with timer.stage("tokenize"):
            state = self._stats.normalize_state(inputs.state) if self._state_in_prompt else None
            tokens = torch.from_numpy(self._tokenizer.encode(inputs.prompt, state))[None]  # [1, T]
            if noise is None:
                noise = self._noise()
            x_0 = torch.from_numpy(noise)[None]  # [1, H, A]
            x_0 = x_0.to(device, torch.float32, non_blocking=True)
        context = camera_context(
            inputs.prompt,
            list(inputs.images),
            config.vision.tokens,
            [image.shape[:2] for image in inputs.images.values()],
            self._checkpoint.identity,
        )
        step = session.act(z, tokens, x_0, context, timer)
        with timer.stage("postprocess"):
            step = _on_host(step)
            normalised = step.actions[0].double().numpy()  # [H, A]
            actions = self._stats.unnormalize_actions(normalised)
        stage_ms = timer.milliseconds()
        report = step_report(step, session.settings, config, stage_ms, self._description)
        return actions, report

    def place(self, camera: int, image: RgbImage) -> RgbImage:
        """Begin to bring an image to the device; see `Engine.place`."""
        return self._staging.place(camera, image)

    @property
    def decodes_jpeg(self) -> bool:
        """Whether it was given a decoder; see `Engine.decodes_jpeg`."""
        return self._decoder is not None

    def decode(self, jpegs: Sequence[bytes]) -> list[DeviceImage] | None:
        """Decode JPEGs into the device's memory; see `Engine.decode`."""
        if self._decoder is None:
            return super().decode(jpegs)
        images = self._decoder.decode(jpegs)
        return None if images is None else [DeviceImage(pixels) for pixels in images]

    def _on_device(self, camera: int, image: RgbImage | DeviceImage) -> Tensor:
        """An image where the model is, [h, w, 3] uint8."""
        if isinstance(image, DeviceImage):
            pixels: Tensor = image.pixels
            return pixels
        return self._staging.on_device(camera, image)

    def reset(self) -> None:
        """Begin a new episode; see `Engine.reset`."""
        if self._session.query:  # a reset before anything ran starts nothing new
            self._episode += 1
        self._session.reset()

    def set_pruner(self, settings: PrunerSettings) -> None:
        """Change the method; see `Engine.set_pruner`."""
        if self._expected is not None and self._session.runner.prompt_bucket is not None:
            self._rehearse(settings, self._expected, lambda _text, _fraction: None)
        self._session.set_pruner(settings)

    def set_prompt(self, prompt: str, progress: Progress) -> None:
        """Make ready for another prompt; see `Engine.set_prompt`."""
        if self._expected is None or self._session.runner.prompt_bucket is None:
            return
        expected = replace(self._expected, prompt=prompt)
        self._rehearse(self._session.settings, expected, progress)
        self._expected = expected

    @property
    def image_side(self) -> int:
        """Of the checkpoint's vision tower; see `Engine.image_side`."""
        return self._checkpoint.config.vision.image

    def describe(self) -> str:
        """Path, device, type and threads."""
        return self._description

    def warm_up(self, progress: Progress, *, prompt: str = "", cameras: int = 3) -> None:
        """Rehearse a keyframe and a pruned step for every size that the prompt can have.

        In sessions of their own: nothing is left behind but what the runner has captured.
        """
        if not prompt:
            prompt = TYPICAL_PROMPT
            progress(f"no prompt yet: warming up for one as long as '{prompt}'", 0.0)
        for note in self._session.runner.notes:
            progress(note, 0.0)
        self._expected = _Expected(prompt, cameras)
        self._rehearse(self._session.settings, self._expected, progress)
        progress("warm", 1.0)

    def _rehearse(self, settings: PrunerSettings, expected: _Expected, progress: Progress) -> None:
        """Run what steps are to be expected and were not run yet, in a session of its own."""
        model, config = self._checkpoint.model, self._checkpoint.config
        runner, steps = self._session.runner, len(self._session.schedule)
        cameras, size = expected.cameras, config.vision.image
        images = torch.zeros(cameras, 3, size, size, device=model.device)
        noise = torch.zeros(1, config.horizon, config.action_dim, device=model.device)
        names = [f"camera {i}" for i in range(cameras)]
        context = camera_context(
            expected.prompt, names, config.vision.tokens, [(size, size)] * cameras, ""
        )
        settings = rehearsal(settings)
        session = PolicySession(model, settings, steps, runner)
        state_dim = self._stats.state.dim if self._state_in_prompt else None
        lengths = prompt_lengths(self._tokenizer, expected.prompt, state_dim)
        kinds = step_kinds(settings)
        sizes = [
            n_text
            for n_text in prompt_sizes(*lengths, runner.prompt_bucket)
            if (settings, steps, cameras, n_text) not in self._rehearsed
        ]
        verb = "warming up" if runner.prompt_bucket is None else "capturing"
        total = len(sizes) * len(kinds)
        for i, (n_text, kind) in enumerate(product(sizes, kinds)):
            progress(f"{verb} {i + 1}/{total}: {kind}, {n_text} prompt tokens", i / total)
            if kind == kinds[0]:
                session.reset()
            tokens = torch.zeros(1, n_text, dtype=torch.int64)
            session.step(images, tokens, noise, context)
            if kind == kinds[-1]:
                self._rehearsed.add((settings, steps, cameras, n_text))

    def _noise(self) -> NDArray[np.float64]:
        """Noise of this (episode, query): the same for every method, so comparisons pair up."""
        config = self._checkpoint.config
        key = [self._seed, self._episode, self._session.query]
        return np.random.default_rng(key).standard_normal((config.horizon, config.action_dim))

    def _check(self, inputs: PolicyInput) -> None:
        if not inputs.images:
            raise ConfigError("observation", "images", "none", "at least one camera")
        for name, image in inputs.images.items():
            if isinstance(image, DeviceImage):
                continue
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                found = f"{image.dtype} {list(image.shape)}"
                raise ConfigError("observation", f"images.{name}", found, "uint8 [h, w, 3]")
        if not inputs.prompt.strip():
            raise ConfigError("parameter", "prompt", repr(inputs.prompt), "the task in words")
        if inputs.state.shape != (self._stats.state.dim,):
            expected = f"[{self._stats.state.dim}], as the checkpoint's statistics"
            raise ConfigError("observation", "state", list(inputs.state.shape), expected)
        if not np.isfinite(inputs.state).all():
            raise ConfigError("observation", "state", inputs.state.tolist(), "finite numbers")


def _describe(model: Pi05, runner: Runner) -> str:
    dtype = "bf16" if model.dtype == torch.bfloat16 else "fp32"
    if is_fp8(model):
        dtype = "fp8"
    if model.device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{runner.path} cpu {dtype}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{runner.path} {torch.cuda.get_device_name(model.device)} {dtype}"


def _on_host(step: SessionStep) -> SessionStep:
    """A step with its results on the host, where all are waited for at once."""
    if step.actions.device.type == "cpu":
        return step
    keep = step.decision.keep
    actions, kept = _begin_read(step.actions), None if keep is None else _begin_read(keep)
    torch.cuda.current_stream(step.actions.device).synchronize()
    return replace(step, actions=actions, decision=replace(step.decision, keep=kept))


def _begin_read(values: Tensor) -> Tensor:
    """A copy in pinned memory, whole when the stream has come to here."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
