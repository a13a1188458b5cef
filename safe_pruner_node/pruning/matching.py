"""Which reference token each current token corresponds to (paper, section 3.3, algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from safe_pruner_node.pruning.selection import camera_slices


def unit_rows(z: Tensor) -> Tensor:
    """L2-normalise each token embedding, in fp32: [N, D] to [N, D]."""
    return normalize(z.float(), dim=-1)


def match(current: Tensor, reference: Tensor, cameras: Sequence[slice] | None = None) -> Tensor:
    """Nearest reference token of every current token by cosine similarity.

    Many current tokens may share one reference token; ties go to the lowest index.

    Args:
        current: Rows of any length, which moves no argmax, [N, D].
        reference: Unit rows of the keyframe, [N, D].
        cameras: Token ranges that may only be matched with themselves, covering 0..N in
            order; None matches over all tokens.

    Returns:
        pi: index into the reference for every current token, [N] int64.
    """
    if cameras is None:
        return (current @ reference.T).argmax(-1)
    within = [
        (current[camera] @ reference[camera].T).argmax(-1) + camera.start for camera in cameras
    ]
    return torch.cat(within)


def correspond(cameras: tuple[int, ...] | None, z: Tensor, reference: Tensor) -> Tensor:
    """Nearest token of the keyframe for every token of this query (algorithm 2), in fp32.

    Args:
        cameras: Tokens of each camera, to match within a camera; None matches over all tokens.
        z: Projector outputs, [N_vis, D].
        reference: Those of the keyframe, [N_vis, D].

    Returns:
        pi as `match` gives it, [N_vis] int64.
    """
    spans = None if cameras is None else camera_slices(cameras)
    return match(z.float(), unit_rows(reference), spans)
