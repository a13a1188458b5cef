"""The twin's parameters: names, defaults, ranges."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.strict import STRICT, did_you_mean, shown

CAMERA_SCALE = 0.5
"""Of the robot's resolutions: what demonstrations, evaluation and, by default, the node draw at."""


@dataclass(frozen=True, config=STRICT)
class TwinSettings:
    """Parameters of ``twin_node``. The defaults are the robot's rates at half its resolution.

    Attributes:
        robot_config: Robot file; empty for ``config/astribot_s1.yaml``.
        scene: What stands around the robot where there is no task.
        task: Task to be done, which brings its own scene and its judge; empty for none.
        seed: Places the objects; the seed of the task's episode.
        state_rate_hz: Joint states per second.
        camera_rate_hz: Sets of images per second.
        camera_scale: Scale of the camera resolutions of the robot file.
        cameras_on: Cameras publish without a call of ``/astribot_camera_control``.
        jpeg_quality: Quality of compressed images, 1..100.
        lock_step: Publish ``/clock`` and advance one control period per set of commands.
        control_period_s: Length of a lock-step tick, s.
        lock_step_timeout_s: Wall time after which a tick goes on without commands, s.
        niceness: Added to the process's niceness: the control process goes first.
        summary_path: Where to write the counts as JSON at the end; empty for nowhere.
    """

    robot_config: str = ""
    scene: str = "table"
    task: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    state_rate_hz: Annotated[float, Field(gt=0, le=500)] = 250.0
    camera_rate_hz: Annotated[float, Field(gt=0, le=120)] = 30.0
    camera_scale: Annotated[float, Field(ge=0.1, le=2)] = CAMERA_SCALE
    cameras_on: bool = True
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 90
    lock_step: bool = False
    control_period_s: Annotated[float, Field(gt=0, le=1)] = 0.004
    lock_step_timeout_s: Annotated[float, Field(gt=0)] = 1.0
    niceness: Annotated[int, Field(ge=0, le=19)] = 5
    summary_path: str = ""


SETTING_NAMES = tuple(field.name for field in dataclasses.fields(TwinSettings))


def twin_settings(values: Mapping[str, object]) -> TwinSettings:
    """Checks parameters; those left out keep their defaults.

    Raises:
        ConfigError: Unknown name, wrong type, out of range, or a scene besides a task.
    """
    for name in values:
        if name not in SETTING_NAMES:
            raise ConfigError(
                "parameter", name, "an unknown parameter", did_you_mean(name, SETTING_NAMES)
            )
    try:
        # By way of JSON: there strict still reads a whole number as a float.
        text = json.dumps(dict(values), default=str)
        settings = TypeAdapter(TwinSettings).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        expected = first["msg"].removeprefix("Input should be ")
        raise ConfigError(
            "parameter", str(first["loc"][-1]), shown(first["input"]), expected
        ) from None
    if settings.task and settings.scene != TwinSettings.scene:
        expected = f"no scene beside task {settings.task}, which brings its own"
        raise ConfigError("parameter", "scene", settings.scene, expected)
    return settings
