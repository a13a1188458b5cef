"""Listens to a policy node and its twin, and keeps what the demo reports."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from rclpy.context import Context
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from safe_pruner_msgs.msg import ControlState, PolicyStep, TaskState
from sensor_msgs.msg import CompressedImage

from safe_pruner_node.evaluation.run_record import (
    CameraWindow,
    ControlRecord,
    EpisodeRecord,
    Pictures,
    StepRecord,
)

NS = 1_000_000_000


class RunRecorder(Node):
    """Collects ``~/step`` and ``~/control`` of a policy node, the twin's ``~/task``, and images.

    Call :meth:`begin` before the policy node is activated and :meth:`end` after it was
    deactivated; time zero of an episode is when the policy takes the arms.

    Args:
        policy: Name of the policy node.
        twin: Name of the twin.
        images: Camera to the topic of its compressed images; empty to record neither images nor
            overlays, which are then not drawn.
        context: ROS context; the default one where left out.

    Attributes:
        control: Newest control state of this activation.
        task: Newest state of the twin's episode.
        last_step: Newest policy step.
        keyframes: Keyframes of this episode.
    """

    def __init__(
        self, policy: str, twin: str, images: Mapping[str, str], context: Context | None = None
    ) -> None:
        super().__init__("run_recorder", context=context)
        self.control: ControlState | None = None
        self.task: TaskState | None = None
        self.last_step: PolicyStep | None = None
        self.keyframes = 0
        self._task_heard_s = 0.0
        self._cameras = tuple(images)
        self._epoch_before = -1
        self.begin()
        reliable = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        sensor = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
        self.create_subscription(PolicyStep, f"/{policy}/step", self._on_step, reliable)
        self.create_subscription(ControlState, f"/{policy}/control", self._on_control, reliable)
        self.create_subscription(TaskState, f"/{twin}/task", self._on_task, latched)
        for camera, topic in images.items():
            show = partial(self._on_picture, camera, kept=False)
            self.create_subscription(CompressedImage, topic, show, sensor)
            overlay = f"/{policy}/saliency/{camera}/compressed"
            keep = partial(self._on_picture, camera, kept=True)
            self.create_subscription(CompressedImage, overlay, keep, reliable)

    # --- an episode ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Forgets the episode before."""
        if self.control is not None:
            self._epoch_before = int(self.control.epoch)
        self.control = self.last_step = None
        self._first_step: PolicyStep | None = None
        self.keyframes = 0
        self._steps: list[StepRecord] = []
        self._periods_ms: list[float] = []
        self._stages: list[tuple[float, float]] = []
        self._images: Pictures = {camera: [] for camera in self._cameras}
        self._overlays: Pictures = {camera: [] for camera in self._cameras}
        self._start_s: float | None = None
        self._start_sim_s = 0.0
        self._stop_s: float | None = None

    @property
    def taken_over(self) -> bool:
        """Whether the policy has taken the arms."""
        return self._start_s is not None

    @property
    def simulated_s(self) -> float:
        """Simulated time since the policy took the arms, s; 0 before."""
        return 0.0 if self._start_s is None else self._sim_now_s() - self._start_sim_s

    @property
    def done_s(self) -> float | None:
        """Simulated time from when the policy took the arms to success, s; None before."""
        task = self.task
        if task is None or not task.success or self._start_s is None:
            return None
        return float(task.success_s) - self._start_sim_s

    def stop(self) -> None:
        """The recording ends here; the control totals go on until :meth:`end`."""
        self._stop_s, self._stop_sim_s = time.monotonic(), self.simulated_s

    def end(self, time_limit_s: float) -> EpisodeRecord:
        """What was recorded since :meth:`begin`.

        Args:
            time_limit_s: Simulated time that the policy had; a later success is none.

        Raises:
            ValueError: The policy made no step, or the twin or the control said nothing.
        """
        task, control, first, last = self.task, self.control, self._first_step, self.last_step
        if task is None or control is None or first is None or last is None:
            raise ValueError("the policy made no step")
        if self._start_s is None or self._stop_s is None:
            raise ValueError("the policy never took the arms")
        done_s = self.done_s
        in_time = done_s is not None and done_s <= time_limit_s
        return EpisodeRecord(
            task=task.task,
            prompt=last.prompt,
            seed=task.seed,
            time_limit_s=time_limit_s,
            success=in_time,
            progress=float(task.progress),
            seconds=done_s if done_s is not None and in_time else self._stop_sim_s,
            simulated_s=self._stop_sim_s,
            wall_s=self._stop_s - self._start_s,
            control=control_record(control, self._periods_ms),
            checkpoint=last.checkpoint,
            pruner=last.pruner,
            steps=self._steps,
            stages=self._stages,
            cameras=camera_windows(first, last),
            images=self._images,
            overlays=self._overlays,
        )

    # --- callbacks ----------------------------------------------------------------------------

    def _time_s(self) -> float:
        """Seconds since the policy took the arms; the first call is when it did."""
        now_s = time.monotonic()
        if self._start_s is None:
            self._start_s, self._start_sim_s = now_s, self._sim_now_s()
            self._note_stage()
        return now_s - self._start_s

    def _sim_now_s(self) -> float:
        """The episode's clock: what the twin said last, and what has passed since, s."""
        if self.task is None:
            return 0.0
        return float(self.task.elapsed_s) + time.monotonic() - self._task_heard_s

    def _note_stage(self) -> None:
        if self.task is None or self._start_s is None:
            return
        progress = float(self.task.progress)
        if not self._stages or self._stages[-1][1] != progress:
            self._stages.append((time.monotonic() - self._start_s, progress))

    def _on_task(self, message: TaskState) -> None:
        self.task, self._task_heard_s = message, time.monotonic()
        if self._stop_s is None:
            self._note_stage()

    def _on_step(self, message: PolicyStep) -> None:
        # A step that the node was at when the last episode ended is published in this one.
        if self._stop_s is not None or message.epoch <= self._epoch_before:
            return
        self._first_step = self._first_step or message
        self.last_step = message
        self.keyframes += message.keyframe
        too_late = bool(message.dropped) and not self.taken_over
        self._steps.append(step_record(message, 0.0 if too_late else self._time_s()))

    def _on_control(self, message: ControlState) -> None:
        self.control = message
        self._periods_ms.extend(message.periods_ms)
        if message.mode == ControlState.POLICY:
            self._time_s()

    def _on_picture(self, camera: str, message: Any, *, kept: bool) -> None:  # noqa: ANN401
        if self._start_s is not None and self._stop_s is None:
            pictures = self._overlays if kept else self._images
            pictures[camera].append((self._time_s(), bytes(message.data)))


