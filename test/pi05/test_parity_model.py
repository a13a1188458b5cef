"""The model against openpi's own PI0Pytorch, run live on the same weights and inputs."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file

from safe_pruner_node.pi05.checkpoint import (
    check_shapes,
    load_checkpoint,
    mixed_dtype,
    model_keys,
    save_openpi,
)
from safe_pruner_node.pi05.config import PI05, TINY

HEAD, LEFT, RIGHT = "base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, tiny_model, tiny_224, norm_stats, make_case, run_openpi):
    """Case name to (directory, query, openpi's actions, openpi's tokens of the head camera).

    Different weights, cameras and prompt lengths; one with grouped key/value heads, one mixed.
    """
    grouped = replace(
        tiny_224,
        vlm=replace(tiny_224.vlm, heads=4, kv_heads=2),
        expert=replace(tiny_224.expert, heads=4, kv_heads=2),
    )
    root = tmp_path_factory.mktemp("sampled")
    queries = {}
    for seed, config, cameras, n_tokens, mixed in (
        (0, tiny_224, (HEAD, LEFT, RIGHT), 24, False),
        (1, tiny_224, (HEAD, LEFT), 7, False),
        (2, tiny_224, (HEAD, RIGHT), 13, False),
        (3, grouped, (HEAD,), 1, False),
        (4, tiny_224, (LEFT,), 11, True),
    ):
        model = tiny_model(seed, config)
        if mixed:
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.to(mixed_dtype(name))
        directory = root / f"case_{seed}"
        queries[directory] = make_case(directory, model, norm_stats, seed, cameras, n_tokens)
    run_openpi("sample", root)
    theirs = np.load(root / "answer.npz")
    return {
        d.name: (d, query, theirs[d.name], theirs[f"{d.name}_image_tokens"])
        for d, query in queries.items()
    }


@pytest.mark.parametrize("case", ["case_0", "case_1", "case_2", "case_3"])
def test_sample_actions_equals_openpi(sampled, case):
    directory, (images, tokens, noise), theirs, their_image_tokens = sampled[case]
    model = load_checkpoint(directory).model
    ours = model.sample_actions(images, tokens, noise).numpy()
    assert np.abs(theirs - noise.numpy()).max() > 0.1  # not the noise that went in
    assert np.abs(ours - theirs).max() <= 1e-5
    image_tokens = model.embed_images(images[0]).numpy()  # faint in the actions: looked at alone
    assert np.abs(image_tokens - their_image_tokens).max() <= 1e-6


def test_mixed_precision_is_openpis(sampled):
    directory, query, theirs, _ = sampled["case_4"]
    mixed = load_checkpoint(directory, dtype="bf16").model.sample_actions(*query)
    exact = load_checkpoint(directory, dtype="fp32").model.sample_actions(*query)
    rounding = np.abs(exact.numpy() - theirs).mean()  # what bf16 costs
    assert np.abs(mixed.numpy() - theirs).mean() < rounding


def test_names_and_shapes_are_those_of_the_published_model(published):
    assert len(published["saved"]) == 812
    names = model_keys(list(published["saved"]))
    shapes = {ours: published["saved"][theirs] for ours, theirs in names.items()}
    model = check_shapes("openpi", shapes, PI05)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(3.353e9, rel=1e-3)
    dtypes = {ours: published["dtypes"][theirs] for ours, theirs in names.items()}
    assert dtypes == {name: str(mixed_dtype(name)) for name in names}


def test_saved_names_are_those_of_openpis_file(published, tmp_path, tiny_model, norm_stats):
    published_depth = replace(
        TINY,
        vision=replace(TINY.vision, depth=PI05.vision.depth),
        vlm=replace(TINY.vlm, depth=PI05.vlm.depth),
        expert=replace(TINY.expert, depth=PI05.expert.depth),
    )
    save_openpi(tmp_path, tiny_model(0, published_depth), norm_stats, "robot")
    assert set(load_file(tmp_path / "model.safetensors")) == set(published["saved"])
