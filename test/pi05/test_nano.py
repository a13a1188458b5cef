import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from safe_pruner_node.pi05.checkpoint import WEIGHTS, load_checkpoint
from safe_pruner_node.pi05.config import NANO
from safe_pruner_node.pi05.nano import ARM_SPAN, build_nano
from safe_pruner_node.pi05.tokenizer import PromptTokenizer, find_tokenizer
from safe_pruner_node.pi05.transforms import to_model_images

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # whatever it is: the files must not depend on it
    directory = build_nano(tmp_path_factory.mktemp("nano"), seed=0)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    return load_checkpoint(directory)


@pytest.fixture(scope="module")
def tokenizer(nano):
    return PromptTokenizer(find_tokenizer(nano.directory), NANO.max_prompt_tokens)


def chunk(nano, tokenizer, seed, prompt):
    random = np.random.default_rng(seed)
    scene = random.integers(0, 256, (6, 9, 3), np.uint8).repeat(40, 0).repeat(40, 1)
    views = torch.from_numpy(np.stack([np.roll(scene, 50 * i, 1) for i in range(3)]))
    images = to_model_images(views, NANO.vision.image).split(1)
    state = random.uniform(-1, 1, 16)
    tokens = torch.from_numpy(tokenizer.encode(prompt, state))[None]
    noise = torch.from_numpy(random.normal(size=(1, NANO.horizon, NANO.action_dim))).float()
    return nano.model.sample_actions(images, tokens, noise)[0, :, :16].numpy()


def test_actions_are_small_and_smooth_whatever_comes_in(nano, tokenizer):
    chunks = [
        chunk(nano, tokenizer, seed, prompt)
        for seed, prompt in enumerate(("pick up the red cube", "open the drawer", "ü☃ 17"))
    ]
    for actions in chunks:
        assert actions.shape == (NANO.horizon, 16)
        assert np.abs(actions).max() < 1.5
        assert np.abs(np.diff(actions, axis=0)).max() < 0.1  # 0.015 rad for an arm
    assert np.abs(chunks[0] - chunks[1]).max() > 0.02  # it does look


def test_arms_drift_from_where_they_are(nano, tokenizer):
    actions = nano.norm_stats.unnormalize_actions(chunk(nano, tokenizer, 5, "hand over the cup"))
    assert np.abs(actions[:, :14]).max() < 1.5 * ARM_SPAN
    assert ((actions[:, 14:] > -25) & (actions[:, 14:] < 125)).all()


def test_state_costs_one_token_a_joint(tokenizer):
    without = tokenizer.encode("pick up the red cube", np.zeros(0))
    for state in (np.full(16, -1.1), np.zeros(16), np.ones(16)):
        assert len(tokenizer.encode("pick up the red cube", state)) <= len(without) + 16
    assert tokenizer.vocab_size <= NANO.vocab_size


def test_the_command_says_what_it_made_and_repeats_itself(nano, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "safe_pruner_node.pi05.nano", tmp_path / "again", "--seed", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert "RANDOM weights" in line
    assert nano.identity in line
    for name in (WEIGHTS, "tokenizer.model", "config.json", "assets/astribot_s1/norm_stats.json"):
        assert (tmp_path / "again" / name).read_bytes() == (nano.directory / name).read_bytes()
    assert (nano.directory / WEIGHTS).stat().st_size < 48e6
    assert "RANDOM weights" in (nano.directory / "README.md").read_text()
    assert nano.asset_id == "astribot_s1"


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "safe_pruner_node.pi05.nano", tmp_path / "file" / "nano"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "parameter: DIR: found" in done.stderr
