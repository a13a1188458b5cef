"""The roofline against the published model's known sizes and an independent estimate."""

from dataclasses import replace

import pytest
import torch

from safe_pruner_node.evaluation.bench_gpu.ceilings import Ceilings
from safe_pruner_node.evaluation.bench_gpu.policy import SIZES
from safe_pruner_node.evaluation.bench_gpu.queries import BASE
from safe_pruner_node.evaluation.bench_gpu.roofline import Cost, stage_costs
from safe_pruner_node.pi05.config import PI05
from safe_pruner_node.pi05.model import Pi05

TABLES = ("position_embedding.weight", "embed_tokens.weight")  # looked up, not multiplied
H200 = Ceilings(bytes_per_s=4.3e12, flop_per_s=790e12)


def floors(costs):
    return {stage: cost.floor_ms(H200) for stage, cost in costs.items()}


def test_floors_of_the_published_model_are_those_estimated_by_hand():
    full = floors(stage_costs(PI05, BASE))
    pruned = floors(stage_costs(PI05, BASE, layer=3, n_kept=round(0.2 * 768)))
    assert full == pytest.approx({"vision": 0.85, "prefill": 4.35, "denoise": 1.6}, rel=0.08)
    # By hand without what layer ls-1 saves: all of its rows but the kept ones stop after K and V.
    saved = (1 - (154 + 120) / 888) * full["prefill"] / 17
    assert pruned["prefill"] == pytest.approx(1.85 - saved, rel=0.05)
    assert pruned["vision"] == full["vision"]


def test_every_matrix_of_the_model_is_counted_once():
    """Bytes without a prompt or a prefix are those of the weights alone."""
    with torch.device("meta"):
        model = Pi05(PI05)
    n_weights = {
        part: sum(
            p.numel()
            for name, p in model.named_parameters()
            if part in name and p.ndim > 1 and not name.endswith(TABLES)
        )
        for part in ("vision_tower", "multi_modal", "language_model", "gemma_expert")
    }
    costs = stage_costs(PI05, replace(BASE, prompt=0, cameras=0, horizon=0))
    vision = n_weights["vision_tower"] + n_weights["multi_modal"]
    assert costs["vision"].bytes == 2 * vision
    last = PI05.vlm.width * (2 * 2048 + 3 * PI05.vlm.mlp)  # its queries, output and MLP: not run
    assert costs["prefill"].bytes == 2 * (n_weights["language_model"] - last)
    modulation = sum(
        p.numel() for name, p in model.named_parameters() if "norm.dense.weight" in name
    )
    assert costs["denoise"].bytes == 2 * 10 * (n_weights["gemma_expert"] - modulation)


def test_the_slower_of_both_ceilings_decides():
    ceilings = Ceilings(bytes_per_s=10.0, flop_per_s=100.0)
    assert Cost(flops=100.0, bytes=1.0).floor_ms(ceilings) == 1000.0
    assert Cost(flops=100.0, bytes=20.0).floor_ms(ceilings) == 2000.0


@pytest.mark.parametrize("size", ["full", "small"])
def test_pruning_saves_prefill_and_less_of_the_denoising(size):
    config = SIZES[size]
    n_visual = 3 * config.vision.tokens
    costs = [stage_costs(config, BASE, 3, kept) for kept in (n_visual, n_visual // 2, 1)]
    for stage in ("prefill", "denoise"):
        assert costs[0][stage].flops > costs[1][stage].flops > costs[2][stage].flops
        assert costs[0][stage].bytes > costs[1][stage].bytes > costs[2][stage].bytes
    assert stage_costs(config, BASE)["denoise"] == costs[0]["denoise"]
