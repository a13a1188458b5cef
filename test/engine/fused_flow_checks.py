"""The flow in fused kernels against the plain one, as plain functions: a GPU may have no pytest.

python test/engine/fused_flow_checks.py            compares on CUDA at full size, then times it
python test/engine/fused_flow_checks.py --tune     searches block sizes
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from safe_pruner_node.engine.flow import ActionFlow, DeepProbe, DeepSettings, FlowSchedule
from safe_pruner_node.engine.fused_flow import FusedFlow
from safe_pruner_node.engine.kernels.tiles import (
    AttentionTiles,
    FlowTiles,
    PairTiles,
    SplitTiles,
)
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.pi05.config import TINY
from safe_pruner_node.pi05.model import Pi05

SMALL = replace(
    TINY,
    expert=replace(TINY.expert, width=64, mlp=128, depth=2, heads=2, kv_heads=1, head_dim=32),
    vlm=replace(TINY.vlm, depth=2, heads=2, kv_heads=1, head_dim=32),
    flow_steps=2,
)
SMALL_TILES = FlowTiles(
    qkv=PairTiles(16, 32),
    attention=AttentionTiles(rows=16, keys=16, splits=3, joined=4),
    o=SplitTiles(16, 2, 32),
    gate_up=PairTiles(16, 32),
    down=SplitTiles(32, 4, 32),
)


def random_expert(config, device="cpu", seed=0):
    """A model whose expert is random and lively: norms, gates and attention all matter."""
    random = torch.Generator(device).manual_seed(seed)
    with torch.device(device):
        model = Pi05(config).eval().requires_grad_(requires_grad=False)
    for name, parameter in model.named_parameters():
        fan = parameter.shape[-1] if parameter.dim() > 1 else 1
        std = 0.3 if "norm" in name else (1.5 / fan**0.5 if parameter.dim() > 1 else 0.1)
        if "norm" in name and parameter.dim() > 1:
            std = 0.5 / fan**0.5
        parameter.normal_(0.0, std, generator=random)
    return model


def random_cache(config, lengths, device="cpu", dtype=torch.float32, seed=1):
    random = torch.Generator(device).manual_seed(seed)
    g, d = config.vlm.kv_heads, config.vlm.head_dim
    return [
        tuple(
            torch.randn(1, g, n, d, generator=random, device=device).to(dtype) for _ in range(2)
        )
        for n in lengths
    ]


def plain(model, schedule, n_visual, deep, cache, noise, n_text, slots):
    """`ActionFlow` on the cache without its padding."""
    trimmed = [
        tuple(t[:, :, : t.shape[2] - (slots - n_text)] for t in pair) for pair in cache
    ]
    watch = None if deep is None else DeepProbe(deep, len(schedule))
    actions = ActionFlow(model, schedule, noise, n_visual + n_text).run(trimmed, None, watch)
    return actions, None if watch is None else watch.saliency()


def off(a, b):
    """|a - b| / |b|."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())
