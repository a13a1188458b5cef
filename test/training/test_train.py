"""The trainer as it is called: it learns, stops, goes on, and its checkpoint runs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from safe_pruner_node.engine.build import build_engine
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.checkpoint import load_checkpoint, save_openpi
from safe_pruner_node.pi05.config import NANO
from safe_pruner_node.pi05.nano import ASSET_ID, s1_norm_stats, train_tokenizer
from safe_pruner_node.pi05.tokenizer import PromptTokenizer
from safe_pruner_node.training.initial import fresh_model
from safe_pruner_node.training.train import TrainOptions, train
from safe_pruner_node.types import PolicyInput

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A small checkpoint as the trainer would begin with it."""
    config = replace(
        NANO,
        vision=replace(NANO.vision, width=32, depth=1, mlp=32, heads=2, image=112),
        vlm=replace(NANO.vlm, width=32, depth=4, mlp=48, heads=2, head_dim=16),
        expert=replace(NANO.expert, width=48, depth=4, mlp=48, heads=2, head_dim=16),
        horizon=20,
        name="small",
    )
    directory = tmp_path_factory.mktemp("untrained")
    path = directory / "tokenizer.model"
    path.write_bytes(train_tokenizer(config.vocab_size))
    model = fresh_model(config, PromptTokenizer(path, config.max_prompt_tokens), seed=0)
    save_openpi(directory, model, s1_norm_stats(), ASSET_ID, path)
    return directory


def options(dataset, small_checkpoint, out, **changed):
    settings = {
        "start": small_checkpoint,
        "steps": 30,
        "minutes": 0,
        "batch": 8,
        "flow_repeats": 2,
        "learning_rate": 2e-3,
        "ema": 0.9,
        "augment": "colour",
        "validation_share": 0.25,
        "validation_samples": 8,
        "workers": 1,
        "device": "cpu",
    }
    return TrainOptions(dataset=(dataset,), out=out, **(settings | changed))


def log(out):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_it_learns_and_the_checkpoint_runs(dataset, untrained, tmp_path, robot):
    out = tmp_path / "run"
    long = options(dataset, untrained, out, steps=120, learning_rate=3e-3)
    line = train(long, Console(quiet=True))
    assert "120 steps" in line
    before = train(
        options(dataset, untrained, tmp_path / "none", steps=1, learning_rate=1e-9),
        Console(quiet=True),
    )

    def error(summary):
        return float(summary.split(" near, ")[1].split()[0])

    assert error(line) < 0.6 * error(before)
    checkpoint = load_checkpoint(out / "checkpoint")
    assert "python -m safe_pruner_node.training.train" in (
        out / "checkpoint" / "README.md"
    ).read_text(encoding="utf-8")
    assert checkpoint.norm_stats.state.dim == robot.layout.dof
    engine = build_engine(EngineSettings(checkpoint=out / "checkpoint"))
    images = {c.name: np.full((36, 64, 3), 90, np.uint8) for c in robot.cameras}
    actions, _ = engine.step(PolicyInput(images, robot.home, "wave"))
    assert np.isfinite(actions).all()


def test_shares_of_the_tokens_are_trained_measured_and_disclosed(
    dataset, small_checkpoint, tmp_path
):
    out = tmp_path / "run"
    line = train(
        options(dataset, small_checkpoint, out, steps=2, keep_shares=(1.0, 0.25)),
        Console(quiet=True),
    )
    assert "(1 of the tokens)" in line
    assert "(0.25 of the tokens)" in line
    card = (out / "checkpoint" / "README.md").read_text(encoding="utf-8")
    assert "visual tokens were left out in training" in card
    shares = {entry["open_loop_share"] for entry in log(out) if "open_loop_share" in entry}
    assert shares == {1.0, 0.25}
    with pytest.raises(ConfigError, match=r"--keep-shares: found \[0.0\]"):
        train(options(dataset, small_checkpoint, out, steps=2, keep_shares=(0.0,)), Console())


def test_an_interrupted_run_goes_on_where_it_was(dataset, small_checkpoint, tmp_path):
    out = tmp_path / "run"
    stopped = options(dataset, small_checkpoint, out, stop_after_minutes=1e-6, steps=5)
    assert "resumable" in train(stopped, Console(quiet=True))
    step = torch.load(out / "state.pt", weights_only=True)["step"]
    assert 0 < step < 5
    line = train(options(dataset, small_checkpoint, out, steps=5), Console(quiet=True))
    assert "5 steps" in line
    with pytest.raises(ConfigError, match=r"state\.pt: batch: found a run with 8, asked for 4"):
        train(options(dataset, small_checkpoint, out, steps=5, batch=4), Console(quiet=True))


def test_a_finished_run_is_repeatable(dataset, small_checkpoint, tmp_path):
    weights = []
    for name in ("one", "two"):
        train(options(dataset, small_checkpoint, tmp_path / name, steps=3), Console(quiet=True))
        weights.append((tmp_path / name / "checkpoint" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_missing_data_set_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "safe_pruner_node.training.train", "--dataset", "nowhere",
         "--out", str(tmp_path), "--device", "cpu"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "training failed: nowhere/meta/info.json" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
