"""Plug and play: a live π0.5 policy of openpi or LeRobot in, the pruned policy out.

policy = safe_pruner_node.wrap(model)              # weights shared, nothing copied
policy.sample_actions(device, observation)         # openpi: PI0Pytorch's own signature
policy.select_action(batch)                        # LeRobot: PI05Policy's own methods
policy.report                                      # what the last step kept and cost
policy.reset()                                     # new episode
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safe_pruner_node.engine.report import step_report
from safe_pruner_node.engine.session import PolicySession, camera_context
from safe_pruner_node.engine.timing import StageTimer
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.adopt import adopt
from safe_pruner_node.pruning.settings import PrunerSettings, load_preset
from safe_pruner_node.types import StepReport

LANGUAGE_TOKENS = "observation.language.tokens"
LANGUAGE_MASK = "observation.language.attention_mask"
"""LeRobot's batch keys."""


class WrappedPolicy:
    """One session of a pruned policy on the weights of a live model.

    Empty cameras and text padding are dropped before anything runs. Two robots need two
    `wrap` calls (the weights stay shared), because a session remembers its keyframe.

    Attributes:
        model: The adopted model.
        report: What the last step did; None before the first.
    """

    def __init__(self, live: nn.Module, settings: PrunerSettings) -> None:
        self.live = live
        self.model = adopt(live)
        self.report: StepReport | None = None
        self._session = PolicySession(self.model, settings)

    def reset(self) -> None:
        """Begin a new episode: the next step is a keyframe."""
        self._session.reset()

    def set_pruner(self, pruner: str | PrunerSettings) -> None:
        """Change the method; begins a new session.

        Raises:
            ConfigError: Unknown preset, or settings that do not fit the model.
        """
        self._session.set_pruner(_settings(pruner, None, None))

    def step(
        self,
        images: Sequence[Tensor],
        image_masks: Sequence[Tensor],
        tokens: Tensor,
        token_mask: Tensor,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        *,
        prompt: str = "",
    ) -> Tensor:
        """Run one policy query on preprocessed tensors, batch size 1.

        Args:
            images: Per camera slot, [1, 3, S, S] in [-1, 1].
            image_masks: Per camera slot, [1] bool; False is an empty slot.
            tokens: Text tokens with padding, [1, T_max].
            token_mask: True where valid, [1, T_max].
            noise: Initial noise, [1, H, A]; None draws it.
            num_steps: Euler steps; None keeps those of the last call, at first the model's.
            prompt: The task in words, without the state; another one forces a keyframe. The
                tokens cannot tell (they hold the state too): give it, or call `reset`.

        Returns:
            Normalised actions, [1, H, A].

        Raises:
            ConfigError: Batch size other than 1, or no valid camera.
        """
        if tokens.shape[0] != 1:
            raise ConfigError(
                "observation", "batch size", tokens.shape[0], "1: a session is one robot's"
            )
        device, config = self.model.device, self.model.config
        present = torch.stack([mask.reshape(()) for mask in image_masks]).tolist()
        slots = [i for i, valid in enumerate(present) if valid]
        if not slots:
            raise ConfigError("observation", "image_masks", "no valid camera", "at least one")
        batch = torch.cat([images[i].to(device) for i in slots])  # [C, 3, S, S]
        if noise is None:
            noise = torch.randn(1, config.horizon, config.action_dim, device=device)
        if num_steps is not None:
            self._session.set_flow_steps(num_steps)
        context = camera_context(
            prompt,
            [f"camera {i}" for i in slots],
            config.vision.tokens,
            [(batch.shape[-2], batch.shape[-1])] * len(slots),
            "live",
        )
        timer = StageTimer(device)
        valid_tokens = tokens[:, token_mask[0].bool()].to(device)  # [1, T]
        step = self._session.step(batch, valid_tokens, noise.to(device), context, timer)
        self.report = step_report(
            step, self._session.settings, config, timer.milliseconds(), f"wrapped {device}"
        )
        return step.actions


