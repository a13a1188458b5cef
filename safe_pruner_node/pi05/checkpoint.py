"""Loads and saves π0.5 checkpoint directories in openpi's and in lerobot's layout.

The model is built on the meta device and every tensor goes straight from the file to its place,
so loading needs the memory of the model and not a multiple of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.config import PI05, GemmaConfig, Pi05Config, read_json
from safe_pruner_node.pi05.model import Pi05
from safe_pruner_node.pi05.stats_files import (
    read_lerobot,
    read_openpi,
    write_lerobot,
    write_openpi,
)
from safe_pruner_node.pi05.transforms import NormStats, Origin

WEIGHTS = "model.safetensors"
PALIGEMMA = "paligemma_with_expert.paligemma"
EMBED_TOKENS = f"{PALIGEMMA}.model.language_model.embed_tokens.weight"
LM_HEAD = f"{PALIGEMMA}.lm_head.weight"
EXPERT_LM_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
VISION_TOWER = f"{PALIGEMMA}.model.vision_tower."

OWN_SIZES = "safe_pruner_node"
"""Key in `config.json` under which sizes other than the published model's are written."""

VARIANTS: dict[str, tuple[str, GemmaConfig]] = {
    "paligemma_variant": ("gemma_2b", PI05.vlm),
    "action_expert_variant": ("gemma_300m", PI05.expert),
}
"""The variants of openpi's and lerobot's config that make a π0.5."""

FP32_IN_MIXED = (
    "embeddings.patch_embedding.",
    "embeddings.position_embedding.",
    "input_layernorm.",
    "post_attention_layernorm.",
    "language_model.norm.",
    "gemma_expert.model.norm.",
    "action_in_proj.",
    "action_out_proj.",
    "time_mlp_in.",
    "time_mlp_out.",
)
"""Parameters that stay fp32 when the rest is bf16: openpi's `to_bfloat16_for_selected_params`."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        directory: Where it came from.
        model: The model, in evaluation mode.
        config: Its sizes.
        origin: Whose layout it is, and so whose pre- and post-processing it needs.
        norm_stats: Normalisation; None when the directory has none (openpi's converter does
            not copy the assets).
        asset_id: Which of openpi's assets the statistics came from; empty for lerobot.
        tokenizer_path: The SentencePiece file it ships; None when it ships none.
        identity: Short content hash for reports.
    """

    directory: Path
    model: Pi05
    config: Pi05Config
    origin: Origin
    norm_stats: NormStats | None
    asset_id: str
    tokenizer_path: Path | None
    identity: str

    @property
    def stats_path(self) -> Path:
        """The file that the statistics come from, or would come from if they were there."""
        if self.origin == "lerobot":
            return self.directory / "policy_preprocessor.json"
        return self.directory / "assets" / (self.asset_id or "<asset_id>") / "norm_stats.json"


