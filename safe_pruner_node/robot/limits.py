"""Joint limits: what the hardware allows, what the operator allows, and what is in force."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.strict import STRICT
from safe_pruner_node.types import FloatArray

_OBSERVED_RATES = (10.0, 100.0, 1000.0)
"""Velocity, acceleration and jerk of joints that are only observed: finite, above any motion."""

PositiveList = tuple[Annotated[float, Field(gt=0)], ...]


@dataclass(frozen=True, config=STRICT)
class SourceLimits:
    """What one source says about a part's hardware: a URDF, the SDK."""

    min_position: tuple[float, ...]
    max_position: tuple[float, ...]
    max_velocity: PositiveList | None = None


@dataclass(frozen=True, config=STRICT)
class OperatorLimits:
    """What a person allows a part to do."""

    max_velocity: PositiveList
    max_acceleration: PositiveList
    max_jerk: PositiveList
    min_position: tuple[float, ...] | None = None
    max_position: tuple[float, ...] | None = None


@dataclass(frozen=True, config=STRICT)
class LimitsFile:
    """The ``limits`` key of the robot file."""

    position_margin_rad: Annotated[float, Field(ge=0, le=0.2)]
    parts: Mapping[str, OperatorLimits]


@dataclasses.dataclass(frozen=True)
class LimitArrays:
    """Limits per joint, rad or gripper units and their time derivatives, each [dof].

    A joint that is only observed has no position limits, and rates that nothing reaches: its
    target is always its measured angle, and nothing is sent.

    Attributes:
        min_position: Lower position.
        max_position: Upper position.
        max_velocity: Speed.
        max_acceleration: Acceleration.
        max_jerk: Jerk.
    """

    min_position: FloatArray
    max_position: FloatArray
    max_velocity: FloatArray
    max_acceleration: FloatArray
    max_jerk: FloatArray

    @classmethod
    def concatenate(cls, pieces: Sequence[LimitArrays]) -> LimitArrays:
        """Limits of several parts side by side."""
        columns = zip(*(_arrays(piece) for piece in pieces), strict=True)
        return cls(*(np.concatenate(column) for column in columns))


def _arrays(limits: LimitArrays) -> list[FloatArray]:
    return [getattr(limits, field.name) for field in dataclasses.fields(limits)]


def combine_limits(
    path: Path,
    part: str,
    *,
    sources: Mapping[str, SourceLimits],
    operator: OperatorLimits | None,
    margin: float,
    offsets: FloatArray,
    commanded: bool,
) -> tuple[LimitArrays, LimitArrays]:
    """The limits in force for a part, and those of its hardware.

    Positions: the intersection of every hardware source, taken both for the calibrated and for
    the raw joint (calibrated = raw + offset), less the margin, and the operator's where given.

    Args:
        path: The robot file, for errors.
        part: Part name.
        sources: Source name to hardware limits.
        operator: The operator's limits.
        margin: Distance kept from the hardware's position limits, rad.
        offsets: Joint offsets, rad, [dof].
        commanded: True where limits are required and applied.

    Returns:
        Limits in force, hardware limits.

    Raises:
        ConfigError: Limits missing, of another length, swapped, or wider than the hardware's.
    """
    dof = len(offsets)
    if commanded and not sources:
        raise ConfigError(path, f"hardware.{part}", "nothing", "limits of a commanded part")
    if commanded and operator is None:
        raise ConfigError(path, f"limits.parts.{part}", "nothing", "limits of a commanded part")
    for source, limits in sources.items():
        _check(path, f"hardware.{part}.{source}", limits, dof)
    hardware = _intersection(list(sources.values()), dof)
    lower = hardware.min_position + np.maximum(offsets, 0) + margin
    upper = hardware.max_position + np.minimum(offsets, 0) - margin
    empty = np.flatnonzero(lower >= upper)
    if empty.size:
        i = int(empty[0])
        found = f"{lower[i]:g} to {upper[i]:g} between all sources, less the margin"
        raise ConfigError(path, f"hardware.{part}[{i}]", found, "room to move")
    if operator is not None:
        key = f"limits.parts.{part}"
        _check(path, key, operator, dof)
        _check_within(path, key, operator, hardware)
    if operator is None or not commanded:
        unlimited = np.full(dof, np.inf)
        rates = (np.full(dof, rate) for rate in _OBSERVED_RATES)
        return LimitArrays(-unlimited, unlimited, *rates), hardware
    in_force = LimitArrays(
        min_position=np.maximum(
            lower, lower if operator.min_position is None else operator.min_position
        ),
        max_position=np.minimum(
            upper, upper if operator.max_position is None else operator.max_position
        ),
        max_velocity=np.array(operator.max_velocity),
        max_acceleration=np.array(operator.max_acceleration),
        max_jerk=np.array(operator.max_jerk),
    )
    return in_force, hardware


def _intersection(sources: Sequence[SourceLimits], dof: int) -> LimitArrays:
    unlimited = np.full(dof, np.inf)
    lowers = [np.asarray(source.min_position) for source in sources]
    uppers = [np.asarray(source.max_position) for source in sources]
    speeds = [np.asarray(source.max_velocity) for source in sources if source.max_velocity]
    return LimitArrays(
        min_position=np.max([-unlimited, *lowers], axis=0),
        max_position=np.min([unlimited, *uppers], axis=0),
        max_velocity=np.min([unlimited, *speeds], axis=0),
        max_acceleration=unlimited,
        max_jerk=unlimited,
    )


def _check(path: Path, key: str, limits: SourceLimits | OperatorLimits, dof: int) -> None:
    for field in dataclasses.fields(limits):
        values = getattr(limits, field.name)
        if values is not None and len(values) != dof:
            found = f"{len(values)} values"
            raise ConfigError(path, f"{key}.{field.name}", found, f"{dof}, one per joint")
    if limits.min_position is None or limits.max_position is None:
        return
    for i, (low, high) in enumerate(zip(limits.min_position, limits.max_position, strict=True)):
        if low >= high:
            expected = f"below max_position[{i}] = {high:g}"
            raise ConfigError(path, f"{key}.min_position[{i}]", f"{low:g}", expected)


def _check_within(path: Path, key: str, operator: OperatorLimits, hardware: LimitArrays) -> None:
    """An operator's limit beyond the hardware's is a slip of the pen, not a wish."""
    for name, sign in (("min_position", -1), ("max_position", 1), ("max_velocity", 1)):
        values = getattr(operator, name)
        if values is None:
            continue
        bound = getattr(hardware, name)
        wider = np.flatnonzero(sign * np.asarray(values) > sign * bound)
        if wider.size:
            i = int(wider[0])
            side = "least" if sign < 0 else "most"
            expected = f"at {side} {bound[i]:g}, the hardware's"
            raise ConfigError(path, f"{key}.{name}[{i}]", f"{values[i]:g}", expected)
