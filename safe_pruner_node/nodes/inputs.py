"""Subscriptions: callbacks store bytes and stamps, nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rclpy.callback_groups import CallbackGroup
from rclpy.lifecycle import LifecycleNode
from rclpy.subscription import Subscription

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.nodes.messages import camera_message_type, qos_profile
from safe_pruner_node.nodes.observation_buffer import ObservationBuffer
from safe_pruner_node.robot.codecs import MessageError, frame_from_message, joint_state_to_array
from safe_pruner_node.robot.config import CameraConfig, PartConfig, RobotConfig
from safe_pruner_node.types import FloatArray


class JointStates:
    """The newest measured positions of every part of the layout; thread-safe."""

    def __init__(self, robot: RobotConfig) -> None:
        self._layout = robot.layout
        self._newest: dict[str, tuple[float, FloatArray]] = {}
        self._lock = threading.Lock()

    def store(self, part: str, positions: FloatArray, time_s: float) -> None:
        """Keep one part's positions with the control-clock time they arrived."""
        with self._lock:
            self._newest[part] = (time_s, positions)

    def measured(self) -> tuple[FloatArray, float] | None:
        """Positions in layout order and the arrival time of the oldest part, or None."""
        with self._lock:
            newest = dict(self._newest)
        if any(segment.part not in newest for segment in self._layout.segments):
            return None
        positions = self._layout.join({part: values for part, (_, values) in newest.items()})
        return positions, min(time_s for time_s, _ in newest.values())

    def missing(self) -> list[str]:
        """Parts that no message has come from."""
        with self._lock:
            return [s.part for s in self._layout.segments if s.part not in self._newest]


class Inputs:
    """Camera and joint-state subscriptions of one configured robot.

    Args:
        node: Where the subscriptions live.
        robot: Topics, types, QoS and layout.
        now_s: The control clock.
        on_bad_message: Called with one line for a message that cannot be used.
        group: Callback group of the subscriptions.
    """

    def __init__(
        self,
        node: LifecycleNode,
        robot: RobotConfig,
        now_s: Callable[[], float],
        on_bad_message: Callable[[str], None],
        group: CallbackGroup,
    ) -> None:
        from astribot_msgs.msg import RobotJointState  # noqa: PLC0415 - vendor's where sourced

        self.cameras = ObservationBuffer(
            tuple(camera.name for camera in robot.cameras),
            robot.control.max_camera_age_s,
            robot.control.max_camera_skew_s,
        )
        self.joints = JointStates(robot)
        self._node = node
        self._now_s = now_s
        self._on_bad_message = on_bad_message
        self._subscriptions: list[Subscription] = [
            node.create_subscription(
                camera_message_type(camera),
                camera.topic,
                self._camera_callback(camera),
                qos_profile(robot.qos.camera),
                callback_group=group,
            )
            for camera in robot.cameras
        ]
        for segment in robot.layout.segments:
            part = robot.parts[segment.part]
            self._subscriptions.append(
                node.create_subscription(
                    RobotJointState,
                    part.state_topic,
                    self._joint_callback(part),
                    qos_profile(robot.qos.state),
                    callback_group=group,
                )
            )

    def close(self) -> None:
        """Destroy the subscriptions."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _camera_callback(self, camera: CameraConfig) -> Callable[[object], None]:
        def store(message: object) -> None:
            try:
                frame = frame_from_message(message, time.monotonic_ns())
            except MessageError as error:
                self._on_bad_message(str(error))
                return
            self.cameras.add(camera.name, frame)

        return store

    def _joint_callback(self, part: PartConfig) -> Callable[[object], None]:
        def store(message: object) -> None:
            try:
                positions = joint_state_to_array(message, part)
            except MessageError as error:
                self._on_bad_message(str(error))
                return
            self.joints.store(part.part, positions, self._now_s())

        return store


def check_topic_types(node: LifecycleNode, robot: RobotConfig) -> None:
    """Refuse a topic that somebody publishes with another message type.

    DDS never connects the two, so without this check the node would wait for ever.

    Raises:
        ConfigError: Names the topic, the type on the network and the configured one.
    """
    expected = {camera.topic: f"sensor_msgs/msg/{camera.type}" for camera in robot.cameras}
    for segment in robot.layout.segments:
        part = robot.parts[segment.part]
        expected[part.state_topic] = "astribot_msgs/msg/RobotJointState"
        if part.command_topic is not None:
            expected[part.command_topic] = "astribot_msgs/msg/RobotJointController"
    for topic, types in node.get_topic_names_and_types():
        wanted = expected.get(topic)
        if wanted is not None and wanted not in types:
            raise ConfigError(f"topic {topic}", "type", ", ".join(types), wanted)
