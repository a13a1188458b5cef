"""The ways of running a step that are checked and timed, as settings of the pruner."""

from __future__ import annotations

from dataclasses import replace

from safe_pruner_node.pi05.config import Pi05Config
from safe_pruner_node.pruning.settings import PrunerSettings, load_preset

FULL = "full"
KEYFRAME = "keyframe"


def pruned_name(rho: float) -> str:
    """What a pruned step is called in tables."""
    return f"pruned {rho:g}"


def full() -> PrunerSettings:
    """Every token in every layer."""
    return load_preset(None, "vanilla")


def pruned(rho: float, config: Pi05Config, cameras: int, layer: int = 3) -> PrunerSettings:
    """SAFE, every step after the first a pruned one.

    Args:
        rho: Share of the visual tokens that is dropped.
        config: Decides how high a camera's floor can be where few tokens are kept.
        cameras: Likewise.
        layer: VLM layers that see every token.
    """
    settings = replace(load_preset(None, "robot"), rho=rho, layer=layer, gamma=-1.0)
    highest = settings.kept(cameras * config.vision.tokens) // cameras
    return replace(settings, camera_floor=min(settings.camera_floor, highest))


def keyframe(config: Pi05Config, cameras: int) -> PrunerSettings:
    """SAFE, every step a keyframe: kappa is at most 1."""
    return replace(pruned(0.0, config, cameras), gamma=2.0)


def fixed_tokens(rho: float) -> PrunerSettings:
    """Tokens drawn from a seed, so that every path keeps the same ones whatever it computes."""
    return replace(load_preset(None, "random"), rho=rho)
