"""Runs in `.venv-parity`: `wrap` on openpi's own live PI0Pytorch.

python wrap_side.py DIR     reads DIR/case_0, writes DIR/wrap.json
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "pi05"))

from openpi_side import CAMERAS, STEPS, build, observation, without_jax

import safe_pruner_node

without_jax()
directory = Path(sys.argv[1])
config = json.loads((directory / "case_0" / "sizes.json").read_text())
live = build(config, config.pop("dtype"))
load_model(live, directory / "case_0" / "model.safetensors")
data = dict(np.load(directory / "case_0" / "query.npz"))
noise = torch.from_numpy(data["noise"])

sample = type(live).sample_actions  # the class's: the instance's is torch.compile'd
answer = {}
for name, rho in (("vanilla", None), ("paper", 0.0), ("paper", 0.75)):
    policy = safe_pruner_node.wrap(live, name, rho=rho)
    pointers = {p.data_ptr() for p in live.parameters()}
    errors, keyframes, kept = [], [], []
    for _ in range(3):
        data[f"image_{CAMERAS[0]}"] = data[f"image_{CAMERAS[0]}"] * 0.98  # the scene moves
        theirs = sample(live, "cpu", observation(data), noise, STEPS)
        ours = policy.sample_actions("cpu", observation(data), noise, STEPS)
        errors.append((ours - theirs).abs().max().item())
        keyframes.append(policy.report.keyframe)
        kept.append(sum(policy.report.kept_tokens.values()))
    answer[f"{name} {rho}"] = {
        "errors": errors,
        "keyframes": keyframes,
        "kept": kept,
        "visual": sum(policy.report.visual_tokens.values()),
        "text": policy.report.text_tokens,
        "copied": sum(p.data_ptr() not in pointers for p in policy.model.parameters()),
    }
(directory / "wrap.json").write_text(json.dumps(answer))
