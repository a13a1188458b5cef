"""ROS messages to arrays and back, by duck typing: no message package is imported here."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.config import PartConfig
from safe_pruner_node.types import CameraFrame, FloatArray, RgbImage

MODE_POSITION = 1
"""``RobotJointController.mode`` for N position values (vendor's message definition)."""

_FILE_END = {"jpeg": b"\xff\xd9", "png": b"IEND\xaeB`\x82"}
"""Last bytes of a whole file; without them OpenCV decodes a truncated one half grey."""
_MARKER, _START_OF_SCAN, _ADOBE = 0xFF, 0xDA, 0xEE
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""SOF0..15 of JPEG; the three in between are tables and an extension."""
_PIXELS_MAX = 1 << 27
"""A header that claims more lies; OpenCV, which refuses that, might let half of it pass."""
_PLAIN = frozenset({0xC0, 0xC1, 0xC2})
"""Baseline, extended and progressive; the others are lossless or arithmetic."""
_CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1}
_TO_RGB = {
    "bgr8": cv2.COLOR_BGR2RGB,
    "rgba8": cv2.COLOR_RGBA2RGB,
    "bgra8": cv2.COLOR_BGRA2RGB,
    "mono8": cv2.COLOR_GRAY2RGB,
}


class MessageError(ConfigError):
    """A received message that cannot be used: one line with topic, field, found, expected."""


def joint_state_to_array(msg: Any, part: PartConfig) -> FloatArray:  # noqa: ANN401 - duck typed
    """Measured positions of a ``RobotJointState``, with the joint offsets added.

    Names may be empty, as in the vendor's own messages: order is then the contract. Where they
    are given, they decide the order.

    Args:
        msg: The message.
        part: The part that the topic belongs to.

    Returns:
        Positions in the part's order, rad or gripper units, [dof].

    Raises:
        MessageError: Wrong count, unknown or repeated joint, or a value that is not finite.
    """
    source = f"topic {part.state_topic}"
    positions = np.asarray(msg.position, dtype=np.float64)
    if positions.shape != (part.dof,):
        raise MessageError(source, "position", f"{positions.size} values", f"{part.dof}")
    if not np.all(np.isfinite(positions)):
        raise MessageError(source, "position", positions.tolist(), "finite numbers")
    names = list(msg.name)
    if names:
        positions = positions[_order(source, names, part.joint_names)]
    return positions + part.joint_offsets


def _order(source: str, names: list[str], joint_names: tuple[str, ...]) -> list[int]:
    """Where each of the part's joints is in a message."""
    for name in names:
        if name not in joint_names:
            raise MessageError(source, "name", repr(name), f"one of {', '.join(joint_names)}")
    for name in joint_names:
        if names.count(name) != 1:
            raise MessageError(source, "name", f"{name!r} {names.count(name)} times", "once")
    return [names.index(name) for name in joint_names]


def fill_command(
    msg: Any,  # noqa: ANN401 - duck typed
    positions: FloatArray,
    part: PartConfig,
    stamp: Any,  # noqa: ANN401 - builtin_interfaces/Time
) -> Any:  # noqa: ANN401 - the same message
    """Fills a ``RobotJointController`` with position targets, joint offsets subtracted.

    Args:
        msg: The message to fill.
        positions: Targets in the part's order, rad or gripper units, [dof].
        part: The part that the command is for.
        stamp: Header stamp.

    Returns:
        The same message.

    Raises:
        MessageError: Wrong count or a value that is not finite.
    """
    if np.shape(positions) != (part.dof,) or not np.all(np.isfinite(positions)):
        source = f"topic {part.command_topic}"
        raise MessageError(source, "command", np.asarray(positions).tolist(), f"{part.dof} finite")
    msg.header.stamp = stamp
    msg.mode = MODE_POSITION
    msg.name = list(part.joint_names)
    msg.command = (positions - part.joint_offsets).tolist()
    return msg


def frame_from_message(msg: Any, received_ns: int, source: str = "image") -> CameraFrame:  # noqa: ANN401 - duck typed
    """Bytes and stamps of a ``CompressedImage`` or an ``Image``, not decoded.

    Args:
        msg: The message; a ``CompressedImage`` is the one with a ``format``.
        received_ns: Steady clock at reception, nanoseconds.
        source: What errors call the message, such as its topic.

    Raises:
        MessageError: A compressed format that is neither JPEG nor PNG.
    """
    stamp_ns = msg.header.stamp.sec * 1_000_000_000 + msg.header.stamp.nanosec
    data = bytes(msg.data)
    if not hasattr(msg, "format"):
        return CameraFrame(
            data, msg.encoding, msg.height, msg.width, msg.step, stamp_ns, received_ns
        )
    # "jpeg", or image_transport's "rgb8; jpeg compressed bgr8"; some drivers write "jpg".
    text = msg.format.lower().replace("jpg", "jpeg")
    encoding = next((name for name in _FILE_END if name in text), None)
    if encoding is None:
        raise MessageError(source, "format", repr(msg.format), "jpeg or png")
    return CameraFrame(data, encoding, 0, 0, 0, stamp_ns, received_ns)


def image_to_rgb(
    frame: CameraFrame, source: str = "image", *, enough: int | None = None
) -> RgbImage:
    """Decodes a frame.

    A JPEG at half its size is the mean over 2x2 pixels, nearly, and takes half the time. What it
    changes is less than what JPEG itself did: fitted into 224x224, a 1280x720 view of the twin at
    quality 90 moves by 0.13 grey levels in the mean (0.21 with camera noise of 4 levels), against
    0.33 (0.41) between the whole JPEG and the image before compression.

    Args:
        frame: Compressed or raw.
        source: What errors call the frame, such as its camera.
        enough: A longer side, pixels, that is enough: a JPEG whose half has it is decoded at half
            its size. None: always all of it.

    Returns:
        [height, width, 3], RGB.

    Raises:
        MessageError: Unknown encoding, truncated payload, or bytes that do not decode.
    """
    if frame.encoding in _FILE_END:
        return _decode_compressed(frame, source, enough)
    if frame.encoding not in _CHANNELS:
        expected = f"one of {', '.join([*_FILE_END, *_CHANNELS])}"
        raise MessageError(source, "encoding", repr(frame.encoding), expected)
    channels = _CHANNELS[frame.encoding]
    row_pixels = frame.width * channels
    if frame.row_bytes < row_pixels:
        raise MessageError(source, "step", frame.row_bytes, f"at least {row_pixels}")
    size = frame.row_bytes * frame.height
    if len(frame.data) != size or size == 0:
        expected = f"{size} for {frame.width}x{frame.height}, and not an empty image"
        raise MessageError(source, "data", f"{len(frame.data)} bytes", expected)
    rows = np.frombuffer(frame.data, np.uint8).reshape(frame.height, frame.row_bytes)
    # A driver may pad its rows.
    pixels = np.ascontiguousarray(rows[:, :row_pixels])
    pixels = pixels.reshape(frame.height, frame.width, channels)
    if frame.encoding == "rgb8":
        return pixels
    return np.asarray(cv2.cvtColor(pixels, _TO_RGB[frame.encoding]), dtype=np.uint8)


def is_plain_jpeg(frame: CameraFrame) -> bool:
    """Whether a frame is a whole JPEG as every decoder knows it: 8 bits, luminance and two colours.

    Of anything else `image_to_rgb` says what is in it, or what is wrong with it.
    """
    if frame.encoding != "jpeg" or not _is_whole(frame):
        return False
    header = _jpeg_header(frame.data)
    if header is None or header.kind not in _PLAIN or header.bits != 8:
        return False
    return 0 < header.width * header.height <= _PIXELS_MAX and header.is_ycc


def _is_whole(frame: CameraFrame) -> bool:
    """Whether a compressed payload has its end; some cameras pad it with zeros."""
    return frame.data.rstrip(b"\0").endswith(_FILE_END[frame.encoding])


def _decode_compressed(frame: CameraFrame, source: str, enough: int | None) -> RgbImage:
    bgr = None
    if _is_whole(frame):
        payload = np.frombuffer(frame.data, np.uint8)
        half = frame.encoding == "jpeg" and enough is not None and _half_is_enough(frame, enough)
        size = cv2.IMREAD_REDUCED_COLOR_2 if half else cv2.IMREAD_COLOR
        # An EXIF rotation would change the resolution: pixels as the sensor has them.
        with suppress(cv2.error):  # a header that claims a size that nobody has
            bgr = cv2.imdecode(payload, size | cv2.IMREAD_IGNORE_ORIENTATION)
    if bgr is None:
        found = f"{len(frame.data)} bytes that do not decode"
        raise MessageError(source, "data", found, f"a whole {frame.encoding} file")
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _half_is_enough(frame: CameraFrame, enough: int) -> bool:
    """What the header says of the size; the robot file may say what the driver does not do."""
    header = _jpeg_header(frame.data)
    if header is None or header.width * header.height > _PIXELS_MAX:
        return False  # the decoder will say what is wrong
    size = header.width, header.height
    # Half an odd side would be rounded, and with it the aspect.
    return max(size) >= 2 * enough and size[0] % 2 == size[1] % 2 == 0


@dataclass(frozen=True)
class _JpegHeader:
    """What a JPEG says of itself before its first scan.

    Attributes:
        kind: Its start-of-frame marker.
        bits: Per sample.
        width: Columns.
        height: Rows.
        components: Their ids.
        is_adobe: Adobe's segment came before, which may say what they are.
    """

    kind: int
    bits: int
    width: int
    height: int
    components: tuple[int, ...]
    is_adobe: bool

    @property
    def is_ycc(self) -> bool:
        """Surely luminance and two colours, by libjpeg's rule for files without Adobe's segment."""
        return len(self.components) == 3 and bytes(self.components) != b"RGB" and not self.is_adobe


def _jpeg_header(data: bytes) -> _JpegHeader | None:
    """A JPEG's frame header; None where there is none.

    A few microseconds; PIL takes ten times as long to say it.
    """
    at = 2  # after the start-of-image marker
    is_adobe = False
    while len(data) >= at + 10 and data[at] == _MARKER:
        kind = data[at + 1]
        if kind == _MARKER:  # fill byte
            at += 1
        elif kind in _FRAME_HEADERS:
            return _JpegHeader(
                kind=kind,
                bits=data[at + 4],
                width=int.from_bytes(data[at + 7 : at + 9], "big"),
                height=int.from_bytes(data[at + 5 : at + 7], "big"),
                components=tuple(data[at + 10 : at + 10 + 3 * data[at + 9] : 3]),
                is_adobe=is_adobe,
            )
        elif kind == _START_OF_SCAN:
            return None
        else:
            is_adobe |= kind == _ADOBE
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
