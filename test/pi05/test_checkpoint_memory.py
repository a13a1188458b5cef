"""A 7 GB file must not need 20 GB: measured in a process of its own, on a file of 0.3 GB."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safe_pruner_node.pi05.checkpoint import WEIGHTS, mixed_dtype, save_openpi
from safe_pruner_node.pi05.config import NANO
from safe_pruner_node.pi05.model import Pi05

ROOT = Path(__file__).resolve().parents[2]
LOAD = """
import json, sys
from safe_pruner_node.pi05.checkpoint import load_checkpoint

def high_water_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

load_checkpoint(sys.argv[2])  # what torch imports on first use
before = high_water_bytes()
model = load_checkpoint(sys.argv[1], dtype=sys.argv[3]).model
touched = sum(float(p.sum()) for p in model.parameters())
model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"peak": high_water_bytes() - before, "model": model_bytes, "sum": touched}))
"""
MIDDLE = replace(
    NANO,
    vlm=replace(NANO.vlm, width=512, mlp=4096),
    expert=replace(NANO.expert, width=256),
    vocab_size=20_000,
)


@pytest.mark.parametrize(
    ("saved", "loaded"), [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")]
)
def test_loading_needs_little_more_than_the_file(tmp_path, norm_stats, tiny_model, saved, loaded):
    with torch.device("meta"):
        model = Pi05(MIDDLE)
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        kind = mixed_dtype(name) if saved == "bf16" else torch.float32
        parameter.data = torch.full_like(parameter, 0.5, dtype=kind)
    save_openpi(tmp_path / "middle", model, norm_stats, "robot")
    save_openpi(tmp_path / "tiny", tiny_model(0), norm_stats, "robot")
    size = (tmp_path / "middle" / WEIGHTS).stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "middle", tmp_path / "tiny", loaded],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert size > 100e6
    assert answer["sum"] > 0
    assert answer["model"] > (1.8 if saved != loaded else 0.9) * size
    assert answer["peak"] < 1.3 * max(size, answer["model"])
