"""One policy session on tensors: images and tokens in, normalised actions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safe_pruner_node.engine import stages
from safe_pruner_node.engine.flow import DeepSettings, FlowProbe, FlowSchedule
from safe_pruner_node.engine.prefix import EarlyPrefix
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.engine.runner import EagerRunner, Runner
from safe_pruner_node.engine.timing import StageTimer
from safe_pruner_node.pi05.model import Pi05
from safe_pruner_node.pruning.base import Context, Decision, EarlyView, Scene
from safe_pruner_node.pruning.registry import build_pruner
from safe_pruner_node.pruning.settings import PrunerSettings


@dataclass(frozen=True)
class SessionStep:
    """What one policy query gave.

    Attributes:
        actions: Normalised actions, [1, H, A].
        decision: What happened to the visual tokens.
        query: Number of this query since the last reset.
        n_text: Text tokens without padding.
        context: Cameras and prompt it was made for.
    """

    actions: Tensor
    decision: Decision
    query: int
    n_text: int
    context: Context


class PolicySession:
    """A model, a pruner and the queries since the last reset.

    Sessions may share a model; everything remembered is the session's own.

    Args:
        model: The policy; B = 1.
        settings: The pruning method.
        flow_steps: Euler steps; None takes the model's.
        runner: Runs the model's stages; sessions may share one. None runs them eagerly.

    Raises:
        ConfigError: The pruner's settings do not fit the model.
    """

    def __init__(
        self,
        model: Pi05,
        settings: PrunerSettings,
        flow_steps: int | None = None,
        runner: Runner | None = None,
    ) -> None:
        self.model = model
        self.runner = EagerRunner() if runner is None else runner
        self.settings = settings
        self.pruner = build_pruner(settings, model.config.vlm.depth, self.runner.run)
        self.schedule = FlowSchedule(model, flow_steps or model.config.flow_steps)
        self.query = 0

    def set_flow_steps(self, steps: int) -> None:
        """Change the number of Euler steps."""
        if steps != len(self.schedule):
            self.schedule = FlowSchedule(self.model, steps)

    def set_pruner(self, settings: PrunerSettings) -> None:
        """Change the method; the session starts over.

        Raises:
            ConfigError: The settings do not fit the model; the old method stays.
        """
        self.pruner = build_pruner(settings, self.model.config.vlm.depth, self.runner.run)
        self.settings = settings
        self.reset()

    def reset(self) -> None:
        """Begin a new episode."""
        self.pruner.reset()
        self.query = 0

    def step(
        self,
        images: Tensor,
        tokens: Tensor,
        noise: Tensor,
        context: Context,
        timer: StageTimer | None = None,
    ) -> SessionStep:
        """Run one policy query: `see`, then `act`.

        Args:
            images: As for `see`.
            tokens: As for `act`.
            noise: As for `act`.
            context: As for `act`.
            timer: Told the stages; None times nothing.

        Raises:
            ConfigError: The camera floors do not fit the cameras.
        """
        timer = timer or StageTimer(noise.device)
        return self.act(self.see(images, timer), tokens, noise, context, timer)

    @torch.inference_mode()
    def see(self, images: Tensor, timer: StageTimer) -> Tensor:
        """The first half of a query: the vision tower.

        On a GPU it is only begun: what `act` needs can be made ready meanwhile.

        Args:
            images: One image per camera in prefix order, [C, 3, S, S] in [-1, 1].
            timer: Told the stage.

        Returns:
            Projector outputs [N_vis, D], for the `act` that comes next.
        """
        with timer.stage("vision", self.runner):
            z: Tensor = self.runner.run(stages.see, (self.model,), images)
        return z

    @torch.inference_mode()
    def act(
        self, z: Tensor, tokens: Tensor, noise: Tensor, context: Context, timer: StageTimer
    ) -> SessionStep:
        """The second half of a query: prefix and flow.

        Args:
            z: What `see` gave, [N_vis, D].
            tokens: Text tokens without padding, [1, T], on any device.
            noise: Initial noise, [1, H, A].
            context: Identity of the scene; its cameras are those that were seen.
            timer: Told the stages.

        Raises:
            ConfigError: The camera floors do not fit the cameras.
        """
        with timer.stage("tokenize"):
            prompt = self._prompt(tokens).to(noise.device)
        if self.pruner.layer is None:
            actions = self._full_step(z, prompt, noise, timer)
            decision = Decision()
        else:
            actions, decision = self._pruned_step(
                Scene(z, context), self.pruner.layer, prompt, noise, timer
            )
        # Copies: the runner may write the next step's results where these are.
        if decision.keep is not None:
            decision = replace(decision, keep=decision.keep.clone())
        step = SessionStep(actions.clone(), decision, self.query, tokens.shape[1], context)
        self.query += 1
        return step

    def _prompt(self, tokens: Tensor) -> Prompt:
        bucket = self.runner.prompt_bucket
        return Prompt(tokens) if bucket is None else Prompt(tokens).padded(bucket)

    def _full_step(self, z: Tensor, prompt: Prompt, noise: Tensor, timer: StageTimer) -> Tensor:
        with timer.stage("prefill", self.runner):
            cache = self.runner.run(stages.read, (self.model,), z, prompt)
        with timer.stage("denoise", self.runner):
            fixed = (self.model, self.schedule, len(z), None)
            actions, _ = self.runner.run(stages.denoise, fixed, cache, noise, None, prompt)
        return actions

    def _pruned_step(
        self, scene: Scene, layer: int, prompt: Prompt, noise: Tensor, timer: StageTimer
    ) -> tuple[Tensor, Decision]:
        model, settings, run = self.model, self.settings, self.runner.run
        n_visual = len(scene.z)
        with timer.stage("match", self.runner):
            self.pruner.begin(scene)
        with timer.stage("prefill_early", self.runner):
            early = run(stages.read_early, (model, layer), scene.z, prompt)
        view, probed = self._early_view(scene, early, prompt, noise, timer)
        with timer.stage("select", self.runner):
            decision = self.pruner.decide(view)
        with timer.stage("prefill_late", self.runner):
            cache = run(stages.prefill_late, (model,), early, decision.keep)
        with timer.stage("denoise", self.runner):
            deep = None
            if decision.capture_deep:
                deep = DeepSettings(
                    self.pruner.deep_layers,
                    n_visual,
                    settings.softmax_over,
                    settings.denoise_steps,
                )
            fixed = (model, self.schedule, n_visual, deep)
            actions, saliency = run(stages.denoise, fixed, cache, noise, probed, prompt)
            if decision.keyframe:
                self.pruner.observe(view, saliency)
        return actions, decision

    def _early_view(
        self, scene: Scene, early: EarlyPrefix, prompt: Prompt, noise: Tensor, timer: StageTimer
    ) -> tuple[EarlyView, FlowProbe | None]:
        """What the pruner is shown at layer ls, and what it took of the first denoise step."""
        if self.settings.query_rows != "action_probe":
            query, keys = early.text_query, early.cache[-1][0]
            return EarlyView(scene, query, keys, prompt.slots, early.prompt_valid), None
        with timer.stage("denoise", self.runner):  # its first layers of the first step, earlier
            fixed = (self.model, self.schedule, len(scene.z))
            probed = self.runner.run(stages.probe, fixed, early, noise, prompt)
        query, keys = probed.queries[-1], probed.keys
        return EarlyView(scene, query, keys, prompt.slots, early.prompt_valid), probed


def camera_context(
    prompt: str,
    cameras: Sequence[str],
    tokens_per_camera: int,
    resolution: Sequence[tuple[int, int]],
    checkpoint: str,
) -> Context:
    """The context of cameras that all give the same number of tokens."""
    return Context(
        prompt=prompt,
        cameras=tuple((name, tokens_per_camera) for name in cameras),
        resolution=tuple(resolution),
        checkpoint=checkpoint,
    )
