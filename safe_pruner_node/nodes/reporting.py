"""What the node says about itself: ~/step, ~/control, /diagnostics and the overlays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from safe_pruner_msgs.msg import CameraStatus, ControlState, PolicyStep, StageTime

from safe_pruner_node.control.loop import LoopStatistics
from safe_pruner_node.control.supervisor import ControlOutput, Mode
from safe_pruner_node.nodes.observation_buffer import CameraSet
from safe_pruner_node.types import StepReport


@dataclass(frozen=True)
class FinishedStep:
    """One policy step from camera to first command, or to where its chunk was dropped.

    Attributes:
        report: The engine's report.
        cameras: The frames it saw.
        checkpoint: Checkpoint id.
        prompt: The task in words.
        worker_ms: The whole step in the worker.
        end_to_end_ms: Oldest camera stamp to the first command of its chunk; NaN until then.
        dropped: Why the chunk is not played; empty when it is.
        delay_ms: Observation time to chunk accepted, control clock.
        queue_actions: Actions left of the old chunk when this one came.
        epoch: Chunk epoch.
        horizon: Actions in the chunk.
        action_dt_s: Time between two actions, seconds.
    """

    report: StepReport
    cameras: CameraSet
    checkpoint: str
    prompt: str
    worker_ms: float
    end_to_end_ms: float
    dropped: str
    delay_ms: float
    queue_actions: int
    epoch: int
    horizon: int
    action_dt_s: float


def policy_step_message(step: FinishedStep) -> PolicyStep:
    """The ``~/step`` message of one finished step."""
    report = step.report
    message = PolicyStep()
    message.header.stamp = _time(step.cameras.oldest_stamp_ns)
    message.query = report.query
    message.pruner = report.pruner
    message.engine = report.engine
    message.checkpoint = step.checkpoint
    message.prompt = step.prompt
    message.keyframe = report.keyframe
    message.keyframe_reason = report.keyframe_reason
    message.kappa = float(report.kappa)
    message.gamma = float(report.gamma)
    message.rho = float(report.rho)
    message.stages = [StageTime(name=n, ms=float(ms)) for n, ms in report.stage_ms.items()]
    message.step_ms = float(step.worker_ms)
    message.end_to_end_ms = float(step.end_to_end_ms)
    message.dropped = step.dropped
    message.cameras = [
        CameraStatus(
            name=name,
            stamp=_time(step.cameras.frames[name].stamp_ns),
            age_ms=float(step.cameras.age_s[name] * 1e3),
            receive_age_ms=float(step.cameras.receive_age_s[name] * 1e3),
            received=count.received,
            used=count.used,
            dropped=count.dropped,
            visual_tokens=report.visual_tokens.get(name, 0),
            kept_tokens=report.kept_tokens.get(name, 0),
        )
        for name, count in step.cameras.counts.items()
    ]
    message.camera_skew_ms = float(step.cameras.skew_s * 1e3)
    message.text_tokens = report.text_tokens
    message.visual_tokens = sum(report.visual_tokens.values())
    message.kept_tokens = sum(report.kept_tokens.values())
    message.flops_paper_padded = float(report.flops.paper_padded)
    message.flops_paper_trimmed = float(report.flops.paper_trimmed)
    message.flops_exact = float(report.flops.exact)
    message.delay_ms = float(step.delay_ms)
    message.delay_actions = max(0, round(step.delay_ms * 1e-3 / step.action_dt_s))
    message.queue_actions = step.queue_actions
    message.epoch = step.epoch
    message.horizon = step.horizon
    message.action_dt_s = float(step.action_dt_s)
    return message


_MODE = {
    Mode.HOLD: ControlState.HOLD,
    Mode.POLICY: ControlState.POLICY,
    Mode.ESTOP: ControlState.ESTOP,
}


@dataclass(frozen=True)
class ControlSnapshot:
    """The control loop as of its last tick, and its totals.

    Attributes:
        output: What the supervisor said last.
        loop: Period statistics.
        periods_ms: Periods since the last snapshot.
        commanding: Commands go out.
        worker: Worker state in a word.
        rate_hz: Nominal rate.
        worker_deaths: Workers lost so far.
        joint_names: Names in layout order.
        grippers: Mask of gripper entries in layout order.
        waiting_for: What the policy's next query lacks; empty when nothing.
    """

    output: ControlOutput
    loop: LoopStatistics
    periods_ms: tuple[float, ...]
    commanding: bool
    worker: str
    rate_hz: float
    worker_deaths: int
    joint_names: tuple[str, ...]
    grippers: np.ndarray
    waiting_for: str


def control_state_message(snapshot: ControlSnapshot, stamp: Time) -> ControlState:
    """The ``~/control`` message."""
    output, loop, counters = snapshot.output, snapshot.loop, snapshot.output.counters
    message = ControlState()
    message.header.stamp = stamp
    message.mode = _MODE[output.mode]
    message.mode_name = output.mode.name
    reasons = [output.hold_reason]
    if output.armed or output.starved:
        reasons.append(snapshot.waiting_for)
    message.hold_reason = ": ".join(filter(None, reasons))
    message.commanding = snapshot.commanding
    message.worker = snapshot.worker
    message.rate_hz = float(snapshot.rate_hz)
    message.ticks = loop.ticks
    message.ticks_expected = loop.expected_ticks
    message.period_ms = float(loop.period_p50_ms)
    message.jitter_p99_ms = float(loop.jitter_p99_ms)
    message.period_max_ms = float(loop.period_max_ms)
    message.overruns = loop.overruns
    message.periods_ms = list(snapshot.periods_ms)
    message.remaining_actions = output.remaining_actions
    message.starved_ticks = counters.starved_ticks
    message.clamped_ticks = counters.clamped_ticks
    message.holds = counters.holds
    message.worker_deaths = snapshot.worker_deaths
    message.max_step = counters.max_joint_step.tolist()
    message.max_joint_step_rad = float(
        np.max(counters.max_joint_step[~snapshot.grippers], initial=0.0)
    )
    message.epoch = output.epoch
    message.joint_names = list(snapshot.joint_names)
    message.command = [] if output.position is None else output.position.tolist()
    return message


@dataclass(frozen=True)
class Health:
    """One line of ``/diagnostics``.

    Attributes:
        part: What it is about; becomes ``safe_pruner: <part>`` (REP-107).
        level: ``OK``, ``WARN``, ``ERROR`` or ``STALE`` of DiagnosticStatus.
        message: One line.
        values: Figures.
    """

    part: str
    level: bytes
    message: str
    values: Mapping[str, object]


def diagnostics_message(node_name: str, health: list[Health], stamp: Time) -> DiagnosticArray:
    """The ``/diagnostics`` message of all parts."""
    message = DiagnosticArray()
    message.header.stamp = stamp
    message.status = [
        DiagnosticStatus(
            level=item.level,
            name=f"{node_name}: {item.part}",
            message=item.message,
            hardware_id="astribot_s1",
            values=[KeyValue(key=key, value=str(value)) for key, value in item.values.items()],
        )
        for item in health
    ]
    return message


def _time(stamp_ns: int) -> Time:
    return Time(sec=stamp_ns // 1_000_000_000, nanosec=stamp_ns % 1_000_000_000)
