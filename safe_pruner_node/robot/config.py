"""The robot file (``config/astribot_s1.yaml``) read strictly into frozen data classes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.calibration import CameraCalibration, load_calibration
from safe_pruner_node.robot.joint_offsets import load_joint_offsets
from safe_pruner_node.robot.layout import Layout, Segment
from safe_pruner_node.robot.limits import LimitArrays, LimitsFile, SourceLimits, combine_limits
from safe_pruner_node.robot.policy import PolicyConfig
from safe_pruner_node.robot.strict import STRICT, did_you_mean, load_yaml, matching, shown
from safe_pruner_node.types import FloatArray

Positive = Annotated[float, Field(gt=0)]
TopicName = Annotated[
    str, matching(r"(/[A-Za-z_][A-Za-z0-9_]*)+", "a topic name with a leading slash")
]
CameraName = Annotated[
    str, matching(r"[a-z][a-z0-9_]*", "lower-case letters, digits and _, for it is part of topics")
]


@dataclass(frozen=True, config=STRICT)
class QosProfile:
    """A ROS 2 quality-of-service profile; durability is always volatile.

    Attributes:
        reliability: ``reliable`` or ``best_effort``.
        depth: Messages kept.
    """

    reliability: Literal["reliable", "best_effort"]
    depth: Annotated[int, Field(gt=0)]


@dataclass(frozen=True, config=STRICT)
class QosConfig:
    """Profiles of the node's own ends and of the robot's.

    Attributes:
        state: The node's joint-state subscriptions.
        camera: The node's camera subscriptions.
        command: The node's command publishers.
        robot_publisher: What the robot (and the twin) offers for states and images.
        robot_subscriber: What the robot (and the twin) asks for on command topics.
    """

    state: QosProfile
    camera: QosProfile
    command: QosProfile
    robot_publisher: QosProfile
    robot_subscriber: QosProfile


@dataclass(frozen=True, config=STRICT)
class ControlConfig:
    """Rates and safety thresholds of the control process.

    Attributes:
        rate_hz: Joint commands per second.
        query_rate_hz: Policy queries per second at most.
        blend_s: Time to go over from an old chunk to a new one, seconds.
        first_action_tolerance_rad: Largest distance between the measured joints and the first
            action of the first chunk, rad.
        first_action_tolerance_gripper: The same for grippers, 0..100 units.
        max_state_age_s: Joint states older than this hold the robot, seconds.
        max_camera_age_s: Images older than this are not given to the policy, seconds.
        max_camera_skew_s: Largest difference between the stamps of one image set, seconds.
        starvation_timeout_s: Time without actions after which POLICY becomes HOLD, seconds.
        first_chunk_timeout_s: Time to wait for the first chunk after a start, seconds.
    """

    rate_hz: Annotated[float, Field(ge=10, le=1000)]
    query_rate_hz: Positive
    blend_s: Annotated[float, Field(ge=0)]
    first_action_tolerance_rad: Positive
    first_action_tolerance_gripper: Positive
    max_state_age_s: Positive
    max_camera_age_s: Positive
    max_camera_skew_s: Positive
    starvation_timeout_s: Positive
    first_chunk_timeout_s: Positive


@dataclass(frozen=True, config=STRICT)
class _CameraFile:
    topic: TopicName
    type: Literal["CompressedImage", "Image"]
    width: Annotated[int, Field(gt=0)]
    height: Annotated[int, Field(gt=0)]
    calibration: str | None


@dataclass(frozen=True, config=STRICT)
class _PartFile:
    kind: Literal["arm", "gripper", "torso", "head", "chassis"]
    joint_names: Annotated[tuple[str, ...], Field(min_length=1)]
    state_topic: TopicName
    command_topic: TopicName | None
    home: tuple[float, ...]


@dataclass(frozen=True, config=STRICT)
class _RobotFile:
    layout: str
    layouts: Mapping[str, Annotated[tuple[str, ...], Field(min_length=1)]]
    parts: Mapping[str, _PartFile]
    joint_offsets: str | None
    hardware: Mapping[str, Mapping[str, SourceLimits]]
    limits: LimitsFile
    cameras: Mapping[CameraName, _CameraFile]
    policy: PolicyConfig
    control: ControlConfig
    qos: QosConfig


@dataclasses.dataclass(frozen=True)
class CameraConfig:
    """One camera stream.

    Attributes:
        name: Policy-side name (``head``, ``left_wrist``, ``right_wrist``).
        topic: Image topic.
        type: ``CompressedImage`` or ``Image`` of ``sensor_msgs``.
        width: Columns the camera is set to.
        height: Rows the camera is set to.
        calibration: Its intrinsics file; None where images are used as they come.
    """

    name: str
    topic: str
    type: Literal["CompressedImage", "Image"]
    width: int
    height: int
    calibration: Path | None

    def load_calibration(self) -> CameraCalibration | None:
        """The intrinsics of this stream.

        Raises:
            ConfigError: The file is missing, malformed or for another resolution.
        """
        if self.calibration is None:
            return None
        return load_calibration(self.calibration, width=self.width, height=self.height)


@dataclasses.dataclass(frozen=True)
class PartConfig:
    """One part of the robot: a joint-state topic and perhaps a command topic.

    Attributes:
        part: Part name, such as ``astribot_arm_left``.
        kind: ``arm``, ``gripper``, ``torso``, ``head`` or ``chassis``.
        joint_names: Joint names in message order.
        state_topic: ``RobotJointState`` topic.
        command_topic: ``RobotJointController`` topic; None where we never command.
        home: Home pose, rad or gripper units, [dof].
        joint_offsets: Added to measured positions, subtracted from commands, rad, [dof].
    """

    part: str
    kind: Literal["arm", "gripper", "torso", "head", "chassis"]
    joint_names: tuple[str, ...]
    state_topic: str
    command_topic: str | None
    home: FloatArray
    joint_offsets: FloatArray

    @property
    def dof(self) -> int:
        """Number of joints."""
        return len(self.joint_names)


@dataclasses.dataclass(frozen=True)
class RobotConfig:
    """Everything the robot file says, validated.

    Attributes:
        path: The file.
        layout: Order and units of the state and action vectors.
        parts: The parts of the layout, in its order: the topics to subscribe and publish.
        all_parts: Every part the file describes, also those outside the layout.
        cameras: Camera streams, in the policy's order.
        limits: Limits in force, in layout order.
        hardware_limits: What the hardware allows, before margin and operator's limits.
        policy: Meaning of the checkpoint's vectors.
        control: Rates and safety thresholds.
        qos: Quality of service per kind of topic.
        home: Home pose in layout order, robot units, [dof].
    """

    path: Path
    layout: Layout
    parts: Mapping[str, PartConfig]
    all_parts: Mapping[str, PartConfig]
    cameras: tuple[CameraConfig, ...]
    limits: LimitArrays
    hardware_limits: LimitArrays
    policy: PolicyConfig
    control: ControlConfig
    qos: QosConfig
    home: FloatArray

    @property
    def first_action_tolerance(self) -> FloatArray:
        """The first-action tolerance in layout order, [dof]; inf where we never command."""
        control = self.control
        tolerance = np.where(
            self.layout.gripper,
            control.first_action_tolerance_gripper,
            control.first_action_tolerance_rad,
        )
        return np.where(self.layout.commanded, tolerance, np.inf)


def load_robot_config(path: Path | str) -> RobotConfig:
    """Reads and checks a robot file and every calibration file that it names.

    Args:
        path: The YAML file; paths inside it are relative to its folder.

    Raises:
        ConfigError: Anything missing, unknown, out of range or contradictory.
    """
    path = Path(path)
    file = load_yaml(path, _RobotFile)
    all_parts = _parts(path, file)
    layout = _layout(path, file)
    parts = {segment.part: all_parts[segment.part] for segment in layout.segments}
    limits = {
        name: combine_limits(
            path,
            name,
            sources=file.hardware.get(name, {}),
            operator=file.limits.parts.get(name),
            margin=0.0 if part.kind == "gripper" else file.limits.position_margin_rad,
            offsets=part.joint_offsets,
            commanded=part.command_topic is not None,
        )
        for name, part in parts.items()
    }
    _check_part_names(path, "hardware", file.hardware, all_parts)
    _check_part_names(path, "limits.parts", file.limits.parts, all_parts)
    config = RobotConfig(
        path=path,
        layout=layout,
        parts=parts,
        all_parts=all_parts,
        cameras=_cameras(path, file),
        limits=LimitArrays.concatenate([in_force for in_force, _ in limits.values()]),
        hardware_limits=LimitArrays.concatenate([hardware for _, hardware in limits.values()]),
        policy=file.policy,
        control=file.control,
        qos=file.qos,
        home=np.concatenate([part.home for part in parts.values()]),
    )
    _check_home(config)
    for camera in config.cameras:
        camera.load_calibration()
    return config


def _parts(path: Path, file: _RobotFile) -> dict[str, PartConfig]:
    offsets = {}
    if file.joint_offsets is not None:
        in_rad = {n: len(p.joint_names) for n, p in file.parts.items() if p.kind != "gripper"}
        offsets = load_joint_offsets(_beside(path, file.joint_offsets), in_rad)
    owners: dict[str, str] = {}
    parts = {}
    for name, part in file.parts.items():
        dof = len(part.joint_names)
        key = f"parts.{name}"
        for joint in part.joint_names:
            if joint in owners:
                found = f"{joint!r}, already a joint of {owners[joint]}"
                raise ConfigError(path, f"{key}.joint_names", found, "each joint once")
            owners[joint] = name
        if part.kind == "gripper" and dof != 1:
            raise ConfigError(path, f"{key}.joint_names", f"{dof} joints", "1 for a gripper")
        if len(part.home) != dof:
            found = f"{len(part.home)} values"
            raise ConfigError(path, f"{key}.home", found, f"{dof}, one per joint")
        parts[name] = PartConfig(
            part=name,
            kind=part.kind,
            joint_names=part.joint_names,
            state_topic=part.state_topic,
            command_topic=part.command_topic,
            home=np.array(part.home),
            joint_offsets=offsets.get(name, np.zeros(dof)),
        )
    _check_unique_topics(path, parts)
    return parts


def _layout(path: Path, file: _RobotFile) -> Layout:
    if file.layout not in file.layouts:
        expected = did_you_mean(file.layout, file.layouts)
        raise ConfigError(path, "layout", shown(file.layout), expected)
    for name, order in file.layouts.items():
        for part in order:
            if part not in file.parts:
                expected = did_you_mean(part, file.parts)
                raise ConfigError(path, f"layouts.{name}", shown(part), expected)
            if order.count(part) > 1:
                found = f"{part!r} {order.count(part)} times"
                raise ConfigError(path, f"layouts.{name}", found, "each part once")
    segments = tuple(
        Segment(
            part=name,
            joint_names=file.parts[name].joint_names,
            commanded=file.parts[name].command_topic is not None,
            gripper=file.parts[name].kind == "gripper",
        )
        for name in file.layouts[file.layout]
    )
    if not any(segment.commanded for segment in segments):
        found = "no part with a command_topic"
        raise ConfigError(path, f"layouts.{file.layout}", found, "at least one part to command")
    if file.policy.gripper_open == file.policy.gripper_closed:
        found = f"{file.policy.gripper_closed:g}, the same as gripper_open"
        raise ConfigError(path, "policy.gripper_closed", found, "another number")
    return Layout(file.layout, segments, file.policy)


def _cameras(path: Path, file: _RobotFile) -> tuple[CameraConfig, ...]:
    order = file.policy.camera_order
    for name in order:
        if name not in file.cameras:
            expected = did_you_mean(name, file.cameras)
            raise ConfigError(path, "policy.camera_order", shown(name), expected)
    if len(set(order)) != len(order) or len(order) != len(file.cameras):
        expected = f"each of {', '.join(file.cameras)} once"
        raise ConfigError(path, "policy.camera_order", ", ".join(order), expected)
    topics = [file.cameras[name].topic for name in order]
    for name, topic in zip(order, topics, strict=True):
        if topics.count(topic) > 1:
            raise ConfigError(path, f"cameras.{name}.topic", topic, "a topic of its own")
    return tuple(
        CameraConfig(
            name=name,
            topic=camera.topic,
            type=camera.type,
            width=camera.width,
            height=camera.height,
            calibration=_beside(path, camera.calibration) if camera.calibration else None,
        )
        for name, camera in ((name, file.cameras[name]) for name in order)
    )


def _beside(path: Path, relative: str) -> Path:
    """A path that the file names, without ``..`` but with symbolic links as they are."""
    return Path(os.path.normpath(path.parent / relative))


def _check_unique_topics(path: Path, parts: Mapping[str, PartConfig]) -> None:
    owners: dict[str, str] = {}
    for name, part in parts.items():
        for key, topic in (
            ("state_topic", part.state_topic),
            ("command_topic", part.command_topic),
        ):
            if topic is None:
                continue
            if topic in owners:
                found = f"{topic}, already the topic of {owners[topic]}"
                raise ConfigError(path, f"parts.{name}.{key}", found, "a topic of its own")
            owners[topic] = f"parts.{name}.{key}"


def _check_part_names(
    path: Path, key: str, given: Mapping[str, object], parts: Mapping[str, PartConfig]
) -> None:
    for name in given:
        if name not in parts:
            raise ConfigError(path, f"{key}.{name}", "an unknown part", did_you_mean(name, parts))


def _check_home(config: RobotConfig) -> None:
    for name, place in config.layout.slices.items():
        home = config.home[place]
        lower = config.limits.min_position[place]
        upper = config.limits.max_position[place]
        outside = np.flatnonzero((home < lower) | (home > upper))
        if outside.size:
            i = int(outside[0])
            raise ConfigError(
                config.path,
                f"parts.{name}.home[{i}]",
                f"{home[i]:g}",
                f"{lower[i]:g} to {upper[i]:g}, the limits with their margin",
            )
