"""The resize that runs on a GPU against PIL, which runs on a CPU."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from safe_pruner_node.pi05.resample import resize_bilinear
from safe_pruner_node.pi05.transforms import resize_with_pad, resize_with_pad_tensor

CAMERAS = ((720, 1280), (360, 640), (480, 640), (1080, 1920), (224, 224), (100, 100))


def picture(height, width, seed, *, harsh=False):
    """Noise; the harsh one is black and white, where a sum comes nearest to overflowing."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return (image > 127).astype(np.uint8) * 255 if harsh else image


def on_a_device(image, size):
    return resize_with_pad_tensor(torch.from_numpy(image)[None], size)[0].numpy()


@pytest.mark.parametrize(("height", "width"), CAMERAS)
@pytest.mark.parametrize("harsh", [False, True])
def test_same_pixels_as_pil_for_cameras(height, width, harsh):
    image = picture(height, width, 0, harsh=harsh)
    np.testing.assert_array_equal(on_a_device(image, 224), resize_with_pad(image, 224))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 9), st.booleans())
def test_same_pixels_as_pil_for_any_wide_image(one, other, seed, harsh):
    height, width = sorted((one, other))
    image = picture(height, width, seed, harsh=harsh)
    np.testing.assert_array_equal(on_a_device(image, 56), resize_with_pad(image, 56))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 9))
def test_tall_images_differ_by_one_level_at_most(one, other, seed):
    """Pillow 13 may take the passes the other way round."""
    width, height = sorted((one, other))
    image = picture(height, width, seed)
    difference = on_a_device(image, 56).astype(int) - resize_with_pad(image, 56)
    assert np.abs(difference).max() <= 1


@settings(deadline=None, max_examples=60)
@given(st.tuples(*[st.integers(1, 90)] * 4), st.integers(0, 9))
def test_each_axis_alone_is_pils(sizes, seed):
    """One pass has no order: any shrinking and growing, bit for bit."""
    height, width, new_height, new_width = sizes
    image = picture(height, width, seed)
    for rows, columns in ((height, new_width), (new_height, width)):
        theirs = Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR)
        ours = resize_bilinear(torch.from_numpy(image)[None], rows, columns)[0]
        np.testing.assert_array_equal(ours.numpy(), np.asarray(theirs))


def test_images_of_a_batch_are_resized_each_for_itself():
    images = np.stack([picture(40, 70, seed) for seed in range(3)])
    together = resize_with_pad_tensor(torch.from_numpy(images), 56).numpy()
    np.testing.assert_array_equal(together, [resize_with_pad(image, 56) for image in images])
