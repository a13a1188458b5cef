"""ROS message types and QoS profiles from the robot's description."""

from __future__ import annotations

import importlib.util
from typing import Any

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.config import CameraConfig, QosProfile


def qos_profile(config: QosProfile) -> QoSProfile:
    """The rclpy profile of a configured reliability and depth; always volatile, keep last."""
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=config.depth,
        reliability=ReliabilityPolicy[config.reliability.upper()],
        durability=DurabilityPolicy.VOLATILE,
    )


def camera_message_type(camera: CameraConfig) -> Any:  # noqa: ANN401 - a generated class
    """``sensor_msgs`` class of a camera's topic."""
    import sensor_msgs.msg  # noqa: PLC0415 - generated, slow to import

    return getattr(sensor_msgs.msg, camera.type)


def require_robot_messages() -> None:
    """Check that the robot's message package is there before anything is created from it.

    Raises:
        ConfigError: Names the package and how to get it.
    """
    if importlib.util.find_spec("astribot_msgs") is None:
        raise ConfigError(
            "message package",
            "astribot_msgs",
            "not on PYTHONPATH",
            "the robot vendor's workspace or ros2_ws/install sourced",
        )
