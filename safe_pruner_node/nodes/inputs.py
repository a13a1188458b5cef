"""Subscriptions, polled: bytes and stamps are stored, nothing else is done with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.lifecycle import LifecycleNode
from rclpy.subscription import Subscription

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.nodes.messages import camera_message_type, qos_profile
from safe_pruner_node.nodes.observation_buffer import ObservationBuffer
from safe_pruner_node.robot.codecs import MessageError, frame_from_message, joint_state_to_array
from safe_pruner_node.robot.config import CameraConfig, PartConfig, QosProfile, RobotConfig
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

    def clear(self) -> None:
        """Forget every part."""
        with self._lock:
            self._newest.clear()

    def missing(self) -> list[str]:
        """Parts that no message has come from."""
        with self._lock:
            return [s.part for s in self._layout.segments if s.part not in self._newest]


class _PolledGroup(CallbackGroup):
    """Keeps its subscriptions out of the executor's wait set: they are taken from by hand.

    The executor rebuilds its wait set for every round, 0.5 ms of Python; at 250 Hz from every part
    that alone fills a core. Polling costs the same whatever the robot's rate is.
    """

    def can_execute(self, entity: object) -> bool:  # noqa: ARG002
        return False

    def beginning_execution(self, entity: object) -> bool:  # noqa: ARG002
        return False

    def ending_execution(self, entity: object) -> None:
        """Nothing ever begins."""


class Inputs:
    """Camera and joint-state subscriptions of one configured robot.

    Args:
        node: Where the subscriptions live.
        robot: Topics, types, QoS and layout.
        now_s: The control clock.
        on_bad_message: Called with one line for a message that cannot be used.
    """

    def __init__(
        self,
        node: LifecycleNode,
        robot: RobotConfig,
        now_s: Callable[[], float],
        on_bad_message: Callable[[str], None],
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
        group = _PolledGroup()

        def subscribe(kind: Any, topic: str, qos: QosProfile) -> Subscription:  # noqa: ANN401
            return node.create_subscription(
                kind, topic, lambda _: None, qos_profile(qos), callback_group=group
            )

        self._cameras = [
            (camera, subscribe(camera_message_type(camera), camera.topic, robot.qos.camera))
            for camera in robot.cameras
        ]
        parts = [robot.parts[segment.part] for segment in robot.layout.segments]
        self._parts = [
            (part, subscribe(RobotJointState, part.state_topic, robot.qos.state)) for part in parts
        ]

    def begin(self) -> None:
        """Forget what arrived before: an old message taken now would look new."""
        for _, subscription in [*self._cameras, *self._parts]:
            for _ in _taken(subscription):
                pass
        self.joints.clear()

    def poll_joints(self) -> None:
        """Take what has arrived of every part; called by the control thread before a command."""
        for part, subscription in self._parts:
            for message in _taken(subscription):
                self._store_joints(part, message)

    def poll_cameras(self) -> None:
        """Take the images that have arrived; called by the executor's thread."""
        for camera, subscription in self._cameras:
            for message in _taken(subscription):
                self._store_image(camera, message)

    def _store_joints(self, part: PartConfig, message: object) -> None:
        try:
            positions = joint_state_to_array(message, part)
        except MessageError as error:
            self._on_bad_message(str(error))
        else:
            self.joints.store(part.part, positions, self._now_s())

    def _store_image(self, camera: CameraConfig, message: object) -> None:
        try:
            frame = frame_from_message(message, time.monotonic_ns(), camera.topic)
        except MessageError as error:
            self._on_bad_message(str(error))
        else:
            self.cameras.add(camera.name, frame)

    def close(self) -> None:
        """Destroy the subscriptions."""
        for _, subscription in [*self._cameras, *self._parts]:
            self._node.destroy_subscription(subscription)
        self._cameras.clear()
        self._parts.clear()


def _taken(subscription: Subscription) -> Iterator[object]:
    """Messages waiting in a subscription, oldest first."""
    while True:
        with subscription.handle:
            taken = subscription.handle.take_message(subscription.msg_type, subscription.raw)
        if taken is None:
            return
        yield taken[0]


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
