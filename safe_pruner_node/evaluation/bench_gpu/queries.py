"""Random policy queries of a given shape: the same ones in every process and on every device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safe_pruner_node.engine.session import PolicySession, SessionStep, camera_context
from safe_pruner_node.engine.timing import StageTimer
from safe_pruner_node.pi05.config import Pi05Config
from safe_pruner_node.pruning.base import Context

CAMERAS = ("head", "left_wrist", "right_wrist")


@dataclass(frozen=True)
class Shape:
    """What decides the shapes of a step's tensors.

    Attributes:
        cameras: Images, 1..3.
        prompt: Text tokens.
        horizon: Actions per chunk.
    """

    cameras: int = 3
    prompt: int = 120
    horizon: int = 50

    def __str__(self) -> str:
        return f"{self.cameras} cam, {self.prompt} tok, H {self.horizon}"


BASE = Shape()
"""The shape that the issue's bars are about."""


@dataclass(frozen=True)
class Query:
    """Arguments of `PolicySession.step`.

    Attributes:
        images: [C, 3, S, S] in [-1, 1].
        tokens: [1, T].
        noise: [1, H, A].
        context: Cameras and prompt.
    """

    images: Tensor
    tokens: Tensor
    noise: Tensor
    context: Context

    def run(self, session: PolicySession, timer: StageTimer | None = None) -> SessionStep:
        """Run it in a session."""
        return session.step(self.images, self.tokens, self.noise, self.context, timer)


def random_query(config: Pi05Config, shape: Shape, seed: int, device: torch.device) -> Query:
    """A query that has nothing in common with that of another seed."""
    random = torch.Generator().manual_seed(seed)
    side = config.vision.image
    images = torch.rand(shape.cameras, 3, side, side, generator=random) * 2 - 1  # [C, 3, S, S]
    tokens = torch.randint(config.vocab_size, (1, shape.prompt), generator=random)  # [1, T]
    noise = torch.randn(1, shape.horizon, config.action_dim, generator=random)  # [1, H, A]
    names = CAMERAS[: shape.cameras]
    context = camera_context(
        "benchmark", names, config.vision.tokens, [(side, side)] * len(names), "random weights"
    )
    return Query(images.to(device), tokens.to(device), noise.to(device), context)