def step_record(message: PolicyStep, time_s: float) -> StepRecord:
    """One ``~/step`` message as plain figures."""
    return StepRecord(
        time_s=time_s,
        query=message.query,
        keyframe=message.keyframe,
        kappa=message.kappa,
        gamma=message.gamma,
        stage_ms={stage.name: stage.ms for stage in message.stages},
        step_ms=message.step_ms,
        end_to_end_ms=message.end_to_end_ms,
        visual_tokens=message.visual_tokens,
        kept_tokens=message.kept_tokens,
        flops=(message.flops_paper_padded, message.flops_paper_trimmed, message.flops_exact),
    )


def control_record(message: ControlState, periods_ms: list[float]) -> ControlRecord:
    """The totals of a ``~/control`` message, with every period since the activation."""
    return ControlRecord(
        rate_hz=message.rate_hz,
        ticks=message.ticks,
        ticks_expected=message.ticks_expected,
        starved_ticks=message.starved_ticks,
        clamped_ticks=message.clamped_ticks,
        holds=message.holds,
        worker_deaths=message.worker_deaths,
        max_step=tuple(message.max_step),
        mode_name=message.mode_name,
        periods_ms=tuple(periods_ms),
    )


def camera_windows(first: PolicyStep, last: PolicyStep) -> dict[str, CameraWindow]:
    """What each camera brought between two steps."""
    before = {camera.name: camera for camera in first.cameras}
    return {
        camera.name: CameraWindow(
            first_stamp_ns=_stamp_ns(before[camera.name]),
            last_stamp_ns=_stamp_ns(camera),
            received=camera.received - before[camera.name].received,
            used=camera.used - before[camera.name].used,
        )
        for camera in last.cameras
    }


def _stamp_ns(camera: Any) -> int:  # noqa: ANN401 - a generated message
    """Stamp of the frame that a CameraStatus speaks of, nanoseconds."""
    return int(camera.stamp.sec) * NS + int(camera.stamp.nanosec)
