"""What the resident flow reads through shared memory, laid out as its tensor cores want it there.

An image is chunks of rows of 64 numbers, 128 bytes each; the eight 16-byte pieces of row r are at
piece ^ (r % 8), so that eight rows of one column of pieces lie in all banks. A program's chunks
follow each other in the order in which it reads them.

Shapes: D width, d head_dim, h query heads, N prefix keys, H horizon, P blocks of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_pruner_node.engine.cuda.expert_flow import (
    CHUNK,
    IMAGES,
    KEYS,
    PREFIX,
    PROGRAMS,
    SHARES,
    Flow,
    blocks,
)
from safe_pruner_node.engine.expert_weights import ExpertLayer
from safe_pruner_node.pi05.model import KeyValue

QKV_ROWS = 32
"""Channels that one program projects to: 16 of a head's first half, and what turns with them."""


@dataclass(frozen=True)
class LayerImages:
    """One layer's weights, [chunks, rows of a chunk, 64] each, one program's after the other's.

    Attributes:
        qkv: In chunks of 32 rows, by tile of 32 channels.
        o: In chunks of 64 rows, by tile of 64 channels and share of the heads.
        gate_up: By program: 32 rows of gate, then the 32 of up that they are multiplied with.
        down: As `o`, by share of the hidden channels.
    """

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor


def layer_images(layer: ExpertLayer, head_dim: int) -> LayerImages:
    """Copies of a layer's weights, for heads of `head_dim` channels."""
    half = head_dim // 2
    # [heads, halves, eighths, 16, D]: the channels that rotate together are in one tile
    qkv = layer.qkv.unflatten(0, (-1, 2, half // 16, 16)).transpose(1, 2)
    gate_up = layer.gate_up.unflatten(0, (2, PROGRAMS, -1)).transpose(0, 1)  # [programs, 2, 32, D]
    return LayerImages(
        qkv=_image(qkv.flatten(0, -2), QKV_ROWS),
        o=_split_image(layer.o),
        gate_up=_image(gate_up.flatten(0, -2)),
        down=_split_image(layer.down),
    )


def point_prefix(flow: Flow, cache: Sequence[KeyValue], horizon: int) -> tuple[Tensor, ...]:
    """Say where every layer's prefix is, and give room for its images, which `prepare` fills.

    Args:
        flow: Its layers are filled in: the prefix, the images, `n_prefix`.
        cache: Keys and values, [1, 1, N, d] each; lengths may differ.
        horizon: H.

    Returns:
        What has to live until the launch. Last the images of all layers, one after the other: keys,
        then values, [P, d / 64, 64 keys, 64] each; after `prepare` zero where there is no prefix.
    """
    prefix = [tensor.contiguous() for pair in cache for tensor in pair]
    sizes = [blocks(t.shape[2], horizon) * KEYS * t.shape[3] for t in prefix]
    images = prefix[0].new_empty(sum(sizes))
    places = images.split(sizes)
    for index, layer in enumerate(flow.layers):
        layer.n_prefix = prefix[2 * index].shape[2]
        for which, (source, image) in enumerate(zip(PREFIX, IMAGES, strict=True)):
            setattr(layer, source, prefix[2 * index + which].data_ptr())
            setattr(layer, image, places[2 * index + which].data_ptr())
    return (*prefix, images)


def _split_image(weight: Tensor) -> Tensor:
    """[out, K] to the image of tiles of 64 rows, each cut along K into SHARES."""
    pieces = weight.unflatten(0, (-1, CHUNK)).unflatten(2, (SHARES, -1))  # [T, 64, S, K/S]
    return _image(pieces.transpose(1, 2).flatten(0, -2))


def _image(rows: Tensor, height: int = CHUNK) -> Tensor:
    """[R, K] to chunks, [R / height * K / 64, height, 64]."""
    chunks = rows.unflatten(0, (-1, height)).unflatten(2, (-1, CHUNK)).transpose(1, 2)
    return _swizzled(chunks).flatten(0, 1)


def _swizzled(chunks: Tensor) -> Tensor:
    """[..., n, 64] with the eight pieces of row r at piece ^ (r % 8)."""
    row = torch.arange(chunks.shape[-2], device=chunks.device)[:, None]
    pieces = torch.arange(8, device=chunks.device) ^ row % 8  # [n, 8]
    moved: Tensor = chunks.unflatten(-1, (8, 8))[..., row, pieces, :]  # [..., n, 8, 8]
    return moved.flatten(-2).contiguous()
