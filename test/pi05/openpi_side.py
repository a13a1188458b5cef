"""The other side of the parity tests: runs openpi's own code, inside `.venv-parity`.

openpi imports JAX, flax and orbax at module level. What is compared here uses none of them, so
stand-ins take their place before openpi is imported: the arithmetic that runs is openpi's own.

    python openpi_side.py COMMAND DIR     reads DIR/*.npz, *.json, writes DIR/answer.*
"""

import importlib
import json
import sys
from dataclasses import dataclass
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


STEPS = 10
"""openpi's default number of Euler steps."""
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


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
    stand_in("flax.struct", dataclass=dataclass(frozen=True))
    stand_in("flax.nnx", Module=type("Module", (), {}))
    stand_in("augmax")
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
    return SimpleNamespace(
        images={c: torch.from_numpy(data[f"image_{c}"]) for c in CAMERAS},
        image_masks={c: torch.from_numpy(data[f"mask_{c}"]) for c in CAMERAS},
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
            model, "cpu", observation(data), torch.from_numpy(data["noise"]), STEPS
        )
        answers[case.name] = actions.float().numpy()
        with torch.no_grad():
            image = torch.from_numpy(data[f"image_{CAMERAS[0]}"])
            tokens = model.paligemma_with_expert.embed_image(image)
        answers[f"{case.name}_image_tokens"] = tokens.float().numpy()
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


def share(directory):
    """`adopt` on a live openpi model, alone and as `.model` of a policy like LeRobot's."""
    from safe_pruner_node.pi05.adopt import adopt

    case = directory / "case_0"
    config = json.loads((case / "sizes.json").read_text())
    live = build(config, config.pop("dtype"))
    load_model(live, case / "model.safetensors")
    data = np.load(case / "query.npz")
    noise = torch.from_numpy(data["noise"])
    images = [torch.from_numpy(data[f"image_{c}"]) for c in CAMERAS if data[f"mask_{c}"].all()]
    tokens = torch.from_numpy(data["tokens"])[:, data["token_mask"][0]]

    def compare(live_model, core):
        ours = adopt(live_model)
        pointers = {p.data_ptr() for p in core.parameters()}
        theirs = type(core).sample_actions(core, "cpu", observation(data), noise, STEPS)
        return {
            "config": ours.config.to_json(),
            "own_storage": [n for n, p in ours.named_parameters() if p.data_ptr() not in pointers],
            "error": (ours.sample_actions(images, tokens, noise) - theirs).abs().max().item(),
        }

    answer = {"openpi": compare(live, live)}
    with torch.no_grad():  # a training step on the live model
        live.action_out_proj.bias += 0.5
    answer["after a change"] = compare(live, live)
    # LeRobot needs a newer Python; its policy holds a network of the same names in `.model`
    policy = torch.nn.Module()
    policy.model = live
    live.config.chunk_size = live.config.action_horizon
    answer["policy"] = compare(policy, live)
    live.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
    for part in ("vision_tower", "multi_modal_projector"):  # LeRobot keeps these in fp32
        getattr(live.paligemma_with_expert.paligemma.model, part).float()
    mixed = adopt(policy)
    answer["mixed_finite"] = bool(mixed.sample_actions(images, tokens, noise).isfinite().all())
    (directory / "answer.json").write_text(json.dumps(answer))


def transforms(directory):
    """openpi's pre- and post-processing of DIR/query.npz, in the order its policy runs it."""
    import openpi.transforms as t
    from openpi.models.model import Observation
    from openpi.models.tokenizer import PaligemmaTokenizer
    from openpi.shared import image_tools, normalize

    tokenizer_path = directory / "tokenizer.model"
    sys.modules["openpi.shared.download"].maybe_download = lambda *_, **__: tokenizer_path
    stats = normalize.load(directory)
    data = np.load(directory / "query.npz")
    prompts = json.loads((directory / "prompts.json").read_text())
    tokenizer = PaligemmaTokenizer(200)
    answer = {}
    for i, prompt in enumerate(prompts):
        inputs = t.compose(
            [
                t.Normalize(stats, use_quantiles=True),
                t.ResizeImages(224, 224),
                t.TokenizePrompt(tokenizer, discrete_state_input=True),
                t.PadStatesAndActions(32),
            ]
        )({"state": data["state"][i], "image": {"c": data[f"image_{i}"]}, "prompt": prompt})
        without_state, mask = tokenizer.tokenize(prompt)
        resized = inputs["image"]["c"]
        batch = {
            "image": {"c": torch.from_numpy(resized.copy())[None]},
            "image_mask": {"c": torch.ones(1, dtype=torch.bool)},
            "state": torch.from_numpy(inputs["state"])[None],
        }
        answer |= {
            f"state_{i}": inputs["state"],
            f"resized_{i}": resized,
            f"tokens_{i}": inputs["tokenized_prompt"][inputs["tokenized_prompt_mask"]],
            f"tokens_without_state_{i}": without_state[mask],
            f"pixels_{i}": Observation.from_dict(batch).images["c"].numpy(),
        }
        pixels = torch.from_numpy(data[f"image_{i}"])[None].float() / 255.0 * 2.0 - 1.0
        answer[f"torch_pixels_{i}"] = image_tools.resize_with_pad_torch(pixels, 224, 224).numpy()
    for use_quantiles in (True, False):
        name = "quantile" if use_quantiles else "mean_std"
        outputs = t.Unnormalize(stats, use_quantiles=use_quantiles)(
            {"state": data["padded_state"], "actions": data["actions"]}
        )
        answer[f"actions_{name}"] = outputs["actions"]
        outputs["actions"] = outputs["actions"][..., :16].copy()
        absolute = t.AbsoluteActions(data["delta_mask"])(outputs)
        answer[f"absolute_{name}"] = absolute["actions"]
        answer[f"relative_to_{name}"] = absolute["state"]
        state = t.Normalize(stats, use_quantiles=use_quantiles)({"state": data["state"]})["state"]
        answer[f"normalized_{name}"] = state
    np.savez(directory / "answer.npz", **answer)


if __name__ == "__main__":
    without_jax()
    commands = {"sample": sample, "keys": keys, "share": share, "transforms": transforms}
    commands[sys.argv[1]](Path(sys.argv[2]))
