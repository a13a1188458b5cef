"""The one place that commands leave: a RobotJointController per commanded part."""

from __future__ import annotations

from rclpy.lifecycle import LifecycleNode

from safe_pruner_node.nodes.messages import qos_profile
from safe_pruner_node.robot.codecs import fill_command
from safe_pruner_node.robot.config import RobotConfig
from safe_pruner_node.types import FloatArray


class CommandPublishers:
    """Publishes joint targets; called by the control thread only."""

    def __init__(self, node: LifecycleNode, robot: RobotConfig) -> None:
        from astribot_msgs.msg import RobotJointController  # noqa: PLC0415 - vendor's

        self._node = node
        self._message = RobotJointController
        qos = qos_profile(robot.qos.command)
        slices = robot.layout.slices
        self._parts = []
        for segment in robot.layout.segments:
            part = robot.parts[segment.part]
            if segment.commanded and part.command_topic is not None:
                # A plain publisher on purpose: a lifecycle publisher is silent from the moment
                # a deactivation begins, and the hold has to go out until the loop has ended.
                publisher = node.create_publisher(RobotJointController, part.command_topic, qos)
                self._parts.append((publisher, part, slices[segment.part]))

    def publish(self, position: FloatArray) -> None:
        """Send one command for every commanded part.

        Args:
            position: Targets in layout order, rad and gripper units, [dof].
        """
        stamp = self._node.get_clock().now().to_msg()
        for publisher, part, where in self._parts:
            message = self._message()
            fill_command(message, position[where], part, stamp)
            publisher.publish(message)

    def close(self) -> None:
        """Destroy the publishers."""
        for publisher, _, _ in self._parts:
            self._node.destroy_publisher(publisher)
        self._parts.clear()
