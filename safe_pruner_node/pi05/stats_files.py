"""Reads and writes the normalisation statistics of openpi and lerobot checkpoints, strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.config import read_json
from safe_pruner_node.pi05.transforms import LEROBOT_EPS, FeatureStats, NormMode, NormStats
from safe_pruner_node.types import FloatArray

LEROBOT_MODES: dict[str, NormMode] = {
    "QUANTILES": "quantile",
    "MEAN_STD": "mean_std",
    "IDENTITY": "identity",
}
LEROBOT_NORMALIZER = "policy_preprocessor_step_2_normalizer_processor.safetensors"
STATISTICS: dict[NormMode, tuple[str, ...]] = {
    "quantile": ("q01", "q99"),
    "mean_std": ("mean", "std"),
    "identity": (),
}


def read_openpi(path: Path) -> NormStats:
    """Read openpi's `norm_stats.json`; π0.5 uses its quantiles.

    Raises:
        ConfigError: Something in the file is absent, not finite, of uneven size or degenerate.
    """
    data = read_json(path).get("norm_stats")
    if not isinstance(data, dict):
        raise ConfigError(path, "norm_stats", type(data).__name__, "an object")
    features = {}
    for key in ("state", "actions"):
        entry = data.get(key)
        if not isinstance(entry, dict):
            raise ConfigError(path, f"norm_stats.{key}", type(entry).__name__, "an object")
        features[key] = _feature(entry, "quantile", path, f"norm_stats.{key}")
    return NormStats(features["state"], features["actions"])


def write_openpi(path: Path, stats: NormStats) -> None:
    """Write openpi's `norm_stats.json`."""
    data = {"state": _plain(stats.state), "actions": _plain(stats.actions)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"norm_stats": data}, indent=2) + "\n", encoding="utf-8")


def read_lerobot(directory: Path) -> NormStats:
    """Read the normalizer step of lerobot's `policy_preprocessor.json` and its tensors.

    Raises:
        ConfigError: As `read_openpi`, or the step or its file is absent.
    """
    path = directory / "policy_preprocessor.json"
    steps = read_json(path).get("steps")
    if not isinstance(steps, list):
        raise ConfigError(path, "steps", type(steps).__name__, "a list")
    named = [s for s in steps if isinstance(s, dict)]
    step = next((s for s in named if s.get("registry_name") == "normalizer_processor"), None)
    if step is None:
        raise ConfigError(path, "steps", "no normalizer_processor", "one")
    if "state_file" not in step:
        raise ConfigError(path, "normalizer_processor.state_file", "nothing", "a file name")
    tensors_path = directory / str(step["state_file"])
    try:
        tensors = load_file(tensors_path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(tensors_path, "", error, "a safetensors file") from None
    norm_map = step.get("config", {}).get("norm_map", {})
    state_mode = _lerobot_mode(norm_map, "STATE", path)
    action_mode = _lerobot_mode(norm_map, "ACTION", path)
    return NormStats(
        _lerobot_feature(tensors, "observation.state", state_mode, tensors_path),
        _lerobot_feature(tensors, "action", action_mode, tensors_path),
        "lerobot",
        state_mode,
        action_mode,
    )


def write_lerobot(directory: Path, stats: NormStats) -> None:
    """Write lerobot's `policy_preprocessor.json` with its normalizer tensors."""
    names = {mode: name for name, mode in LEROBOT_MODES.items()}
    features = {"observation.state": stats.state, "action": stats.actions}
    tensors = {
        f"{key}.{name}": torch.tensor(values, dtype=torch.float32)
        for key, feature in features.items()
        for name, values in _plain(feature).items()
    }
    save_file(tensors, directory / LEROBOT_NORMALIZER)
    step = {
        "registry_name": "normalizer_processor",
        "config": {
            "eps": LEROBOT_EPS,
            "features": {
                "observation.state": {"type": "STATE", "shape": [stats.state.dim]},
                "action": {"type": "ACTION", "shape": [stats.actions.dim]},
            },
            "norm_map": {
                "VISUAL": "IDENTITY",
                "STATE": names[stats.state_mode],
                "ACTION": names[stats.action_mode],
            },
        },
        "state_file": LEROBOT_NORMALIZER,
    }
    text = json.dumps({"name": "policy_preprocessor", "steps": [step]}, indent=2)
    (directory / "policy_preprocessor.json").write_text(text + "\n", encoding="utf-8")


def _lerobot_mode(norm_map: object, key: str, path: Path) -> NormMode:
    name = norm_map.get(key) if isinstance(norm_map, dict) else None
    if name not in LEROBOT_MODES:
        raise ConfigError(path, f"norm_map.{key}", name, f"one of {sorted(LEROBOT_MODES)}")
    return LEROBOT_MODES[name]


def _lerobot_feature(
    tensors: dict[str, torch.Tensor], key: str, mode: NormMode, path: Path
) -> FeatureStats:
    entry = {
        name: tensors[f"{key}.{name}"].tolist()
        for name in ("mean", "std", "q01", "q99")
        if f"{key}.{name}" in tensors
    }
    if not entry:
        raise ConfigError(path, key, "no statistics", "mean, std, q01 or q99")
    return _feature(entry, mode, path, key)


def _feature(entry: dict[str, Any], mode: NormMode, path: Path, where: str) -> FeatureStats:
    """Check one feature's statistics; those of `mode` must be there and usable."""
    arrays = {
        name: _array(entry[name], path, f"{where}.{name}")
        for name in ("mean", "std", "q01", "q99")
        if entry.get(name) is not None
    }
    for name in STATISTICS[mode]:
        if name not in arrays:
            raise ConfigError(path, f"{where}.{name}", "nothing", f"a list, for {mode} mode")
    if len({len(a) for a in arrays.values()}) > 1:
        sizes = {name: len(a) for name, a in arrays.items()}
        raise ConfigError(path, where, f"sizes {sizes}", "the same size everywhere")
    if mode == "quantile" and (flat := np.flatnonzero(arrays["q01"] >= arrays["q99"])).size:
        i = int(flat[0])
        found = f"q01 = {arrays['q01'][i]:g}, q99 = {arrays['q99'][i]:g}"
        raise ConfigError(path, f"{where}[{i}]", found, "q01 < q99")
    if mode == "mean_std" and (flat := np.flatnonzero(arrays["std"] <= 0)).size:
        raise ConfigError(path, f"{where}.std[{flat[0]}]", arrays["std"][flat[0]], "above 0")
    return FeatureStats(**arrays)


def _array(values: object, path: Path, where: str) -> FloatArray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError(path, where, "something else", "a list of numbers") from None
    if array.ndim != 1 or not len(array):
        raise ConfigError(path, where, f"shape {array.shape}", "a flat list of numbers")
    if not np.isfinite(array).all():
        raise ConfigError(path, where, "a non-finite number", "finite numbers")
    return array


def _plain(stats: FeatureStats) -> dict[str, list[float]]:
    named = {"mean": stats.mean, "std": stats.std, "q01": stats.q01, "q99": stats.q99}
    return {name: values.tolist() for name, values in named.items() if values is not None}
