"""Operations and bytes that each stage cannot do without, and the time they take at the ceilings.

Counted from the model's sizes: two operations per multiply-add, every weight read once per pass
in bf16, keys and values written and read once. Norms, activations and the pruner's own work are
not counted: a floor, not a forecast.
"""

from __future__ import annotations

from dataclasses import dataclass

from safe_pruner_node.evaluation.bench_gpu.ceilings import Ceilings
from safe_pruner_node.evaluation.bench_gpu.gpu_timing import DENOISE, PREFILL, VISION
from safe_pruner_node.evaluation.bench_gpu.queries import Shape
from safe_pruner_node.pi05.config import GemmaConfig, Pi05Config, VisionConfig
from safe_pruner_node.pruning.flops import PrefillSize, executed_prefill, layer_macs

BYTES = 2
"""Per weight, key and value: bf16."""


@dataclass(frozen=True)
class Cost:
    """What a stage has to do.

    Attributes:
        flops: Floating point operations.
        bytes: Bytes to and from device memory.
    """

    flops: float
    bytes: float

    def floor_ms(self, ceilings: Ceilings) -> float:
        """Milliseconds at the ceilings: operations and transfers overlap perfectly."""
        return 1e3 * max(self.flops / ceilings.flop_per_s, self.bytes / ceilings.bytes_per_s)


def stage_costs(
    config: Pi05Config, shape: Shape, layer: int | None = None, n_kept: int | None = None
) -> dict[str, Cost]:
    """Vision, prefill and denoise of one step.

    Args:
        config: The model's sizes.
        shape: Cameras, prompt and horizon.
        layer: VLM layers that see every token; None when nothing is pruned.
        n_kept: Visual tokens kept after them.
    """
    n_visual = shape.cameras * config.vision.tokens
    n = n_visual + shape.prompt
    n_late = n if n_kept is None else n_kept + shape.prompt
    vlm = _size(config.vlm)
    kv_bytes = 2 * config.vlm.kv_heads * config.vlm.head_dim * BYTES  # of one token and layer
    early = config.vlm.depth if layer is None else layer
    cached = early * n + (config.vlm.depth - early) * n_late  # tokens, summed over the layers
    full_layers = (config.vlm.depth - 1) * _layer_weights(config.vlm)
    last_layer = 2 * config.vlm.width * config.vlm.kv_heads * config.vlm.head_dim
    expert = config.expert.depth * _layer_weights(config.expert)
    suffix = sum(
        _expert_layer_macs(config.expert, shape.horizon, n if i < early else n_late)
        for i in range(config.expert.depth)
    )
    return {
        VISION: Cost(
            2.0 * shape.cameras * _vision_macs(config), BYTES * float(_vision_weights(config))
        ),
        PREFILL: Cost(
            executed_prefill(n, vlm, layer, None if n_kept is None else n_late),
            float(BYTES * (full_layers + last_layer) + kv_bytes * cached),
        ),
        DENOISE: Cost(
            2.0 * config.flow_steps * suffix,
            float(config.flow_steps * (BYTES * expert + kv_bytes * cached)),
        ),
    }


def _size(config: GemmaConfig) -> PrefillSize:
    return PrefillSize(
        config.width, config.mlp, config.depth, config.heads, config.kv_heads, config.head_dim
    )


def _layer_weights(config: GemmaConfig) -> int:
    """Weights of one layer's matrices; the expert's modulation can be computed beforehand."""
    query = config.heads * config.head_dim
    keys_values = 2 * config.kv_heads * config.head_dim
    return config.width * (2 * query + keys_values + 3 * config.mlp)


def _expert_layer_macs(config: GemmaConfig, horizon: int, n_prefix: int) -> float:
    """Multiply-adds of the action rows, which also attend to the prefix."""
    prefix = 2 * horizon * n_prefix * config.heads * config.head_dim
    return layer_macs(horizon, _size(config)) + prefix


def _vision_weights(config: Pi05Config) -> int:
    tower = config.vision
    layer = 4 * tower.width**2 + 2 * tower.width * tower.mlp
    patches = 3 * tower.patch**2 * tower.width
    return tower.depth * layer + patches + tower.width * config.vlm.width


def _vision_macs(config: Pi05Config) -> float:
    """Multiply-adds of one image: every weight once per token, and the attention."""
    tower: VisionConfig = config.vision
    attention = tower.depth * 2 * tower.tokens**2 * tower.width
    return float(tower.tokens * _vision_weights(config) + attention)
