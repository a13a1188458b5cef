"""Listens to a running policy node and keeps what the demo reports."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from safe_pruner_msgs.msg import ControlState, PolicyStep
from sensor_msgs.msg import CompressedImage

from safe_pruner_node.evaluation.run_record import ControlRecord, RunRecord, StepRecord


class RunRecorder(Node):
    """Collects ~/step, ~/control and the overlays of one policy node.

    Args:
        target: Name of the policy node.
        cameras: Cameras whose overlays to record.
    """

    def __init__(self, target: str, cameras: tuple[str, ...]) -> None:
        super().__init__("run_recorder")
        self.record = RunRecord(overlays={camera: [] for camera in cameras})
        self.control: ControlState | None = None
        self.first_step: PolicyStep | None = None
        self.last_step: PolicyStep | None = None
        self.recording = True
        self._periods_ms: list[float] = []
        self._start_s: float | None = None
        reliable = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
        self.create_subscription(PolicyStep, f"/{target}/step", self._on_step, reliable)
        self.create_subscription(ControlState, f"/{target}/control", self._on_control, reliable)
        for camera in cameras:
            self.create_subscription(
                CompressedImage,
                f"/{target}/saliency/{camera}/compressed",
                partial(self._on_overlay, camera),
                reliable,
            )

    def _elapsed_s(self) -> float:
        """Seconds since the policy took the arms, which is where the recording begins."""
        if self._start_s is None:
            self._start_s = time.monotonic()
        return time.monotonic() - self._start_s

    def _on_step(self, message: PolicyStep) -> None:
        if not self.recording:
            return
        self.first_step = self.first_step or message
        self.last_step = message
        self.record.checkpoint = message.checkpoint
        self.record.pruner = message.pruner
        self.record.steps.append(step_record(message, self._elapsed_s()))

    def _on_control(self, message: ControlState) -> None:
        self.control = message
        if message.mode == ControlState.POLICY:
            self._elapsed_s()
        self._periods_ms.extend(message.periods_ms)
        self.record.control = ControlRecord(
            rate_hz=message.rate_hz,
            ticks=message.ticks,
            ticks_expected=message.ticks_expected,
            starved_ticks=message.starved_ticks,
            clamped_ticks=message.clamped_ticks,
            holds=message.holds,
            worker_deaths=message.worker_deaths,
            max_step=tuple(message.max_step),
            mode_name=message.mode_name,
            periods_ms=tuple(self._periods_ms),
        )

    def _on_overlay(self, camera: str, message: Any) -> None:  # noqa: ANN401 - generated
        if self.recording and self._start_s is not None:
            self.record.overlays[camera].append((self._elapsed_s(), bytes(message.data)))


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
        cameras={c.name: (c.received, c.used, c.dropped) for c in message.cameras},
        flops=(message.flops_paper_padded, message.flops_paper_trimmed, message.flops_exact),
    )
