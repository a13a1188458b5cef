"""An engine that prunes nothing and notes what every pruner could have known, query by query."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from safe_pruner_node.engine.build import choose_runner
from safe_pruner_node.engine.flow import FlowProbe
from safe_pruner_node.engine.policy import PolicyEngine
from safe_pruner_node.engine.prefix import EarlyPrefix
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.engine.runner import Runner
from safe_pruner_node.engine.session import PolicySession, SessionStep
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.engine.timing import StageTimer
from safe_pruner_node.evaluation.saliency_record import Half, Single
from safe_pruner_node.pi05.checkpoint import Checkpoint
from safe_pruner_node.pi05.model import Pi05
from safe_pruner_node.pi05.tokenizer import PromptTokenizer
from safe_pruner_node.pruning.base import Context, Decision, EarlyView, Pruner, Scene
from safe_pruner_node.pruning.early import Vote, early_saliency
from safe_pruner_node.pruning.matching import unit_rows
from safe_pruner_node.pruning.settings import QUERY_ROWS, PrunerSettings
from safe_pruner_node.types import FloatArray, PolicyInput, RgbImage, StepReport


@dataclass(frozen=True)
class QuerySaliency:
    """What one query showed; shapes as in `SaliencyRecord` without Q.

    Attributes:
        inputs: What the engine was given.
        noise: The flow noise it was given; None when it drew its own.
        z_hat: Unit rows of the projector outputs.
        early: Early saliency by name.
        deep: Saliency of every expert layer.
    """

    inputs: PolicyInput
    noise: FloatArray | None
    z_hat: Half
    early: dict[str, Single]
    deep: Single


class RecordingPruner(Pruner):
    """Keeps every token at every step, and asks for the deep saliency of every layer.

    Attributes:
        keep: Tokens to keep instead, [K], with nothing recorded; None while recording.
    """

    def __init__(self, settings: PrunerSettings, depth: int) -> None:
        super().__init__(settings, depth)
        self.deep_layers = tuple(range(depth))
        self.keep: Tensor | None = None
        self.z_hat: Tensor | None = None
        self.deep: Tensor | None = None

    def decide(self, early: EarlyView) -> Decision:
        """A keyframe every time, or what was asked for."""
        if self.keep is not None:
            return Decision(keep=self.keep)
        self.z_hat = unit_rows(early.scene.z)
        return Decision(keyframe=True, reason="recording", capture_deep=True)

    def observe(self, early: EarlyView, deep: Tensor | None) -> None:  # noqa: ARG002 - interface
        """Keep what the actions attended to."""
        self.deep = deep


class RecordingSession(PolicySession):
    """A session whose early view is taken with every mode of `query_rows`."""

    def __init__(
        self,
        model: Pi05,
        settings: PrunerSettings,
        flow_steps: int | None = None,
        runner: Runner | None = None,
    ) -> None:
        super().__init__(model, settings, flow_steps, runner)
        self.pruner: RecordingPruner = RecordingPruner(settings, model.config.vlm.depth)
        self.early: dict[str, Tensor] = {}

    def set_pruner(self, settings: PrunerSettings) -> None:
        """Record at the layer of these settings."""
        self.pruner = RecordingPruner(settings, self.model.config.vlm.depth)
        self.settings = settings
        self.reset()

    def act(
        self, z: Tensor, tokens: Tensor, noise: Tensor, context: Context, timer: StageTimer
    ) -> SessionStep:
        """Run one query with every token; see `PolicySession.act`."""
        self.early = {}
        return super().act(z, tokens, noise, context, timer)

    def _early_view(
        self, scene: Scene, early: EarlyPrefix, prompt: Prompt, noise: Tensor, timer: StageTimer
    ) -> tuple[EarlyView, FlowProbe | None]:
        asked = self.settings
        for rows in QUERY_ROWS:
            self.settings = replace(asked, query_rows=rows)
            view, probed = super()._early_view(scene, early, prompt, noise, timer)
            seen = view.query, view.keys, view.n_text
            vote = Vote(rows, asked.softmax_over, len(scene.z), view.text_slots)
            self.early[rows] = early_saliency(vote, *seen)
            if rows == "last_text":
                self.early["fastv"] = early_saliency(replace(vote, over="all"), *seen)
        self.settings = asked
        return view, probed


class RecordingEngine(PolicyEngine):
    """The engine around a recording session.

    Args:
        checkpoint: The loaded checkpoint.
        tokenizer: Its tokenizer.
        settings: How the engine is built; its pruner says at which layer and how is recorded.

    Attributes:
        queries: What the queries since the last reset showed.
    """

    def __init__(
        self, checkpoint: Checkpoint, tokenizer: PromptTokenizer, settings: EngineSettings
    ) -> None:
        runner = choose_runner(settings.path, checkpoint.model)
        super().__init__(
            checkpoint,
            tokenizer,
            settings.pruner,
            flow_steps=settings.flow_steps,
            seed=settings.seed,
            state_in_prompt=settings.state_in_prompt,
            runner=runner,
        )
        self._recording = RecordingSession(
            checkpoint.model, settings.pruner, settings.flow_steps, runner
        )
        self._session = self._recording
        self.queries: list[QuerySaliency] = []

    def reset(self) -> None:
        """Begin a new episode with an empty list."""
        super().reset()
        self.queries = []

    def place(self, camera: int, image: RgbImage) -> RgbImage:  # noqa: ARG002 - see `Engine.place`
        """The image itself: `queries` keeps what was shown, beyond the camera's next image."""
        return image

    def step(
        self, inputs: PolicyInput, noise: NDArray[np.float64] | None = None
    ) -> tuple[FloatArray, StepReport]:
        """Run one query and note what it showed."""
        answer = super().step(inputs, noise)
        session = self._recording
        if session.pruner.z_hat is None or session.pruner.deep is None:
            raise RuntimeError("the session did not record")
        self.queries.append(
            QuerySaliency(
                inputs=inputs,
                noise=noise,
                z_hat=session.pruner.z_hat.cpu().numpy().astype(np.float16),
                early={name: values.cpu().numpy() for name, values in session.early.items()},
                deep=session.pruner.deep.cpu().numpy(),
            )
        )
        return answer

    def act(self, inputs: PolicyInput, noise: FloatArray | None, keep: Tensor | None) -> FloatArray:
        """The chunk with only some of the tokens after the pruning layer; nothing is noted.

        Args:
            inputs: As in `step`.
            noise: As in `step`.
            keep: Ascending visual indices [K]; None keeps all.
        """
        pruner = self._recording.pruner
        pruner.keep = None if keep is None else keep.to(self._checkpoint.model.device)
        actions, _ = super().step(inputs, noise)
        pruner.keep = None
        return actions
