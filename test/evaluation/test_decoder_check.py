"""Grey levels between two decoders, of stand-ins whose error is known."""

import cv2
import numpy as np
import pytest
import torch

from safe_pruner_node.evaluation.bench_gpu.decoder_check import decoder_difference
from safe_pruner_node.robot.codecs import image_to_rgb
from safe_pruner_node.types import CameraFrame


class Decoder:
    """The CPU's, a number of grey levels brighter; planes behind each other, as nvJPEG's."""

    def __init__(self, brighter=0):
        self.brighter = brighter

    def decode(self, jpegs):
        images = [image_to_rgb(frame_of(jpeg)) + np.uint8(self.brighter) for jpeg in jpegs]
        planes = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in images]
        return [image.permute(1, 2, 0) for image in planes]


class Refusing:
    def decode(self, jpegs):  # noqa: ARG002
        return None


def frame_of(jpeg):
    return CameraFrame(jpeg, "jpeg", 0, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def frames():
    """Darker than white by far; the second is large enough for the CPU to halve it."""
    random = np.random.default_rng(0)
    views = [
        cv2.resize(random.integers(20, 150, (9, 16, 3), np.uint8), size)
        for size in ((64, 36), (512, 288))
    ]
    return [frame_of(cv2.imencode(".jpg", view)[1].tobytes()) for view in views]


def test_the_same_decoder_differs_by_halving_alone(frames):
    difference = decoder_difference(Decoder(), frames, 64)
    assert difference["whole"] == {"mean": 0.0, "max": 0.0}
    assert 0.0 < difference["fitted"]["mean"] < 1.0
    assert decoder_difference(Decoder(), frames[:1], 64)["fitted"]["max"] == 0.0


def test_grey_levels_are_grey_levels(frames):
    difference = decoder_difference(Decoder(5), frames[:1], 64)
    assert difference["whole"] == {"mean": 5.0, "max": 5.0}
    assert difference["fitted"]["max"] == pytest.approx(5.0, abs=1e-3)


def test_a_decoder_that_refuses_is_an_error(frames):
    with pytest.raises(RuntimeError, match="does not take"):
        decoder_difference(Refusing(), frames, 64)