class OpenpiPolicy(WrappedPolicy):
    """Stands in for openpi's `PI0Pytorch`: hand `sample_actions` to openpi's `Policy`."""

    def sample_actions(
        self,
        device: torch.device | str,  # noqa: ARG002 - openpi's signature; the weights decide
        observation: Any,  # noqa: ANN401 - openpi's Observation
        noise: Tensor | None = None,
        num_steps: int | None = None,
        *,
        prompt: str = "",
    ) -> Tensor:
        """As `PI0Pytorch.sample_actions`; `prompt` as in `WrappedPolicy.step`."""
        live: Any = self.live
        images, masks, tokens, token_mask, _ = live._preprocess_observation(  # noqa: SLF001
            observation, train=False
        )
        return self.step(images, masks, tokens, token_mask, noise, num_steps, prompt=prompt)


class LerobotPolicy(WrappedPolicy):
    """Stands in for LeRobot's `PI05Policy`; its batches, its methods."""

    def __init__(self, live: nn.Module, settings: PrunerSettings) -> None:
        super().__init__(live, settings)
        self._queue: deque[Tensor] = deque()

    def reset(self) -> None:
        """As `PI05Policy.reset`: forget the queue and the keyframe."""
        super().reset()
        self._queue.clear()

    def sample_actions(
        self,
        images: Sequence[Tensor],
        img_masks: Sequence[Tensor],
        tokens: Tensor,
        masks: Tensor,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        *,
        prompt: str = "",
    ) -> Tensor:
        """As `sample_actions` of the policy's `.model`; `prompt` as in `WrappedPolicy.step`."""
        return self.step(images, img_masks, tokens, masks, noise, num_steps, prompt=prompt)

    def predict_action_chunk(
        self, batch: dict[str, Any], noise: Tensor | None = None, num_steps: int | None = None
    ) -> Tensor:
        """As `PI05Policy.predict_action_chunk`: [1, H, action size]; `task` names the prompt."""
        live: Any = self.live
        images, masks = live._preprocess_images(batch)  # noqa: SLF001
        actions = self.step(
            images,
            masks,
            batch[LANGUAGE_TOKENS],
            batch[LANGUAGE_MASK],
            noise,
            num_steps,
            prompt=_task(batch),
        )
        return actions[:, :, : live.config.output_features["action"].shape[0]]

    def select_action(self, batch: dict[str, Any]) -> Tensor:
        """As `PI05Policy.select_action`: one action [1, action size] from the queue."""
        if not self._queue:
            live: Any = self.live
            actions = self.predict_action_chunk(batch)[:, : live.config.n_action_steps]
            self._queue.extend(actions.transpose(0, 1))
        return self._queue.popleft()


def wrap(
    model: nn.Module,
    pruner: str | PrunerSettings = "robot",
    *,
    rho: float | None = None,
    presets: str | Path | None = None,
) -> OpenpiPolicy | LerobotPolicy:
    """Take over a live π0.5 policy and prune it; the weights are shared, not copied.

    Args:
        model: openpi's `PI0Pytorch` or LeRobot's `PI05Policy`, on any device.
        pruner: Preset name (``robot``, ``paper``, ``vanilla``...) or settings.
        rho: Overrides the preset's pruning ratio.
        presets: Presets file; None takes the shipped `config/pruners.yaml`.

    Returns:
        The pruned policy, with the methods of the model it stands in for.

    Raises:
        ConfigError: Another kind of model, an unknown preset, or settings that do not fit.
    """
    settings = _settings(pruner, rho, presets)
    if hasattr(model, "predict_action_chunk"):
        return LerobotPolicy(model, settings)
    if hasattr(model, "_preprocess_observation"):
        return OpenpiPolicy(model, settings)
    raise ConfigError(
        "live model", "", type(model).__name__, "openpi's PI0Pytorch or LeRobot's PI05Policy"
    )


def _settings(
    pruner: str | PrunerSettings, rho: float | None, presets: str | Path | None
) -> PrunerSettings:
    if isinstance(pruner, PrunerSettings):
        return pruner
    return load_preset(presets, pruner, rho)


def _task(batch: dict[str, Any]) -> str:
    """The prompt of a LeRobot batch without the state its preprocessor wrote into it."""
    task = batch.get("task", "")
    text = task if isinstance(task, str) else next(iter(task), "")
    return str(text).split(", State:", maxsplit=1)[0]
