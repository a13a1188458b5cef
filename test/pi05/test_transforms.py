import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_pruner_node.pi05.tokenizer import discretize
from safe_pruner_node.pi05.transforms import (
    FeatureStats,
    NormStats,
    normalize_mean_std,
    normalize_quantile,
    pad_to_dim,
    resize_with_pad,
    resize_with_pad_torch,
    to_model_images,
    unnormalize_mean_std,
    unnormalize_quantile,
)

finite = st.floats(-1e3, 1e3)
PROPERTY = settings(deadline=None, max_examples=50)


@PROPERTY
@given(x=finite, low=finite, span=st.floats(1e-3, 1e3), eps=st.sampled_from([0.0, 1e-8, 1e-6]))
def test_unnormalize_inverts_normalize(x, low, span, eps):
    x, low, span = np.array([x]), np.array([low]), np.array([span])
    there = normalize_quantile(x, low, low + span, eps)
    np.testing.assert_allclose(unnormalize_quantile(there, low, low + span, eps), x, atol=1e-9)
    there = normalize_mean_std(x, low, span, eps)
    np.testing.assert_allclose(unnormalize_mean_std(there, low, span, eps), x, atol=1e-9)


@PROPERTY
@given(low=finite, span=st.floats(1e-2, 1e3), inside=st.floats(0, 1))
def test_quantiles_map_to_the_unit_range(low, span, inside):
    stats = FeatureStats(q01=np.array([low]), q99=np.array([low + span]))
    for origin in ("openpi", "lerobot"):
        x = np.array([low + inside * span])
        normalized = NormStats(stats, stats, origin).normalize_state(x)
        np.testing.assert_allclose(normalized, 2 * inside - 1, atol=1e-3)
        assert 0 <= discretize(np.clip(normalized, -1, 1))[0] <= 255


@PROPERTY
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=32))
def test_bins_cover_the_range_in_order(values):
    state = np.sort(np.array(values))
    bins = discretize(state)
    assert ((bins >= 0) & (bins <= 255)).all()
    assert (np.diff(bins) >= 0).all()
    assert (np.abs(-1 + (bins + 0.5) / 128 - state) <= 1 / 256 + 1e-9).all()  # the bin's middle


def test_bins_at_the_ends():
    assert discretize(np.array([-1.0001, -1.0, 0.0, 1.0, 5.0])).tolist() == [-1, 0, 128, 255, 255]


def test_lerobot_has_its_own_formulas():
    """NormalizerProcessorStep: no eps in quantiles; eps on std in the forward direction only."""
    one, two = np.array([1.0]), np.array([2.0])
    stats = FeatureStats(mean=one, std=np.array([1e-6]), q01=one, q99=one + 1e-6)
    x = np.array([1.0 + 1e-6])
    quantile = NormStats(stats, stats, "lerobot", "quantile", "quantile")
    np.testing.assert_allclose(quantile.normalize_state(x), [1.0], rtol=1e-6)
    np.testing.assert_allclose(quantile.unnormalize_actions(two), [1.0 + 1.5e-6], rtol=1e-12)
    mean_std = NormStats(stats, stats, "lerobot", "mean_std", "mean_std")
    np.testing.assert_allclose(mean_std.normalize_state(x), [1e-6 / (1e-6 + 1e-8)], rtol=1e-6)
    np.testing.assert_allclose(mean_std.unnormalize_actions(two), [1.0 + 2e-6], rtol=1e-12)
    identity = NormStats(stats, stats, "lerobot", "identity", "identity")
    assert identity.normalize_state(x) == x
    assert identity.unnormalize_actions(two) == two


def test_padded_action_channels_are_dropped(norm_stats):
    assert norm_stats.unnormalize_actions(np.zeros((50, 32))).shape == (50, 16)


def test_pad_to_dim_keeps_what_is_there():
    x = np.arange(6.0).reshape(2, 3)
    padded = pad_to_dim(x, 5)
    np.testing.assert_array_equal(padded, [[0, 1, 2, 0, 0], [3, 4, 5, 0, 0]])
    assert pad_to_dim(x, 2).shape == (2, 3)


@PROPERTY
@given(st.integers(1, 300), st.integers(1, 300))
def test_resize_with_pad_centres(height, width):
    """A white image becomes a centred white rectangle on black, its longer side filling."""
    white = np.full((height, width, 3), 255, np.uint8)
    square = resize_with_pad(white, 56)
    tensor = torch.ones(1, 3, height, width)
    for image in (square[..., 0] / 255, resize_with_pad_torch(tensor, 56)[0, 0].numpy()):
        assert image.shape == (56, 56)
        rows, columns = image.any(1), image.any(0)
        np.testing.assert_allclose(image[rows][:, columns], 1.0, atol=1e-6)
        assert max(rows.sum(), columns.sum()) >= 55  # 56, less a rounding that is openpi's too
        for side in (rows, columns):
            before, after = side.argmax(), side[::-1].argmax()
            assert 0 <= after - before <= 1  # an odd row of padding goes below, or to the right


@pytest.mark.parametrize("value", [0, 255])
def test_exact_size_is_untouched(value):
    image = np.full((224, 224, 3), value, np.uint8)
    assert resize_with_pad(image, 224) is image


def test_every_grey_level_has_the_bits_of_openpis_arithmetic():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    expected = levels.float().permute(0, 3, 1, 2) / 255.0 * 2.0 - 1.0
    assert torch.equal(to_model_images(levels, 16), expected)
