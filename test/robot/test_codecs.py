"""Messages to arrays and back; images against OpenCV, rosbags-image and, on a robot, cv_bridge."""

import dataclasses
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.codecs import (
    MessageError,
    fill_command,
    frame_from_message,
    image_to_rgb,
    is_plain_jpeg,
    joint_state_to_array,
)
from safe_pruner_node.robot.config import load_robot_config

GOOD = Path(__file__).resolve().parents[2] / "config" / "astribot_s1.yaml"
ARM = load_robot_config(GOOD).parts["astribot_arm_left"]
OFFSET_ARM = dataclasses.replace(ARM, joint_offsets=np.linspace(-0.1, 0.1, 7))
RAW = ("rgb8", "bgr8", "rgba8", "bgra8", "mono8")


def joint_state(position, name=()):
    return SimpleNamespace(position=list(position), name=list(name))


def stamp(seconds=12, nanoseconds=34):
    return SimpleNamespace(sec=seconds, nanosec=nanoseconds)


def raw_image(pixels, encoding, padding=0):
    """A sensor_msgs/Image of [h, w, c] pixels, each row followed by some driver's padding."""
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    rows = np.hstack([rows, np.full((height, padding), 77, np.uint8)])
    return SimpleNamespace(
        header=SimpleNamespace(stamp=stamp()),
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=0,
        step=rows.shape[1],
        data=rows.tobytes(),
        __msgtype__="sensor_msgs/msg/Image",
    )


def compressed_image(pixels, extension, text):
    payload = cv2.imencode(extension, pixels[..., ::-1])[1].tobytes()
    return SimpleNamespace(
        header=SimpleNamespace(stamp=stamp()),
        format=text,
        data=payload,
        __msgtype__="sensor_msgs/msg/CompressedImage",
    )


def picture(channels=3, height=6, width=5):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (height, width, channels), dtype=np.uint8)


def decode(message):
    return image_to_rgb(frame_from_message(message, 1))


# --- joints ---------------------------------------------------------------------------------


def test_without_names_order_is_the_contract():
    np.testing.assert_array_equal(joint_state_to_array(joint_state(range(7)), ARM), np.arange(7))


@settings(deadline=None, max_examples=50)
@given(order=st.permutations(range(7)))
def test_names_decide_the_order(order):
    message = joint_state(order, [ARM.joint_names[i] for i in order])
    np.testing.assert_array_equal(joint_state_to_array(message, ARM), np.arange(7))


@pytest.mark.parametrize(
    ("message", "fragments"),
    [
        (joint_state(range(6)), ("position", "6 values", "7")),
        (joint_state(range(14)), ("position", "14 values", "7")),
        (joint_state([0, 0, 0, np.nan, 0, 0, 0]), ("position", "nan", "finite")),
        (
            joint_state(range(7), [*ARM.joint_names[:6], "astribot_arm_left_joint_8"]),
            ("name", "'astribot_arm_left_joint_8'", "one of astribot_arm_left_joint_1"),
        ),
        (
            joint_state(range(7), [*ARM.joint_names[:6], ARM.joint_names[0]]),
            ("name", "'astribot_arm_left_joint_1' 2 times", "once"),
        ),
        (
            joint_state(range(7), ARM.joint_names[:6]),
            ("name", "'astribot_arm_left_joint_7' 0 times", "once"),
        ),
    ],
)
def test_a_wrong_joint_state_is_one_line_with_its_topic(message, fragments):
    with pytest.raises(MessageError) as caught:
        joint_state_to_array(message, ARM)
    assert isinstance(caught.value, ConfigError)
    assert "\n" not in str(caught.value)
    for fragment in (ARM.state_topic, *fragments):
        assert fragment in str(caught.value)


def command_message():
    return SimpleNamespace(header=SimpleNamespace(stamp=None), mode=0, name=[], command=[])


def test_a_command_is_position_mode_with_names_and_stamp():
    when = stamp()
    message = fill_command(command_message(), np.arange(7.0), ARM, when)
    assert message.mode == 1
    assert message.name == list(ARM.joint_names)
    assert message.command == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert message.header.stamp is when


