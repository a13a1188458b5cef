"""The engine: observation in, chunk and report out, around one session."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from safe_pruner_node.engine.base import Engine, Progress
from safe_pruner_node.engine.report import step_report
from safe_pruner_node.engine.runner import Runner
from safe_pruner_node.engine.session import PolicySession, camera_context
from safe_pruner_node.engine.timing import StageTimer
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.checkpoint import Checkpoint
from safe_pruner_node.pi05.tokenizer import PromptTokenizer
from safe_pruner_node.pi05.transforms import NormStats, to_model_image
from safe_pruner_node.pruning.settings import PrunerSettings
from safe_pruner_node.types import FloatArray, PolicyInput, RgbImage, StepReport


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
    ) -> None:
        if checkpoint.norm_stats is None:
            raise ConfigError(checkpoint.stats_path, "", "no such file", "the policy's statistics")
        self._checkpoint = checkpoint
        self._stats: NormStats = checkpoint.norm_stats
        self._tokenizer = tokenizer
        self._session = PolicySession(checkpoint.model, pruner, flow_steps, runner)
        self._seed = seed
        self._state_in_prompt = state_in_prompt
        self._episode = 0

    def step(
        self, inputs: PolicyInput, noise: NDArray[np.float64] | None = None
    ) -> tuple[FloatArray, StepReport]:
        """Run one policy query; see `Engine.step`."""
        self._check(inputs)
        if noise is None:
            noise = self._noise()
        config = self._checkpoint.config
        if noise.shape != (config.horizon, config.action_dim):
            expected = f"[{config.horizon}, {config.action_dim}]"
            raise ConfigError("noise", "shape", list(noise.shape), expected)
        return self._run(self._session, inputs, noise)

    def _run(
        self, session: PolicySession, inputs: PolicyInput, noise: NDArray[np.float64]
    ) -> tuple[FloatArray, StepReport]:
        config, device = self._checkpoint.config, self._checkpoint.model.device
        timer = StageTimer(device)
        with timer.stage("preprocess"):
            size, origin = config.vision.image, self._checkpoint.origin
            images = [to_model_image(image, size, origin) for image in inputs.images.values()]
            batch = torch.cat(images).to(device, non_blocking=True)  # [C, 3, S, S]
            x_0 = torch.from_numpy(noise)[None]  # [1, H, A]
            x_0 = x_0.to(device, torch.float32, non_blocking=True)
        with timer.stage("tokenize"):
            state = self._stats.normalize_state(inputs.state) if self._state_in_prompt else None
            tokens = torch.from_numpy(self._tokenizer.encode(inputs.prompt, state))[None]
            tokens = tokens.to(device, non_blocking=True)  # [1, T]
        context = camera_context(
            inputs.prompt,
            list(inputs.images),
            config.vision.tokens,
            [image.shape[:2] for image in inputs.images.values()],
            self._checkpoint.identity,
        )
        step = session.step(batch, tokens, x_0, context, timer)
        with timer.stage("postprocess"):
            normalised = step.actions[0].double().cpu().numpy()  # [H, A]
            actions = self._stats.unnormalize_actions(normalised)
        report = step_report(step, session.settings, config, timer.milliseconds(), self.describe())
        return actions, report

    def reset(self) -> None:
        """Begin a new episode; see `Engine.reset`."""
        if self._session.query:  # a reset before anything ran starts nothing new
            self._episode += 1
        self._session.reset()

    def set_pruner(self, settings: PrunerSettings) -> None:
        """Change the method; see `Engine.set_pruner`."""
        self._session.set_pruner(settings)

    def describe(self) -> str:
        """Path, device, type and threads."""
        model, path = self._checkpoint.model, self._session.runner.path
        dtype = "bf16" if model.dtype == torch.bfloat16 else "fp32"
        if model.device.type == "cpu":
            threads = torch.get_num_threads()
            return f"{path} cpu {dtype}, {threads} thread{'s' if threads > 1 else ''}"
        return f"{path} {torch.cuda.get_device_name(model.device)} {dtype}"

    def warm_up(self, progress: Progress) -> None:
        """Run a keyframe and a pruned step on grey images, in a session of their own.

        With graphs this loads every kernel and captures what three cameras need; what depends on
        the length of the prompt is captured for this one, and for another at its first step.
        """
        config, session = self._checkpoint.config, self._session
        # Without floors: how many cameras there will be is not known yet.
        settings = replace(session.settings, camera_floor=0)
        steps = len(session.schedule)
        rehearsal = PolicySession(self._checkpoint.model, settings, steps, session.runner)
        grey: RgbImage = np.full((config.vision.image, config.vision.image, 3), 127, np.uint8)
        inputs = PolicyInput(
            images={f"camera {i}": grey for i in range(3)},
            state=np.zeros(self._stats.state.dim),
            prompt="warm up",
        )
        noise = np.zeros((config.horizon, config.action_dim))
        for i, name in enumerate(("keyframe", "pruned step")):
            progress(f"warming up: {name}", i / 2)
            self._run(rehearsal, inputs, noise)
        progress("warm", 1.0)

    def _noise(self) -> NDArray[np.float64]:
        """Noise of this (episode, query): the same for every method, so comparisons pair up."""
        config = self._checkpoint.config
        key = [self._seed, self._episode, self._session.query]
        return np.random.default_rng(key).standard_normal((config.horizon, config.action_dim))

    def _check(self, inputs: PolicyInput) -> None:
        if not inputs.images:
            raise ConfigError("observation", "images", "none", "at least one camera")
        for name, image in inputs.images.items():
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
