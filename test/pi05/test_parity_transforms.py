"""Pre- and post-processing against openpi's own functions, run live on the same data."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from safe_pruner_node.pi05.stats_files import write_openpi
from safe_pruner_node.pi05.tokenizer import PromptTokenizer
from safe_pruner_node.pi05.transforms import (
    absolute_actions,
    pad_to_dim,
    resize_with_pad,
    resize_with_pad_torch,
    to_model_images,
)

PROMPTS = (
    "pick up the red cube",
    "  fold_the\nblue towel, then open the DRAWER \n",
    "put everything away " * 40,  # longer than 200 tokens
    "拿起 the ü-shaped bracket ☃",
)
SIZES = ((720, 1280), (360, 640), (224, 224), (301, 97))


@pytest.fixture
def openpi(tmp_path, norm_stats, tokenizer_file, run_openpi):
    """Inputs, and what openpi made of them."""
    random = np.random.default_rng(3)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    write_openpi(tmp_path / "norm_stats.json", norm_stats)
    span = norm_stats.state.q99 - norm_stats.state.q01
    state = norm_stats.state.q01 + span * random.uniform(-0.3, 1.3, (len(PROMPTS), 16))
    state[0, :2] = norm_stats.state.q01[0], norm_stats.state.q99[1]  # exactly on the edges
    inputs = {
        "state": state,
        "padded_state": np.pad(state[0], (0, 16)),
        "actions": random.normal(size=(50, 32)),
        "delta_mask": np.arange(16) < 14,
        **{f"image_{i}": random.integers(0, 256, (*s, 3), np.uint8) for i, s in enumerate(SIZES)},
    }
    np.savez(tmp_path / "query.npz", **inputs)
    run_openpi("transforms", tmp_path)
    return inputs, np.load(tmp_path / "answer.npz")


def test_pre_and_post_processing_equal_openpis(openpi, norm_stats, tokenizer_file):
    inputs, theirs = openpi
    tokenizer = PromptTokenizer(tokenizer_file, 200)
    lengths = []
    for i, prompt in enumerate(PROMPTS):
        state = norm_stats.normalize_state(inputs["state"][i])
        image = inputs[f"image_{i}"]
        np.testing.assert_array_equal(pad_to_dim(state, 32), theirs[f"state_{i}"])
        np.testing.assert_array_equal(resize_with_pad(image, 224), theirs[f"resized_{i}"])
        pixels = to_model_images(torch.from_numpy(image)[None], 224).numpy()
        np.testing.assert_array_equal(pixels, theirs[f"pixels_{i}"])
        tokens = tokenizer.encode(prompt, state)
        np.testing.assert_array_equal(tokens, theirs[f"tokens_{i}"])
        without_state = tokenizer.encode(prompt, None)
        np.testing.assert_array_equal(without_state, theirs[f"tokens_without_state_{i}"])
        lengths.append(len(tokens))
    assert max(lengths) == 200 > min(lengths)
    check_actions(inputs, theirs, norm_stats)
    check_resize_without_antialiasing(inputs, theirs)


def check_actions(inputs, theirs, norm_stats):
    for mode in ("quantile", "mean_std"):
        stats = replace(norm_stats, state_mode=mode, action_mode=mode)
        normalized = stats.normalize_state(inputs["state"])
        np.testing.assert_array_equal(normalized, theirs[f"normalized_{mode}"])
        actions = stats.unnormalize_actions(inputs["actions"])
        np.testing.assert_array_equal(actions, theirs[f"actions_{mode}"][:, :16])
        state = theirs[f"relative_to_{mode}"][:16]
        absolute = absolute_actions(actions, state, inputs["delta_mask"])
        np.testing.assert_array_equal(absolute, theirs[f"absolute_{mode}"])


def check_resize_without_antialiasing(inputs, theirs):
    """lerobot's resize is openpi's torch one on [0, 1] instead of [-1, 1]."""
    for i in range(len(SIZES)):
        pixels = torch.from_numpy(inputs[f"image_{i}"]).permute(2, 0, 1)[None].float() / 255.0
        ours = resize_with_pad_torch(pixels, 224) * 2.0 - 1.0
        expected = theirs[f"torch_pixels_{i}"].reshape(224, 224, 3).transpose(2, 0, 1)[None]
        np.testing.assert_allclose(ours.numpy(), expected, atol=1e-6)
        image = torch.from_numpy(inputs[f"image_{i}"])[None]
        model_image = to_model_images(image, 224, "lerobot").numpy()
        np.testing.assert_array_equal(model_image, ours.numpy())
