"""What a pruner is asked and what it answers.

A pruner is one session's memory and judgement. The engine shows it the scene before the first
VLM layer, then the attention rows of layer ls-1, and gets back which visual tokens go on.

Shapes: N_vis valid visual tokens (all cameras, prefix order), D VLM width, h query heads,
g key heads, R query rows, d head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from safe_pruner_node.pruning.early import Vote
from safe_pruner_node.pruning.selection import Selection, camera_slices
from safe_pruner_node.pruning.settings import PrunerSettings

Result = TypeVar("Result")


class Run(Protocol):
    """Runs a pure function of tensors, perhaps captured; what it gives may be its own memory."""

    def __call__(
        self, function: Callable[..., Result], fixed: tuple[Hashable, ...], /, *inputs: object
    ) -> Result:
        """Give ``function(*fixed, *inputs)``, valid until the same function runs again.

        Args:
            function: Reads nothing back and has no effect but its result.
            fixed: What is the same for every query of a kind.
            inputs: Tensors from outside or whole results of other such calls.
        """


def call(
    function: Callable[..., Result], fixed: tuple[Hashable, ...], /, *inputs: object
) -> Result:
    """The plain `Run`: call the function."""
    return function(*fixed, *inputs)


@dataclass(frozen=True)
class Context:
    """What a keyframe was taken for; another context makes it worthless.

    Attributes:
        prompt: The task in words, without the state.
        cameras: (name, visual tokens) in prefix order.
        resolution: (height, width) of each camera's image as it was decoded.
        checkpoint: Identity of the weights.
    """

    prompt: str
    cameras: tuple[tuple[str, int], ...]
    resolution: tuple[tuple[int, int], ...]
    checkpoint: str

    def difference(self, other: Context) -> str:
        """The first attribute in which two contexts differ, empty when they are equal."""
        for name in ("prompt", "cameras", "resolution", "checkpoint"):
            if getattr(self, name) != getattr(other, name):
                return name
        return ""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Visual tokens of each camera."""
        return tuple(tokens for _, tokens in self.cameras)

    @property
    def camera_slices(self) -> tuple[slice, ...]:
        """Each camera's range of visual token indices."""
        return camera_slices(self.tokens)


@dataclass(frozen=True)
class Scene:
    """What is known before the first VLM layer.

    Attributes:
        z: Projector outputs, [N_vis, D].
        context: What they belong to.
    """

    z: Tensor
    context: Context


@dataclass(frozen=True)
class EarlyView:
    """What is known at the pruning layer.

    Attributes:
        scene: The same scene that `Pruner.begin` saw.
        query: Rows of which some or all vote, after RoPE, [1, h, R, d].
        keys: Keys they vote on, after RoPE, [1, g, M, d]: visual, text, others.
        text_slots: Keys of the text and its padding.
        n_text: How many of these are text, [] int64; None: all are.
    """

    scene: Scene
    query: Tensor
    keys: Tensor
    text_slots: int
    n_text: Tensor | None


@dataclass(frozen=True)
class Decision:
    """What happens to the visual tokens of one step.

    Attributes:
        keep: Visual tokens that go on, ascending indices [K] int64; None keeps all.
        keyframe: True when the reference is renewed (every token goes on).
        reason: Why a keyframe (``first``, ``prompt``, ``cameras``, ``resolution``,
            ``checkpoint``, ``age``, ``interval``, ``kappa``), else empty.
        kappa: Eq. 6; NaN without a reference to compare with.
        capture_deep: True when the engine is to measure the deep saliency of this step and
            hand it to `Pruner.observe`.
    """

    keep: Tensor | None = None
    keyframe: bool = False
    reason: str = ""
    kappa: float = float("nan")
    capture_deep: bool = False


class Pruner(ABC):
    """One pruning method in one session.

    The engine calls, per policy query: `begin`, then `decide`, then after the actions of a
    keyframe `observe`. Two sessions are two instances; nothing is shared.
    """

    def __init__(self, settings: PrunerSettings, depth: int, run: Run = call) -> None:
        """Check the settings against a model with `depth` layers.

        Args:
            settings: The method's.
            depth: Layers of the model.
            run: Runs the method's tensor arithmetic.

        Raises:
            ConfigError: They do not fit.
        """
        settings.check_depth(depth)
        self.settings = settings
        self._run = run
        self.deep_layers = settings.deep_layers(depth)

    @property
    def layer(self) -> int | None:
        """``ls``: the VLM layers that see every token; None never prunes."""
        return self.settings.layer

    def begin(self, scene: Scene) -> None:
        """See the scene before the first VLM layer.

        Raises:
            ConfigError: The camera floors do not fit the cameras that are there.
        """
        self.settings.check_tokens(dict(scene.context.cameras))

    @abstractmethod
    def decide(self, early: EarlyView) -> Decision:
        """Choose the visual tokens that go on from the pruning layer."""

    def observe(self, early: EarlyView, deep: Tensor | None) -> None:  # noqa: B027 - optional
        """Learn from a keyframe, after its actions.

        Args:
            early: What `decide` saw.
            deep: Deep saliency, one row per layer of `deep_layers`, [n_deep, N_vis]; None
                when `Decision.capture_deep` was False.
        """

    def reset(self) -> None:  # noqa: B027 - most methods remember nothing
        """Forget the episode."""

    def _vote(self, early: EarlyView) -> Vote:
        """How the early saliency is taken."""
        settings = self.settings
        return Vote(
            settings.query_rows, settings.softmax_over, len(early.scene.z), early.text_slots
        )

    def _selection(self, scene: Scene) -> Selection:
        """How many tokens go on."""
        settings, tokens = self.settings, scene.context.tokens
        return Selection(settings.kept(sum(tokens)), settings.camera_floor, tokens)
