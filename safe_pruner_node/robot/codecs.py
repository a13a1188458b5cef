"""ROS messages to arrays and back, by duck typing: no message package is imported here."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.config import PartConfig
from safe_pruner_node.types import CameraFrame, FloatArray, RgbImage

MODE_POSITION = 1
"""``RobotJointController.mode`` for N position values (vendor's message definition)."""

_COMPRESSED = {"jpeg", "png"}
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
    names = list(msg.name)
    if names:
        if sorted(names) != sorted(part.joint_names):
            raise MessageError(source, "name", ", ".join(names), ", ".join(part.joint_names))
        positions = positions[[names.index(name) for name in part.joint_names]]
    if not np.all(np.isfinite(positions)):
        raise MessageError(source, "position", positions.tolist(), "finite numbers")
    return positions + part.joint_offsets


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


def frame_from_message(msg: Any, received_ns: int) -> CameraFrame:  # noqa: ANN401 - duck typed
    """Bytes and stamps of a ``CompressedImage`` or an ``Image``, not decoded.

    Args:
        msg: The message; ``format`` tells a ``CompressedImage``.
        received_ns: Steady clock at reception, nanoseconds.

    Raises:
        MessageError: A compressed format that is neither JPEG nor PNG.
    """
    stamp_ns = msg.header.stamp.sec * 1_000_000_000 + msg.header.stamp.nanosec
    if not hasattr(msg, "format"):
        return CameraFrame(
            bytes(msg.data), msg.encoding, msg.height, msg.width, msg.step, stamp_ns, received_ns
        )
    # "jpeg", or image_transport's "rgb8; jpeg compressed bgr8"; some drivers write "jpg".
    text = msg.format.lower().replace("jpg", "jpeg")
    encoding = next((name for name in sorted(_COMPRESSED) if name in text), None)
    if encoding is None:
        raise MessageError("compressed image", "format", repr(msg.format), "jpeg or png")
    return CameraFrame(bytes(msg.data), encoding, 0, 0, 0, stamp_ns, received_ns)


def image_to_rgb(frame: CameraFrame) -> RgbImage:
    """Decodes a frame.

    Returns:
        [height, width, 3], RGB.

    Raises:
        MessageError: Unknown encoding, truncated payload, or bytes that do not decode.
    """
    if frame.encoding in _COMPRESSED:
        return _decode_compressed(frame)
    if frame.encoding not in _CHANNELS:
        expected = ", ".join([*sorted(_COMPRESSED), *_CHANNELS])
        raise MessageError("image", "encoding", repr(frame.encoding), f"one of {expected}")
    channels = _CHANNELS[frame.encoding]
    row_pixels = frame.width * channels
    if frame.row_bytes < row_pixels:
        raise MessageError("image", "step", frame.row_bytes, f"at least {row_pixels}")
    if len(frame.data) < frame.row_bytes * frame.height or not row_pixels * frame.height:
        expected = f"{frame.row_bytes * frame.height} for {frame.width}x{frame.height}"
        raise MessageError("image", "data", f"{len(frame.data)} bytes", expected)
    rows = np.frombuffer(frame.data, np.uint8, frame.row_bytes * frame.height)
    rows = rows.reshape(frame.height, frame.row_bytes)[:, :row_pixels]  # rows may be padded
    pixels = np.ascontiguousarray(rows).reshape(frame.height, frame.width, channels)
    if frame.encoding == "rgb8":
        return pixels
    return np.asarray(cv2.cvtColor(pixels, _TO_RGB[frame.encoding]), dtype=np.uint8)


def _decode_compressed(frame: CameraFrame) -> RgbImage:
    payload = np.frombuffer(frame.data, np.uint8)
    bgr = cv2.imdecode(payload, cv2.IMREAD_COLOR) if payload.size else None
    if bgr is None:
        raise MessageError(
            "compressed image", "data", f"{payload.size} bytes", f"a whole {frame.encoding} file"
        )
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), dtype=np.uint8)