def test_offsets_are_added_to_what_is_measured_and_taken_from_what_is_sent():
    raw = np.linspace(-1, 1, 7)
    measured = joint_state_to_array(joint_state(raw), OFFSET_ARM)
    np.testing.assert_allclose(measured, raw + OFFSET_ARM.joint_offsets)
    sent = fill_command(command_message(), measured, OFFSET_ARM, stamp()).command
    np.testing.assert_allclose(sent, raw)


@pytest.mark.parametrize("positions", [np.zeros(6), np.full(7, np.inf), np.zeros((1, 7))])
def test_nothing_wrong_is_ever_sent(positions):
    with pytest.raises(MessageError, match=r"joint_space_command: command: .*expected 7"):
        fill_command(command_message(), positions, ARM, stamp())


# --- images ---------------------------------------------------------------------------------


def test_stamps_and_sizes_of_a_raw_image():
    frame = frame_from_message(raw_image(picture(), "rgb8", padding=3), 99)
    assert (frame.height, frame.width, frame.row_bytes) == (6, 5, 18)
    assert frame.stamp_ns == 12_000_000_034
    assert frame.received_ns == 99


@pytest.mark.parametrize("padding", [0, 3])
def test_every_raw_encoding_gives_the_same_rgb(padding):
    rgb = picture()
    alpha = picture(1)
    bgr = rgb[..., ::-1]
    for encoding, pixels in (
        ("rgb8", rgb),
        ("bgr8", bgr),
        ("rgba8", np.dstack([rgb, alpha])),
        ("bgra8", np.dstack([bgr, alpha])),
    ):
        np.testing.assert_array_equal(decode(raw_image(pixels, encoding, padding)), rgb)
    grey = picture(1)
    np.testing.assert_array_equal(decode(raw_image(grey, "mono8", padding)), np.repeat(grey, 3, 2))


@pytest.mark.parametrize("text", ["png", "rgb8; png compressed bgr8", "PNG"])
def test_png_is_lossless(text):
    rgb = picture()
    np.testing.assert_array_equal(decode(compressed_image(rgb, ".png", text)), rgb)


@pytest.mark.parametrize("text", ["jpeg", "jpg", "rgb8; jpeg compressed bgr8"])
def test_jpeg_is_rgb_and_not_bgr(text):
    red = np.zeros((32, 48, 3), np.uint8)
    red[..., 0] = 250
    decoded = decode(compressed_image(red, ".jpg", text))
    assert decoded.shape == (32, 48, 3)
    assert np.abs(decoded.astype(int) - red).max() < 8


def test_jpeg_padded_with_zeros_still_decodes():
    message = compressed_image(picture(), ".jpg", "jpeg")
    message.data += b"\0" * 16
    assert decode(message).shape == (6, 5, 3)


@pytest.mark.parametrize("enough", [None, 80])
def test_a_header_with_an_impossible_size_is_one_clear_error(enough):
    message = compressed_image(picture(), ".jpg", "jpeg")
    data = bytearray(message.data)
    start = data.index(b"\xff\xc0")  # start of frame: height and width from the sixth byte on
    data[start + 5 : start + 9] = b"\xff\xdc\xff\xdc"
    message.data = bytes(data)
    with pytest.raises(MessageError, match=r"image: data: found .* do not decode"):
        at_least(message, enough)


def smooth(height, width):
    """A view as a camera has them: shapes and a little noise."""
    generator = np.random.default_rng(1)
    shapes = cv2.resize(generator.uniform(0, 255, (9, 16, 3)), (width, height))
    return np.clip(shapes + generator.normal(0, 3, shapes.shape), 0, 255).astype(np.uint8)


def at_least(message, enough):
    return image_to_rgb(frame_from_message(message, 1), enough=enough)


def test_half_a_jpeg_is_the_mean_of_its_pixels():
    message = compressed_image(smooth(96, 160), ".jpg", "jpeg")
    half = at_least(message, 80)
    means = decode(message).reshape(48, 2, 80, 2, 3).mean((1, 3))
    assert half.shape == (48, 80, 3)
    shifted = np.roll(means, 1, 1)
    assert np.abs(half - means).mean() < 0.3 * np.abs(half - shifted).mean()


