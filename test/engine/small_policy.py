"""A small random model in which every mechanism matters, and sequences of frames for it.

No pytest here: `cuda_graph_checks.py` runs where there is none.
"""

from dataclasses import replace

import torch
from slow_reference import PaddedQuery

from safe_pruner_node.engine.session import camera_context
from safe_pruner_node.pi05.config import TINY
from safe_pruner_node.pi05.model import Pi05

CAMERAS = ("head", "left_wrist", "right_wrist")
SMALL = replace(
    TINY,
    vision=replace(TINY.vision, image=56),  # 16 tokens per camera
    vlm=replace(TINY.vlm, depth=6),
    expert=replace(TINY.expert, depth=6),
    flow_steps=3,
)


def random_model():
    """Random weights large enough that attention is far from uniform."""
    random = torch.Generator().manual_seed(0)
    model = Pi05(SMALL).eval().requires_grad_(requires_grad=False)
    for name, parameter in model.named_parameters():
        parameter.normal_(0.0, 0.1 if "norm" in name else 0.4, generator=random)
    return model


class Frames:
    """Queries of one episode; each moves a little from the one before, every fourth jumps."""

    def __init__(self, n=8, n_text=7, seed=0, device="cpu"):
        random = torch.Generator().manual_seed(seed)
        size = SMALL.vision.image

        def picture():
            return torch.rand(3, 3, size, size, generator=random) * 2 - 1

        self.images, current = [], picture()
        for t in range(n):
            current = picture() if t % 4 == 3 else 0.8 * current + 0.2 * picture()
            self.images.append(current.to(device))
        tokens = torch.randint(0, SMALL.vocab_size, (1, n_text), generator=random)
        noise = torch.randn(n, 1, SMALL.horizon, SMALL.action_dim, generator=random)
        self.tokens, self.noise = tokens.to(device), noise.to(device)
        self.n_text = n_text

    def __len__(self):
        return len(self.images)

    def step(
        self, session, t, *, cameras=CAMERAS, prompt="lift", resolution=(56, 56), checkpoint="a"
    ):
        context = camera_context(
            prompt, cameras, SMALL.vision.tokens, [resolution] * len(cameras), checkpoint
        )
        return session.step(self.images[t][: len(cameras)], self.tokens, self.noise[t], context)

    def padded(self, t):
        """The same query among one empty camera slot and 5 tokens of padding."""
        empty = -torch.ones(1, *self.images[t].shape[1:])
        slots = torch.cat([self.images[t][:1], empty, self.images[t][1:]])
        tokens = torch.cat([self.tokens, torch.ones(1, 5, dtype=torch.long)], 1)
        return PaddedQuery(slots, (True, False, True, True), tokens, self.n_text, self.noise[t])
