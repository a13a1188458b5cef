"""From what happened in a session to the report that the node publishes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from safe_pruner_node.engine.session import SessionStep
from safe_pruner_node.pi05.config import Pi05Config
from safe_pruner_node.pruning.base import Context, Decision
from safe_pruner_node.pruning.flops import PrefillSize, executed_prefill, paper_prefill
from safe_pruner_node.pruning.settings import PrunerSettings
from safe_pruner_node.types import Flops, StepReport

OPENPI_CAMERAS = 3
"""Camera slots that openpi and lerobot always run, empty or not."""

_NAN = float("nan")


def step_report(
    step: SessionStep,
    settings: PrunerSettings,
    config: Pi05Config,
    stage_ms: Mapping[str, float],
    engine: str,
) -> StepReport:
    """Fill in the report of one policy query.

    Args:
        step: What the session says.
        settings: The pruner in force.
        config: The model's sizes.
        stage_ms: Stage to milliseconds, in the order they ran.
        engine: Which path ran.
    """
    decision = step.decision
    kept = kept_indices(decision, step.context)
    n_kept = None if decision.keep is None else len(decision.keep)
    vanilla = settings.is_vanilla
    return StepReport(
        pruner=settings.method,
        query=step.query,
        keyframe=decision.keyframe,
        keyframe_reason=decision.reason,
        kappa=decision.kappa,
        gamma=settings.gamma if settings.method == "safe" else _NAN,
        rho=0.0 if vanilla else settings.rho,
        visual_tokens=dict(step.context.cameras),
        kept_tokens={name: len(indices) for name, indices in kept.items()},
        kept_indices=kept,
        text_tokens=step.n_text,
        flops=step_flops(config, settings, step.context, step.n_text, n_kept),
        engine=engine,
        stage_ms=dict(stage_ms),
    )


def kept_indices(decision: Decision, context: Context) -> dict[str, NDArray[np.int64]]:
    """Camera to kept token indices within that camera, ascending."""
    cameras = zip(context.cameras, context.camera_slices, strict=True)
    if decision.keep is None:
        return {name: np.arange(tokens, dtype=np.int64) for (name, tokens), _ in cameras}
    keep = decision.keep.cpu().numpy()
    return {
        name: keep[(keep >= span.start) & (keep < span.stop)] - span.start
        for (name, _), span in cameras
    }


def step_flops(
    config: Pi05Config,
    settings: PrunerSettings,
    context: Context,
    n_text: int,
    n_kept: int | None,
) -> Flops:
    """Prefill cost of a step; `n_kept` is None when no visual token was dropped."""
    vlm = config.vlm
    size = PrefillSize(vlm.width, vlm.mlp, vlm.depth, vlm.heads, vlm.kv_heads, vlm.head_dim)
    n_visual = sum(tokens for _, tokens in context.cameras)
    n_padded_visual = max(len(context.cameras), OPENPI_CAMERAS) * config.vision.tokens
    n_padded = n_padded_visual + config.max_prompt_tokens
    n = n_visual + n_text
    if n_kept is None:
        return Flops(
            paper_padded=paper_prefill(n_padded, size),
            paper_trimmed=paper_prefill(n, size),
            exact=executed_prefill(n, size),
        )
    layer = settings.layer
    n_padded_kept = settings.kept(n_padded_visual) + config.max_prompt_tokens
    return Flops(
        paper_padded=paper_prefill(n_padded, size, layer, n_padded_kept),
        paper_trimmed=paper_prefill(n, size, layer, n_kept + n_text),
        exact=executed_prefill(n, size, layer, n_kept + n_text),
    )
