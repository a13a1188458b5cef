"""Weights to begin with: a fresh model whose blocks start close to the identity."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from safe_pruner_node.pi05.config import Pi05Config
from safe_pruner_node.pi05.model import Gemma, Pi05, SiglipEmbeddings
from safe_pruner_node.pi05.tokenizer import PromptTokenizer


def fresh_model(config: Pi05Config, tokenizer: PromptTokenizer, seed: int) -> Pi05:
    """A trainable model with fan-in scaled weights.

    Three things are not random, because small data cannot afford to learn them: image patches
    begin with their place (2-D sines), the state's bins with their order (neighbouring numbers
    have similar embeddings), and the expert's residual gates are open.

    Args:
        config: Sizes.
        tokenizer: Says which pieces are numbers.
        seed: Of the random weights.
    """
    random = torch.Generator().manual_seed(seed)
    model = Pi05(config)
    with torch.no_grad():
        for module in model.modules():
            _randomize(module, random)
        model.vlm.embed_tokens.weight /= math.sqrt(config.vlm.width)  # scaled up again on use
        _order_numbers(model, tokenizer, random)
        for module in model.modules():
            if isinstance(module, SiglipEmbeddings):
                side = config.vision.image // config.vision.patch
                module.position_embedding.weight.copy_(grid_sines(side, config.vision.width))
        for stack in (model.vlm, model.expert):
            _soften_outputs(stack)
        _open_gates(model.expert)
        model.action_out_proj.weight *= 0.1
    return model.requires_grad_(requires_grad=True).train()


def _randomize(module: nn.Module, random: torch.Generator) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        fan_in = module.weight[0].numel()
        module.weight.normal_(0.0, fan_in**-0.5, generator=random)
        if module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, nn.Embedding):
        module.weight.normal_(0.0, 1.0, generator=random)


def _order_numbers(model: Pi05, tokenizer: PromptTokenizer, random: torch.Generator) -> None:
    """Give the pieces of the state's bins smooth functions of their value."""
    width = model.config.vlm.width
    ids = [(tokenizer.piece_id(f"▁{value}"), value) for value in range(-1, 256)]
    known = [(piece, value) for piece, value in ids if piece is not None]
    if not known:  # another tokenizer spells numbers in digits
        return
    values = torch.tensor([value for _, value in known]).float() / 256.0  # [M]
    waves = values[:, None] * torch.pi * torch.arange(1, 9)  # [M, 8]: half a turn and shorter
    features = torch.cat([waves.sin(), waves.cos(), values[:, None] * 2 - 1], 1)  # [M, 17]
    mix = torch.randn(features.shape[1], width, generator=random) / math.sqrt(9)
    rows = features @ mix / math.sqrt(width)
    model.vlm.embed_tokens.weight[[piece for piece, _ in known]] = rows


def grid_sines(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column of a square grid, [side * side, width]."""
    quarter = width // 4
    frequency = 1.0 / 100.0 ** (torch.arange(quarter) / quarter)  # [width / 4]
    angle = torch.arange(side)[:, None] * frequency  # [side, width / 4]
    one = torch.cat([angle.sin(), angle.cos()], 1)  # [side, width / 2]
    rows = one[:, None].expand(-1, side, -1)
    columns = one[None].expand(side, -1, -1)
    table = torch.cat([rows, columns], -1).flatten(0, 1)
    return nn.functional.pad(table, (0, width - table.shape[1]))


def _soften_outputs(stack: Gemma) -> None:
    """What a block adds is small against the stream, the more so the more blocks there are."""
    blocks = stack.blocks()
    for block in blocks:
        block.self_attn.o_proj.weight /= math.sqrt(2 * len(blocks))
        block.mlp.down_proj.weight /= math.sqrt(2 * len(blocks))


def _open_gates(expert: Gemma) -> None:
    """AdaRMS begins independent of the flow time, with every residual gate at 1."""
    for block in expert.blocks():
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.dense.weight.zero_()
            norm.dense.bias.zero_()
            norm.dense.bias[2 * norm.dense.out_features // 3 :] = 1.0
    expert.norm.dense.weight.zero_()
    expert.norm.dense.bias.zero_()
