"""The choice of the decoder, and what becomes of its faults; nvJPEG itself needs a GPU.

Where there is none a module stands in for torchvision's, to be absent, broken or choosy.
"""

import enum
import io
import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from safe_pruner_node.engine.nvjpeg import NvJpeg, choose_decoder
from safe_pruner_node.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
STACK = "\nException raised from decode_images at decode_jpegs_cuda.cpp:1"


class ImageReadMode(enum.Enum):
    RGB = 3


def decode_jpeg(data, mode, device):
    """As torchvision's: a list of byte tensors to a list of [3, h, w]; the device is left out."""
    assert mode is ImageReadMode.RGB
    assert device == CUDA
    return [torch.from_numpy(pixels(bytes(jpeg.numpy()))).permute(2, 0, 1) for jpeg in data]


def pixels(jpeg):
    return np.array(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def jpeg(color, size=(24, 16)):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def torchvision(monkeypatch):
    """What `torchvision.io` has; a test may change it."""
    module = SimpleNamespace(ImageReadMode=ImageReadMode, decode_jpeg=decode_jpeg)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(io=module))
    monkeypatch.setitem(sys.modules, "torchvision.io", module)
    return module


def no_jpeg(*_, **__):
    raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support" + STACK)


def no_operator(*_, **__):
    raise AttributeError("'_OpNamespace' 'image' object has no attribute 'decode_jpegs_cuda'")


def other_colors(data, mode, device):
    return [image.flip(0) for image in decode_jpeg(data, mode, device)]


def other_size(data, mode, device):
    return [image[:, ::2] for image in decode_jpeg(data, mode, device)]


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_without_a_gpu_the_cpu_decodes(name):
    assert choose_decoder(name, CPU) is None


@pytest.mark.usefixtures("torchvision")
def test_on_a_gpu_with_torchvision_auto_is_nvjpeg():
    assert isinstance(choose_decoder("auto", CUDA), NvJpeg)
    assert isinstance(choose_decoder("nvjpeg", CUDA), NvJpeg)
    assert choose_decoder("cpu", CUDA) is None


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (no_jpeg, "torchvision not compiled with nvJPEG support"),
        (no_operator, "no attribute 'decode_jpegs_cuda'"),
        (other_colors, "nvJPEG decodes an image to another one"),
        (other_size, "nvJPEG decodes an image to another one"),
        (None, "torchvision"),
    ],
    ids=["no nvJPEG", "no operator", "colours", "size", "no torchvision"],
)
def test_what_does_not_decode_is_not_chosen(torchvision, monkeypatch, caplog, broken, reason):
    """``auto`` says so and goes on; who asked for it gets one line."""
    torchvision.decode_jpeg = broken
    if broken is None:
        monkeypatch.setitem(sys.modules, "torchvision.io", None)
    assert choose_decoder("auto", CUDA) is None
    assert reason in caplog.text
    assert "decode_jpegs_cuda.cpp" not in caplog.text
    with pytest.raises(
        ConfigError, match=r"^parameter: image_decoder: found nvjpeg, but "
    ) as caught:
        choose_decoder("nvjpeg", CUDA)
    assert reason in str(caught.value)
    assert "decode_jpegs_cuda.cpp" not in str(caught.value)


@pytest.mark.usefixtures("torchvision")
def test_images_come_in_order_as_rows_of_rgb():
    files = [jpeg((200, 10, 90)), jpeg((0, 250, 30), (40, 8))]
    for image, file in zip(NvJpeg(CUDA).decode(files), files, strict=True):
        np.testing.assert_array_equal(image.numpy(), pixels(file))


def test_a_batch_that_is_refused_is_said_once_and_the_next_one_decodes(torchvision, caplog):
    def choosy(data, mode, device):
        if len(data) > 1:
            raise RuntimeError(
                "Error while decoding JPEG images: Failed to decode batch: 5" + STACK
            )
        return decode_jpeg(data, mode, device)

    torchvision.decode_jpeg = choosy
    decoder, file = NvJpeg(CUDA), jpeg((9, 9, 9))
    for _ in range(2):
        assert decoder.decode([file, file]) is None
        assert len(decoder.decode([file])) == 1
    (record,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert record.getMessage().endswith("Failed to decode batch: 5")


@pytest.mark.usefixtures("torchvision")
def test_no_memory_is_not_the_frames_fault():
    decoder = NvJpeg(CUDA)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    decoder._decode_jpeg = full
    with pytest.raises(torch.OutOfMemoryError):
        decoder.decode([jpeg((9, 9, 9))])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nvjpeg_itself():
    pytest.importorskip("torchvision")
    decoder = NvJpeg(CUDA)
    files = [jpeg((200, 10, 90)), jpeg((0, 250, 30), (640, 360))]
    broken = files[0][:40] + files[0][60:]
    assert decoder.decode([files[1], broken]) is None
    for image, file in zip(decoder.decode(files), files, strict=True):
        np.testing.assert_allclose(image.cpu().numpy(), pixels(file), atol=3)
