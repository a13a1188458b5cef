"""Takes over a live π0.5 model of openpi or LeRobot: the same tensors, no copy."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.checkpoint import EMBED_TOKENS, PALIGEMMA, check_shapes, model_keys
from safe_pruner_node.pi05.config import PI05, GemmaConfig, Pi05Config, VisionConfig
from safe_pruner_node.pi05.model import Pi05

SOURCE = "live model"
VISION = f"{PALIGEMMA}.model.vision_tower.vision_model."
VLM_LAYERS = f"{PALIGEMMA}.model.language_model.layers."
EXPERT_LAYERS = "paligemma_with_expert.gemma_expert.model.layers."


def adopt(live_model: nn.Module) -> Pi05:
    """Build a `Pi05` on the parameters of a live model.

    The parameters are the very objects of the live model: nothing is copied, and training the
    one trains the other.

    Args:
        live_model: openpi's `PI0Pytorch` (π0.5), or LeRobot's `PI05Policy` or its `.model`.

    Returns:
        The model, on the device and in the types of the live one.

    Raises:
        ConfigError: It is something else, or its parameters are not those of a π0.5.
    """
    core = live_model
    if not hasattr(core, "paligemma_with_expert"):
        core = getattr(live_model, "model", live_model)  # LeRobot's policy holds the network there
    if not isinstance(core, nn.Module) or not hasattr(core, "paligemma_with_expert"):
        expected = "openpi's PI0Pytorch or LeRobot's PI05Policy"
        raise ConfigError(SOURCE, "", type(live_model).__name__, expected)
    parameters = core.state_dict(keep_vars=True)
    names = model_keys(list(parameters))
    shapes = {ours: list(parameters[theirs].shape) for ours, theirs in names.items()}
    model = check_shapes(SOURCE, shapes, _read_config(core, shapes))
    # with keep_vars and assign the Parameter objects themselves change hands
    model.load_state_dict({ours: parameters[theirs] for ours, theirs in names.items()}, assign=True)
    return model.eval()


def _read_config(core: nn.Module, shapes: Mapping[str, list[int]]) -> Pi05Config:
    """Sizes from the parameters' shapes, and head counts from the network's own configs."""

    def size(name: str, axis: int = 0) -> int:
        if name not in shapes:
            raise ConfigError(SOURCE, name, "no such parameter", "a π0.5")
        return shapes[name][axis]

    def depth(layers: str) -> int:
        return len({n.removeprefix(layers).split(".")[0] for n in shapes if n.startswith(layers)})

    def gemma(layers: str) -> GemmaConfig:
        kv_heads = _attribute(core, f"{PALIGEMMA}.config.text_config.num_key_value_heads")
        head_dim = size(f"{layers}0.self_attn.k_proj.weight") // kv_heads
        return GemmaConfig(
            width=size(f"{layers}0.self_attn.q_proj.weight", 1),
            depth=depth(layers),
            mlp=size(f"{layers}0.mlp.gate_proj.weight"),
            heads=size(f"{layers}0.self_attn.q_proj.weight") // head_dim,
            kv_heads=kv_heads,
            head_dim=head_dim,
        )

    patch = size(f"{VISION}embeddings.patch_embedding.weight", 2)
    config = getattr(core, "config", None)
    return Pi05Config(
        vision=VisionConfig(
            width=size(f"{VISION}embeddings.patch_embedding.weight"),
            depth=depth(f"{VISION}encoder.layers."),
            mlp=size(f"{VISION}encoder.layers.0.mlp.fc1.weight"),
            heads=_attribute(core, f"{PALIGEMMA}.config.vision_config.num_attention_heads"),
            patch=patch,
            image=patch * math.isqrt(size(f"{VISION}embeddings.position_embedding.weight")),
        ),
        vlm=gemma(VLM_LAYERS),
        expert=gemma(EXPERT_LAYERS),
        vocab_size=size(EMBED_TOKENS),
        action_dim=size("action_out_proj.weight"),
        # openpi's name, LeRobot's name, what both default to
        horizon=_first_of(config, ("action_horizon", "chunk_size"), PI05.horizon),
        flow_steps=_first_of(config, ("num_inference_steps",), PI05.flow_steps),
        max_prompt_tokens=_first_of(
            config, ("max_token_len", "tokenizer_max_length"), PI05.max_prompt_tokens
        ),
        name="live",
    )


def _attribute(root: object, path: str) -> int:
    value: object = root
    for name in path.split("."):
        value = getattr(value, name, None)
    if not isinstance(value, int):
        raise ConfigError(SOURCE, path, value, "an integer")
    return value


def _first_of(config: object, names: tuple[str, ...], default: int) -> int:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), default)
