"""Images on their way to the device: the pixels of the camera that they were placed for."""

import numpy as np
import pytest
import torch

from safe_pruner_node.engine.staging import Staging

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def staging(request):
    return Staging(torch.device(request.param))


def picture(seed, height=9, width=16):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def assert_shows(tensor, image):
    np.testing.assert_array_equal(tensor.cpu().numpy(), image)


def test_a_placed_image_is_a_copy_and_is_not_copied_again(staging):
    image = picture(0)
    placed = staging.place(0, image)
    expected = image.copy()
    image[:] = 0  # the camera's memory may be gone by then
    np.testing.assert_array_equal(placed, expected)
    before = staging.on_device(0, placed).data_ptr()
    assert_shows(staging.on_device(0, placed), expected)
    assert staging.on_device(0, placed).data_ptr() == before


def test_an_image_that_was_not_placed_is_placed_late(staging):
    old, new = picture(0), picture(1)
    staging.place(0, old)
    assert_shows(staging.on_device(0, new), new)


def test_cameras_have_memory_of_their_own(staging):
    images = [picture(seed, height) for seed, height in enumerate((9, 9, 12))]
    placed = [staging.place(camera, image) for camera, image in enumerate(images)]
    for camera, image in enumerate(images):
        assert_shows(staging.on_device(camera, placed[camera]), image)


def test_an_image_given_for_another_camera_than_it_was_placed_for(staging):
    """Slower, and right."""
    images = [picture(seed) for seed in range(2)]
    placed = [staging.place(camera, image) for camera, image in enumerate(images)]
    assert_shows(staging.on_device(1, placed[0]), images[0])


def test_another_resolution_in_between(staging):
    for seed, height in enumerate((9, 12, 9)):
        image = picture(seed, height)
        assert_shows(staging.on_device(0, staging.place(0, image)), image)


def test_an_image_may_be_a_read_only_view(staging):
    image = picture(0)[::-1, ::2]
    image.flags.writeable = False
    assert_shows(staging.on_device(0, staging.place(0, image)), image)


def test_inference_mode_may_begin_and_end_in_between(staging):
    """A thread that places is in none; whoever calls the engine may be."""
    with torch.inference_mode():
        staging.place(0, picture(0))
    image = picture(1)
    assert_shows(staging.on_device(0, staging.place(0, image)), image)
