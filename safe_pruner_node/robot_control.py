"""The control side that a robot file describes: the same for the node and for the evaluation."""

from __future__ import annotations

from safe_pruner_node.control.limits import JointLimits
from safe_pruner_node.control.settings import ControlSettings
from safe_pruner_node.control.supervisor import ControlSupervisor
from safe_pruner_node.robot.config import RobotConfig


def joint_limits(robot: RobotConfig) -> JointLimits:
    """The limits in force, in layout order."""
    return JointLimits(
        min_position=robot.limits.min_position,
        max_position=robot.limits.max_position,
        max_velocity=robot.limits.max_velocity,
        max_acceleration=robot.limits.max_acceleration,
        max_jerk=robot.limits.max_jerk,
    )


def control_supervisor(
    robot: RobotConfig, control_rate_hz: float, *, auto_resume: bool
) -> ControlSupervisor:
    """A supervisor in HOLD that has seen nothing yet.

    Args:
        robot: Times, tolerances and limits.
        control_rate_hz: Joint commands per second.
        auto_resume: Return to POLICY by itself after a fault that has passed.
    """
    settings = ControlSettings(
        dt_s=1.0 / control_rate_hz,
        blend_s=robot.control.blend_s,
        first_action_tolerance=robot.first_action_tolerance,
        max_state_age_s=robot.control.max_state_age_s,
        starvation_timeout_s=robot.control.starvation_timeout_s,
        first_chunk_timeout_s=robot.control.first_chunk_timeout_s,
        auto_resume=auto_resume,
    )
    return ControlSupervisor(settings, joint_limits(robot))