def load_checkpoint(
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    asset_id: str | None = None,
) -> Checkpoint:
    """Load an openpi or lerobot π0.5 checkpoint directory.

    Args:
        directory: Holds `config.json` and `model.safetensors`.
        device: Where the weights go.
        dtype: ``fp32``, ``bf16`` (openpi's mixed precision), or ``auto``: bf16 on CUDA, else fp32.
        asset_id: Which of several openpi assets' statistics to use.

    Raises:
        ConfigError: Anything missing, truncated, mis-shaped, unexpected or contradictory.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError("parameter", "checkpoint", directory, "an existing directory")
    config_path = directory / "config.json"
    raw = read_json(config_path)
    origin: Origin = "lerobot" if "type" in raw else "openpi"
    config = _read_config(raw, config_path, origin)
    device = torch.device(device)
    cast = _cast_rule(dtype, device)
    model = _load_weights(directory / WEIGHTS, config, device, cast)
    if origin == "lerobot":
        has_stats = (directory / "policy_preprocessor.json").is_file()
        norm_stats = read_lerobot(directory) if has_stats else None
        asset_id = ""
    else:
        norm_stats, asset_id = _read_assets(directory, asset_id)
    _check_stats(directory, norm_stats, config)
    tokenizer = directory / "tokenizer.model"
    return Checkpoint(
        directory,
        model,
        config,
        origin,
        norm_stats,
        asset_id,
        tokenizer if tokenizer.is_file() else None,
        checkpoint_id(directory),
    )


def _read_config(raw: Mapping[str, Any], path: Path, origin: Origin) -> Pi05Config:
    """Sizes from openpi's or lerobot's `config.json`."""
    if origin == "lerobot" and raw["type"] != "pi05":
        raise ConfigError(path, "type", raw["type"], "pi05")
    names = {"action_dim": "action_dim", "action_horizon": "horizon"}
    if origin == "lerobot":
        names = {
            "max_action_dim": "action_dim",
            "chunk_size": "horizon",
            "num_inference_steps": "flow_steps",
            "tokenizer_max_length": "max_prompt_tokens",
        }
    if OWN_SIZES in raw:
        base = Pi05Config.from_json(path, raw[OWN_SIZES])
    else:
        base = PI05
        for key, (variant, _) in VARIANTS.items():
            if raw.get(key) != variant:
                raise ConfigError(path, key, raw.get(key), variant)
    sizes: dict[str, int] = {}
    for key, field in names.items():
        value = raw.get(key)
        if type(value) is not int or value < 1:
            raise ConfigError(path, key, value, "a positive integer")
        sizes[field] = value
    return replace(base, **sizes)  # type: ignore[arg-type]  # integer fields only


def _read_assets(directory: Path, asset_id: str | None) -> tuple[NormStats | None, str]:
    """Statistics of an openpi checkpoint: the named asset, or the only one."""
    assets = directory / "assets"
    if asset_id is not None:
        path = assets / asset_id / "norm_stats.json"
        if not path.is_file():
            raise ConfigError("parameter", "asset_id", path, "an existing file")
        return read_openpi(path), asset_id
    found = sorted(assets.rglob("norm_stats.json")) if assets.is_dir() else []
    names = [path.parent.relative_to(assets).as_posix() for path in found]
    if len(found) > 1:
        raise ConfigError(assets, "asset_id", names, "one asset, or the parameter naming one")
    return (read_openpi(found[0]), names[0]) if found else (None, "")


def _check_stats(directory: Path, stats: NormStats | None, config: Pi05Config) -> None:
    if stats and max(stats.state.dim, stats.actions.dim) > config.action_dim:
        sizes = f"state {stats.state.dim}, actions {stats.actions.dim}"
        raise ConfigError(directory, "norm_stats", sizes, f"at most {config.action_dim} channels")


def _cast_rule(dtype: str, device: torch.device) -> Callable[[str], torch.dtype]:
    """Which type each parameter gets."""
    if dtype not in {"auto", "fp32", "bf16"}:
        raise ConfigError("parameter", "dtype", dtype, "auto, fp32 or bf16")
    if dtype == "fp32" or (dtype == "auto" and device.type != "cuda"):
        return lambda _: torch.float32
    return mixed_dtype


def mixed_dtype(name: str) -> torch.dtype:
    """Type of a parameter under openpi's mixed precision."""
    keep = any(part in name for part in FP32_IN_MIXED)
    return torch.float32 if keep else torch.bfloat16


def model_keys(keys: Sequence[str]) -> dict[str, str]:
    """Map our parameter names to the names of a file or of a live model.

    Strips lerobot's leading ``model.``, takes the text embedding from the tied ``lm_head`` where
    it is absent, drops the ``lm_head``s, and inserts ``vision_model.`` where a newer export left
    it out.
    """
    names: dict[str, str] = {}
    for key in keys:
        name = key.removeprefix("model.")
        if name.startswith(VISION_TOWER) and not name.startswith(f"{VISION_TOWER}vision_model."):
            name = f"{VISION_TOWER}vision_model.{name.removeprefix(VISION_TOWER)}"
        names[name] = key
    head = names.pop(LM_HEAD, None)
    if head is not None:
        names.setdefault(EMBED_TOKENS, head)
    names.pop(EXPERT_LM_HEAD, None)
    return names


def check_shapes(
    source: str | Path, found: Mapping[str, Sequence[int]], config: Pi05Config
) -> Pi05:
    """Compare parameter shapes with those of a config; return that model on the meta device.

    Raises:
        ConfigError: Names what is missing, unexpected and mis-shaped.
    """
    with torch.device("meta"):
        model = Pi05(config)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    complaints = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "mis-shaped": [
            f"{name} {list(found[name])} instead of {shape}"
            for name, shape in wanted.items()
            if name in found and list(found[name]) != shape
        ],
    }
    if any(complaints.values()):
        text = "; ".join(f"{k} {_first(v)}" for k, v in complaints.items() if v)
        expected = f"the {len(wanted)} tensors of a {config.name} model"
        if any(name.startswith(("state_proj", "action_time_mlp")) for name in found):
            expected += " (this looks like π0, not π0.5)"
        raise ConfigError(source, "tensors", text, expected)
    return model


def _first(names: Sequence[str], count: int = 3) -> str:
    more = f", and {len(names) - count} more" if len(names) > count else ""
    return f"{len(names)}: " + ", ".join(names[:count]) + more


