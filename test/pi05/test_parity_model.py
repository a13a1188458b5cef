"""The model against openpi's own PI0Pytorch, run live on the same weights and inputs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from safe_pruner_node.pi05.checkpoint import (
    check_shapes,
    load_checkpoint,
    mixed_dtype,
    model_keys,
    save_openpi,
)
from safe_pruner_node.pi05.config import PI05, TINY

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
STEPS = 10


def make_case(directory, model, stats, seed, valid_cameras, n_tokens):
    """Weights and one padded query, as openpi gets them; returns the trimmed query."""
    random = torch.Generator().manual_seed(100 + seed)
    config = model.config
    save_openpi(directory, model, stats, "robot")
    dtype = "float32" if model.dtype == torch.float32 else "bfloat16"
    sizes = json.dumps({**config.to_json(), "dtype": dtype})
    (directory / "sizes.json").write_text(sizes)
    size = config.vision.image
    images = {c: torch.rand(1, 3, size, size, generator=random) * 2 - 1 for c in valid_cameras}
    noise = torch.randn(1, config.horizon, config.action_dim, generator=random)
    tokens = torch.randint(0, config.vocab_size, (1, n_tokens), generator=random)
    padded = torch.zeros(1, config.max_prompt_tokens, dtype=torch.long)
    padded[:, :n_tokens] = tokens
    empty = -torch.ones(1, 3, size, size)
    np.savez(
        directory / "query.npz",
        noise=noise,
        tokens=padded,
        token_mask=torch.arange(config.max_prompt_tokens)[None] < n_tokens,
        steps=STEPS,
        **{f"image_{c}": images.get(c, empty) for c in CAMERAS},
        **{f"mask_{c}": np.array([c in images]) for c in CAMERAS},
    )
    return list(images.values()), tokens, noise, STEPS


@pytest.fixture
def cases(tmp_path, tiny_model, tiny_224, norm_stats):
    """Different weights, cameras and prompt lengths; seed 3 with grouped key/value heads."""
    grouped = replace(
        tiny_224,
        vlm=replace(tiny_224.vlm, heads=4, kv_heads=2),
        expert=replace(tiny_224.expert, heads=4, kv_heads=2),
    )
    made = {}
    for seed, config, cameras, n_tokens in (
        (0, tiny_224, CAMERAS, 24),
        (1, tiny_224, CAMERAS[:2], 7),
        (2, tiny_224, (CAMERAS[0], CAMERAS[2]), 13),
        (3, grouped, CAMERAS[:1], 1),
    ):
        model = tiny_model(seed, config)
        directory = tmp_path / f"case_{seed}"
        made[directory.name] = model, make_case(
            directory, model, norm_stats, seed, cameras, n_tokens
        )
    return made


def test_sample_actions_equals_openpi(cases, run_openpi, tmp_path):
    run_openpi("sample")
    theirs = np.load(tmp_path / "answer.npz")
    for name, (model, query) in cases.items():
        ours = model.sample_actions(*query).numpy()
        assert np.abs(theirs[name]).max() > 0.1
        assert np.abs(theirs[name] - query[2].numpy()).max() > 0.1  # not the noise itself
        assert np.abs(ours - theirs[name]).max() <= 1e-5, name


def test_mixed_precision_is_openpis(tmp_path, tiny_model, tiny_224, norm_stats, run_openpi):
    model = tiny_model(5, tiny_224)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(mixed_dtype(name))
    query = make_case(tmp_path / "case_0", model, norm_stats, 5, CAMERAS, 11)
    run_openpi("sample")
    theirs = np.load(tmp_path / "answer.npz")["case_0"]
    mixed = load_checkpoint(tmp_path / "case_0", dtype="bf16").model
    exact = load_checkpoint(tmp_path / "case_0", dtype="fp32").model
    ours = mixed.sample_actions(*query).numpy()
    rounding = np.abs(exact.sample_actions(*query).numpy() - theirs).max()
    assert np.abs(ours - theirs).max() < rounding  # closer than what bf16 costs


def test_names_and_shapes_are_those_of_the_published_model(tmp_path, run_openpi):
    run_openpi("keys")
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert len(answer["saved"]) == 812
    names = model_keys(list(answer["saved"]))
    shapes = {ours: answer["saved"][theirs] for ours, theirs in names.items()}
    model = check_shapes("openpi", shapes, PI05)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(3.353e9, rel=1e-3)
    theirs = {ours: answer["dtypes"][name] for ours, name in names.items()}
    assert theirs == {name: str(mixed_dtype(name)) for name in names}


def test_saved_names_are_openpis(tmp_path, tiny_model, norm_stats, run_openpi):
    """At the published depth, save_openpi writes exactly the names of openpi's file."""
    deep = replace(
        TINY,
        vision=replace(TINY.vision, depth=27),
        vlm=replace(TINY.vlm, depth=18),
        expert=replace(TINY.expert, depth=18),
    )
    save_openpi(tmp_path / "deep", tiny_model(0, deep), norm_stats, "robot")
    run_openpi("keys")
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert set(load_file(tmp_path / "deep/model.safetensors")) == set(answer["saved"])