@pytest.mark.parametrize(
    ("height", "width", "extension", "enough"),
    [(96, 160, ".jpg", 81), (95, 160, ".jpg", 40), (96, 159, ".jpg", 40), (96, 160, ".png", 40)],
    ids=["too small", "odd height", "odd width", "png"],
)
def test_decoded_whole_where_half_will_not_do(height, width, extension, enough):
    message = compressed_image(smooth(height, width), extension, extension[1:])
    np.testing.assert_array_equal(at_least(message, enough), decode(message))


def thumbnail():
    """EXIF as cameras write it: with a whole small JPEG inside."""
    data = BytesIO()
    Image.fromarray(smooth(48, 80)).save(data, "JPEG")
    return b"Exif\0\0" + data.getvalue()


@pytest.mark.parametrize(
    "options",
    [{"progressive": True}, {"exif": thumbnail()}, {"comment": b"\xff\xc0" * 40}],
    ids=["progressive", "thumbnail", "comment"],
)
def test_half_is_found_whatever_is_in_front_of_the_size(options):
    data = BytesIO()
    Image.fromarray(smooth(96, 160)).save(data, "JPEG", **options)
    message = changed(compressed_image(picture(), ".jpg", "jpeg"), data=data.getvalue())
    assert at_least(message, 80).shape == (48, 80, 3)
    assert at_least(message, 81).shape == (96, 160, 3)


def test_half_a_jpeg_changes_less_than_jpeg_itself():
    original = smooth(720, 1280)
    payload = cv2.imencode(".jpg", original[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, 90))[1]
    message = changed(compressed_image(original, ".jpg", "jpeg"), data=payload.tobytes())
    before, whole, half = (
        np.asarray(Image.fromarray(image).resize((224, 126), Image.Resampling.BILINEAR), int)
        for image in (original, decode(message), at_least(message, 448))
    )
    assert half is not whole
    assert 0.0 < np.abs(half - whole).mean() < np.abs(whole - before).mean()


@pytest.mark.parametrize(
    "data",
    [b"not\xff\xd9", b"\xff\xd8\xff\xd9", b"\xff\xd8" + b"\xff\xe0\0\0" * 9 + b"\xff\xd9"],
    ids=["no marker", "nothing", "empty segments"],
)
def test_what_only_looks_like_a_jpeg_is_one_line(data):
    message = changed(compressed_image(picture(), ".jpg", "jpeg"), data=data)
    with pytest.raises(MessageError, match="do not decode"):
        at_least(message, 40)


def cut(message, length):
    message.data = message.data[:length]
    return message


def changed(message, **fields):
    for name, value in fields.items():
        setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("message", "fragments"),
    [
        (cut(raw_image(picture(), "rgb8"), 89), ("data", "89 bytes", "90 for 5x6")),
        (changed(raw_image(picture(), "rgb8"), step=14), ("step", "14", "at least 15")),
        (changed(raw_image(picture(), "rgb8"), height=0, data=b""), ("data", "not an empty")),
        (raw_image(picture(), "bayer_rggb8"), ("encoding", "'bayer_rggb8'", "rgb8")),
        (cut(compressed_image(picture(3, 64, 64), ".jpg", "jpeg"), 900), ("data", "900", "jpeg")),
        (cut(compressed_image(picture(3, 64, 64), ".png", "png"), 900), ("data", "900", "png")),
        (cut(compressed_image(picture(), ".jpg", "jpeg"), 0), ("data", "0 bytes", "jpeg")),
        (
            changed(compressed_image(picture(), ".jpg", "jpeg"), data=b"not\xff\xd9"),
            ("data", "do not decode", "jpeg"),
        ),
        (compressed_image(picture(), ".png", "h264"), ("format", "'h264'", "jpeg or png")),
    ],
)
def test_a_wrong_image_is_one_line(message, fragments):
    with pytest.raises(MessageError) as caught:
        image_to_rgb(frame_from_message(message, 1, "camera head"), "camera head")
    assert "\n" not in str(caught.value)
    for fragment in ("camera head", *fragments):
        assert fragment in str(caught.value)


