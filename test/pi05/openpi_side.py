"""The other side of the parity tests: runs openpi's own code, inside `.venv-parity`.

openpi imports JAX, flax and orbax at module level. What is compared here uses none of them, so
stand-ins take their place before openpi is imported: the arithmetic that runs is openpi's own.

    python openpi_side.py COMMAND DIR     reads DIR/*.npz, *.json, writes DIR/answer.*
"""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import torch
import transformers
from safetensors.torch import load_model

PUBLISHED = {
    "gemma_2b": {
        "width": 2048,
        "depth": 18,
        "mlp_dim": 16384,
        "num_heads": 8,
        "num_kv_heads": 1,
        "head_dim": 256,
    },
    "gemma_300m": {
        "width": 1024,
        "depth": 18,
        "mlp_dim": 4096,
        "num_heads": 8,
        "num_kv_heads": 1,
        "head_dim": 256,
    },
}
"""openpi.models.gemma.get_config, which cannot be imported without JAX."""


def stand_in(name, **attributes):
    """Put a module under a name; what is not given is a mock that nothing compared reads."""
    module = MagicMock() if not attributes else ModuleType(name)
    for key, value in attributes.items():
        setattr(module, key, value)
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(importlib.import_module(parent), leaf, module)
    sys.modules[name] = module


def flatten_dict(tree, sep):
    """As flax.traverse_util.flatten_dict."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{key}{sep}{k}": v for k, v in flatten_dict(value, sep).items()}
        else:
            flat[key] = value
    return flat


def unflatten_dict(flat, sep):
    """As flax.traverse_util.unflatten_dict."""
    tree = {}
    for key, value in flat.items():
        *parents, last = key.split(sep)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def without_jax():
    """Make openpi importable."""
    # transformers looks for flax and jax when it is first used: let it find none
    assert transformers.GemmaForCausalLM
    assert transformers.PaliGemmaForConditionalGeneration
    assert transformers.AutoProcessor
    for name in ("jax", "jax.numpy", "flax", "orbax", "orbax.checkpoint"):
        stand_in(name)
    stand_in("flax.traverse_util", flatten_dict=flatten_dict, unflatten_dict=unflatten_dict)
    stand_in("openpi.shared.array_typing")
    sys.modules["openpi.shared.array_typing"].typecheck = lambda function: function
    stand_in("openpi.shared.download")
    stand_in("openpi.models.utils.fsq_tokenizer")
    stand_in("openpi.models.gemma")


def gemma(config):
    """Our GemmaConfig as JSON to openpi's names."""
    return {
        "width": config["width"],
        "depth": config["depth"],
        "mlp_dim": config["mlp"],
        "num_heads": config["heads"],
        "num_kv_heads": config["kv_heads"],
        "head_dim": config["head_dim"],
    }


def build(config, dtype="float32"):
    """openpi's PI0Pytorch with the sizes of our configuration (None: the published ones)."""
    from openpi.models_pytorch import gemma_pytorch, pi0_pytorch

    variants = PUBLISHED
    if config is not None:  # openpi fixes the vision tower and the vocabulary
        variants = {"gemma_2b": gemma(config["vlm"]), "gemma_300m": gemma(config["expert"])}

        def small_paligemma(config, sizes=config):
            vision = config.vision_config
            vision.hidden_size = sizes["vision"]["width"]
            vision.num_hidden_layers = sizes["vision"]["depth"]
            vision.intermediate_size = sizes["vision"]["mlp"]
            vision.num_attention_heads = sizes["vision"]["heads"]
            vision.projection_dim = sizes["vlm"]["width"]
            config.text_config.vocab_size = sizes["vocab_size"]
            return transformers.PaliGemmaForConditionalGeneration(config)

        def small_expert(config, sizes=config):
            config.vocab_size = sizes["vocab_size"]
            return transformers.GemmaForCausalLM(config)

        gemma_pytorch.PaliGemmaForConditionalGeneration = small_paligemma
        gemma_pytorch.GemmaForCausalLM = small_expert
    pi0_pytorch._gemma.get_config = lambda variant: SimpleNamespace(**variants[variant])
    horizon = 50 if config is None else config["horizon"]
    return pi0_pytorch.PI0Pytorch(
        SimpleNamespace(
            pi05=True,
            paligemma_variant="gemma_2b",
            action_expert_variant="gemma_300m",
            dtype=dtype,
            action_horizon=horizon,
            action_dim=32,
        )
    ).eval()


def observation(data):
    """An openpi observation of one padded query."""
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    return SimpleNamespace(
        images={c: torch.from_numpy(data[f"image_{c}"]) for c in cameras},
        image_masks={c: torch.from_numpy(data[f"mask_{c}"]) for c in cameras},
        state=torch.zeros(1, 32),
        tokenized_prompt=torch.from_numpy(data["tokens"]),
        tokenized_prompt_mask=torch.from_numpy(data["token_mask"]),
        token_ar_mask=None,
        token_loss_mask=None,
    )


def sample(directory):
    """Whole `sample_actions` of every case in DIR/case_*/."""
    answers = {}
    for case in sorted(directory.glob("case_*")):
        config = json.loads((case / "sizes.json").read_text())
        model = build(config, config.pop("dtype"))
        load_model(model, case / "model.safetensors")  # strict, as openpi's own loader
        data = np.load(case / "query.npz")
        actions = type(model).sample_actions(  # the class's: the instance's is torch.compile'd
            model, "cpu", observation(data), torch.from_numpy(data["noise"]), int(data["steps"])
        )
        answers[case.name] = actions.float().numpy()
    np.savez(directory / "answer.npz", **answers)


def keys(directory):
    """Names and shapes of the published model's parameters, on the meta device."""
    with torch.device("meta"):
        model = build(None, "bfloat16")
    state = model.state_dict(keep_vars=True)
    seen, saved, tied = {}, {}, []
    for name in sorted(state):  # as safetensors.torch.save_model: one name per shared tensor
        if id(state[name]) in seen:
            tied.append(name)
        else:
            seen[id(state[name])] = name
            saved[name] = list(state[name].shape)
    dtypes = {name: str(tensor.dtype) for name, tensor in state.items()}
    answer = {"saved": saved, "tied": tied, "dtypes": dtypes}
    (directory / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    without_jax()
    {"sample": sample, "keys": keys}[sys.argv[1]](Path(sys.argv[2]))
