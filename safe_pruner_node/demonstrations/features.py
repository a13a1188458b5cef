"""Names of a dataset's features, and which camera of the robot is which of them.

LeRobot's convention puts the place first (``wrist_left``), the robot file puts the side first
(``left_wrist``). This module is the only place where one becomes the other.
"""

from __future__ import annotations

from collections.abc import Mapping

STATE = "observation.state"
ACTION = "action"
ENVIRONMENT = "observation.environment_state"
"""LeRobot's name for what only a simulator knows; here the two landmarks of a task."""

IMAGES = "observation.images."

CAMERA_FEATURES: Mapping[str, str] = {
    "head": IMAGES + "head",
    "left_wrist": IMAGES + "wrist_left",
    "right_wrist": IMAGES + "wrist_right",
}
"""Camera in the robot file to its feature."""

LANDMARK_NAMES = ("take_x", "take_y", "take_z", "goal_x", "goal_y", "goal_z")
"""Where the thing to take is and where it goes, world, m."""

DEFAULT_FEATURES: Mapping[str, str] = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
"""Columns that every LeRobot dataset has, with their types."""


def camera_feature(camera: str) -> str:
    """Feature of a camera of the robot file: ``left_wrist`` is observation.images.wrist_left."""
    return CAMERA_FEATURES.get(camera, IMAGES + camera)
