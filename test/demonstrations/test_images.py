"""A recorded image is what the policy will see of a camera's image, band for band."""

import numpy as np
import pytest

from safe_pruner_node.demonstrations.images import fit
from safe_pruner_node.pi05.transforms import resize_with_pad


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (360, 640, 224),
        (180, 320, 224),
        (100, 60, 224),
        (224, 224, 224),
        (359, 640, 224),
        (481, 641, 112),
    ],
)
def test_fit_is_the_middle_of_resize_with_pad(height, width, size):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    small, padded = fit(image, size), resize_with_pad(image, size)
    top, left = (size - small.shape[0]) // 2, (size - small.shape[1]) // 2
    inside = slice(top, top + small.shape[0]), slice(left, left + small.shape[1])
    assert max(small.shape) == size
    np.testing.assert_array_equal(padded[inside], small)
    padded[inside] = 0
    assert not padded.any()
    np.testing.assert_array_equal(resize_with_pad(small, size)[inside], small)  # and stays so