def _load_weights(
    path: Path, config: Pi05Config, device: torch.device, cast: Callable[[str], torch.dtype]
) -> Pi05:
    expected = "a complete safetensors file"
    if not path.is_file():
        raise ConfigError(path, "", "no such file", expected)
    try:
        with safe_open(path, framework="pt") as file:
            names = model_keys(list(file.keys()))
            shapes = {ours: file.get_slice(name).get_shape() for ours, name in names.items()}
        model = check_shapes(path, shapes, config)
        tensors: dict[str, Tensor] = {}
        for ours, name in names.items():
            # A map for each tensor: its pages are given back as soon as the tensor is copied out.
            # A copy, because 8-byte aligned views of a map round differently (and change when
            # somebody overwrites the file).
            with safe_open(path, framework="pt", device=str(device)) as file:
                tensors[ours] = file.get_tensor(name).to(cast(ours), copy=True)
    except (OSError, SafetensorError) as error:  # unreadable, truncated, or something else
        found = f"{path.stat().st_size} bytes ({error})"
        raise ConfigError(path, "", found, expected) from None
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(requires_grad=False).eval()


def checkpoint_id(directory: str | Path) -> str:
    """Short content hash: every small file, and evenly spaced samples of the weights."""
    digest = hashlib.sha256()
    weights = Path(directory) / WEIGHTS
    size = weights.stat().st_size
    block, count = 1 << 16, 64
    with weights.open("rb") as file:
        for i in range(count):
            file.seek(max(0, size - block) * i // (count - 1))
            digest.update(file.read(block))
    digest.update(str(size).encode())
    for path in sorted(Path(directory).rglob("*.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def save_openpi(
    directory: str | Path,
    model: Pi05,
    norm_stats: NormStats,
    asset_id: str,
    tokenizer: Path | None = None,
) -> None:
    """Write a checkpoint in openpi's layout, as its converter and trainer do.

    Args:
        directory: Created if absent.
        model: Weights, saved in the type they have.
        norm_stats: Goes to `assets/<asset_id>/norm_stats.json`.
        asset_id: Names the robot or data set.
        tokenizer: SentencePiece file to ship; copied.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    tensors[LM_HEAD] = tensors.pop(EMBED_TOKENS)  # tied: openpi saves it under this name
    tensors[EXPERT_LM_HEAD] = _unused_head(model)
    _write_weights(tensors, directory)
    write_openpi(directory / "assets" / asset_id / "norm_stats.json", norm_stats)
    _copy_tokenizer(tokenizer, directory)
    raw: dict[str, Any] = {
        "action_dim": config.action_dim,
        "action_horizon": config.horizon,
        **_variants(config),
        "precision": str(model.dtype).removeprefix("torch."),
    }
    _write_json(directory / "config.json", raw)  # last: without it the rest is no checkpoint


def save_lerobot(
    directory: str | Path, model: Pi05, norm_stats: NormStats, tokenizer: Path | None = None
) -> None:
    """Write a checkpoint in lerobot's layout; arguments as `save_openpi`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config
    tensors = {f"model.{name}": t.contiguous() for name, t in model.state_dict().items()}
    tensors[f"model.{LM_HEAD}"] = tensors[f"model.{EMBED_TOKENS}"].clone()
    tensors[f"model.{EXPERT_LM_HEAD}"] = _unused_head(model)
    _write_weights(tensors, directory)
    write_lerobot(directory, norm_stats)
    _copy_tokenizer(tokenizer, directory)
    raw: dict[str, Any] = {
        "type": "pi05",
        "chunk_size": config.horizon,
        "n_action_steps": config.horizon,
        "max_state_dim": config.action_dim,
        "max_action_dim": config.action_dim,
        "num_inference_steps": config.flow_steps,
        "tokenizer_max_length": config.max_prompt_tokens,
        "image_resolution": [config.vision.image, config.vision.image],
        **_variants(config),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    _write_json(directory / "config.json", raw)


def _write_weights(tensors: dict[str, Tensor], directory: Path) -> None:
    """Write beside and rename: a running process may have the old file mapped as its weights."""
    partial = directory / f"{WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(directory / WEIGHTS)


def _unused_head(model: Pi05) -> Tensor:
    """Openpi's expert has a language head: unused, but its strict loader wants it."""
    config = model.config
    return torch.zeros(config.vocab_size, config.expert.width, dtype=model.dtype)


def _variants(config: Pi05Config) -> dict[str, Any]:
    if (config.vlm, config.expert, config.vision) == (PI05.vlm, PI05.expert, PI05.vision):
        return {key: variant for key, (variant, _) in VARIANTS.items()}
    return {**dict.fromkeys(VARIANTS, config.name), OWN_SIZES: config.to_json()}


def _copy_tokenizer(tokenizer: Path | None, directory: Path) -> None:
    target = directory / "tokenizer.model"
    if tokenizer is not None and tokenizer.resolve() != target.resolve():
        target.write_bytes(tokenizer.read_bytes())


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