def saved(pixels, **options):
    """A JPEG as PIL writes it."""
    data = BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", **options)
    return changed(compressed_image(picture(), ".jpg", "jpeg"), data=data.getvalue())


def header_of(message, **fields):
    """The same JPEG with other values in its frame header: from an offset on, these bytes."""
    data = bytearray(message.data)
    start = data.index(b"\xff\xc0")
    for offset, values in fields.items():
        at = start + int(offset[1:])
        data[at : at + len(values)] = values
    return changed(message, data=bytes(data))


def plain():
    return saved(smooth(16, 32))


@pytest.mark.parametrize(
    ("message", "is_plain"),
    [
        (plain(), True),
        (compressed_image(smooth(16, 32), ".jpg", "jpeg"), True),
        (saved(smooth(16, 32), progressive=True), True),
        (saved(smooth(16, 32), exif=thumbnail()), True),
        (changed(plain(), data=plain().data + b"\0" * 9), True),
        (saved(smooth(16, 32)[..., 0]), False),
        (saved(smooth(16, 32), keep_rgb=True), False),
        (header_of(plain(), _4=b"\x0c"), False),
        (header_of(plain(), _1=b"\xc3"), False),
        (header_of(plain(), _5=b"\0\0"), False),
        (header_of(plain(), _5=b"\xff\xdc\xff\xdc"), False),
        (cut(plain(), 300), False),
        (changed(plain(), data=b"\xff\xd8\xff\xd9"), False),
        (compressed_image(picture(), ".png", "png"), False),
        (raw_image(picture(), "rgb8"), False),
    ],
    ids=[
        "plain", "OpenCV's", "progressive", "thumbnail", "padded", "grey", "RGB inside",
        "12 bits", "lossless", "no rows", "impossible size", "cut", "nothing", "png", "raw",
    ],
)  # fmt: skip
def test_a_plain_jpeg_is_one_that_any_decoder_takes(message, is_plain):
    assert is_plain_jpeg(frame_from_message(message, 1)) is is_plain


def test_a_jpeg_of_cmyk_is_not_plain():
    """Nor is anything else with Adobe's segment in front."""
    data = BytesIO()
    Image.fromarray(smooth(16, 32)).convert("CMYK").save(data, "JPEG")
    message = changed(plain(), data=data.getvalue())
    assert not is_plain_jpeg(frame_from_message(message, 1))
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"
    message = changed(plain(), data=plain().data[:2] + adobe + plain().data[2:])
    assert not is_plain_jpeg(frame_from_message(message, 1))


def all_kinds():
    channels = {"rgba8": 4, "bgra8": 4, "mono8": 1}
    messages = [raw_image(picture(channels.get(kind, 3)), kind) for kind in RAW]
    messages.append(compressed_image(picture(3, 40, 56), ".jpg", "jpeg"))
    messages.append(compressed_image(picture(), ".png", "png"))
    return messages


@pytest.mark.parametrize("message", all_kinds(), ids=[*RAW, "jpeg", "png"])
def test_same_pixels_as_rosbags_image(message):
    reference = pytest.importorskip("rosbags.image", reason="rosbags-image is not installed")
    message.data = np.frombuffer(message.data, np.uint8)
    theirs = reference.message_to_cvimage(message, "rgb8")
    np.testing.assert_array_equal(decode(message), theirs)


@pytest.mark.parametrize("kind", RAW)
def test_same_pixels_as_cv_bridge(kind):
    bridge = pytest.importorskip("cv_bridge", reason="cv_bridge comes with a ROS 2 installation")
    sensor_msgs = pytest.importorskip("sensor_msgs.msg", reason="ROS 2 is not sourced")
    ours = raw_image(picture({"rgba8": 4, "bgra8": 4, "mono8": 1}.get(kind, 3)), kind)
    theirs = sensor_msgs.Image(
        height=ours.height, width=ours.width, encoding=kind, step=ours.step, data=ours.data
    )
    np.testing.assert_array_equal(decode(ours), bridge.CvBridge().imgmsg_to_cv2(theirs, "rgb8"))
