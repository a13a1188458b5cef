"""Everything that lives between configure and cleanup: inputs, worker, control, commands.

The control thread calls `RobotSession.tick` and nothing it calls waits: it takes the newest
measured joints, asks the supervisor for the next command and publishes it. The executor thread
takes images and hands observations to the worker; the worker client's thread hands chunks to
the supervisor.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from rclpy.lifecycle import LifecycleNode

from safe_pruner_node.control.supervisor import ControlOutput, Mode, Outcome
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.inference.client import WorkerClient, WorkerState
from safe_pruner_node.inference.events import (
    WorkerEvent,
    WorkerFailed,
    WorkerLost,
    WorkerProgress,
    WorkerPrunerRefused,
    WorkerReady,
    WorkerResult,
    WorkerStepFailed,
)
from safe_pruner_node.inference.protocol import WorkerSettings
from safe_pruner_node.nodes.commands import CommandPublishers
from safe_pruner_node.nodes.inputs import Inputs
from safe_pruner_node.nodes.observation_buffer import CameraSet, NoSet
from safe_pruner_node.nodes.reporting import FinishedStep
from safe_pruner_node.pruning.settings import PrunerSettings
from safe_pruner_node.robot.config import RobotConfig
from safe_pruner_node.robot_control import control_supervisor
from safe_pruner_node.types import Observation

_STEPS_KEPT = 64
"""Finished steps waiting to be published; far more than the executor ever leaves."""


@dataclass(frozen=True)
class SessionSettings:
    """What one configure fixes.

    Attributes:
        robot: The robot's description.
        worker: The policy worker.
        control_rate_hz: Rate of the joint commands.
        query_rate_hz: Policy queries per second at most.
        prompt: The task in words; changes with `RobotSession.set_prompt`.
        auto_start: Start the policy as soon as everything is ready.
        auto_resume: Return to POLICY by itself after a fault.
        dry_run: Publish no command.
    """

    robot: RobotConfig
    worker: WorkerSettings
    control_rate_hz: float
    query_rate_hz: float
    prompt: str
    auto_start: bool
    auto_resume: bool
    dry_run: bool


@dataclass(frozen=True)
class _Query:
    """What was known when the observation in flight was handed over."""

    cameras: CameraSet
    prompt: str
    time_s: float


class RobotSession:
    """One configured policy on one robot.

    Args:
        node: Clock, logger, subscriptions and publishers.
        settings: What to run.
        now_s: The control clock: steady time, or simulated time in lock-step.
    """

    def __init__(
        self,
        node: LifecycleNode,
        settings: SessionSettings,
        now_s: Callable[[], float],
    ) -> None:
        robot = settings.robot
        self.settings = settings
        self.prompt = settings.prompt
        self.checkpoint_id = ""
        self.engine = ""
        self.image_decoder = ""
        self.waiting_for = "the worker"
        self.output: ControlOutput | None = None
        self.finished: deque[FinishedStep] = deque(maxlen=_STEPS_KEPT)
        self.overlays: deque[dict[str, bytes]] = deque(maxlen=2)
        self.want_overlay = False
        self._node = node
        self._now_s = now_s
        self._ready = threading.Event()
        self._query: _Query | None = None
        self._accepted: deque[FinishedStep] = deque(maxlen=_STEPS_KEPT)
        self._next_query_s = -np.inf
        self._auto_start_pending = settings.auto_start
        self.supervisor = control_supervisor(
            robot, settings.control_rate_hz, auto_resume=settings.auto_resume
        )
        self.worker = WorkerClient(settings.worker, self._on_event)
        self.inputs = Inputs(node, robot, now_s, self._warn)
        self.commands = None if settings.dry_run else CommandPublishers(node, robot)

    # --- configure and cleanup ----------------------------------------------------------------

    def load(self, alive: Callable[[], bool]) -> None:
        """Start the worker and wait until it is loaded and warm.

        Args:
            alive: False ends the wait (the process is told to stop).

        Raises:
            ConfigError: The checkpoint, tokenizer or pruner is wrong; the worker's own line.
        """
        self.worker.start()
        while not self._ready.wait(0.05):
            if self.worker.state is WorkerState.FAILED:
                raise _WorkerRefusedError(self.worker.failure)
            if not alive():
                raise ConfigError("configure", "", "a request to stop", "to be left to finish")

    def begin(self) -> None:
        """Activation: only what is measured from now on counts."""
        self.inputs.begin()
        self.supervisor.reset()

    def close(self) -> None:
        """End the worker and everything that listens or speaks."""
        self.worker.stop()
        self.inputs.close()
        if self.commands is not None:
            self.commands.close()

    # --- control thread -----------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """One control period: measured joints in, one command out."""
        try:
            self.inputs.poll_joints()
            measured = self.inputs.joints.measured()
            if measured is not None:
                self.supervisor.on_state(*measured)
        except Exception as error:  # noqa: BLE001 - a bug in the input must not end the commands
            self.supervisor.emergency_stop(f"joint input failed: {type(error).__name__}: {error}")
        output = self.output = self.supervisor.tick(now_s)
        if output.position is not None and self.commands is not None:
            self.commands.publish(output.position)
        while self._accepted:
            step = self._accepted.popleft()
            age_ns = self._node.get_clock().now().nanoseconds - step.cameras.oldest_stamp_ns
            self.finished.append(replace(step, end_to_end_ms=age_ns * 1e-6))

    @property
    def at_rest(self) -> bool:
        """True when the command stream holds still, or has never begun."""
        output = self.output
        if output is None or output.velocity is None:
            return True
        return output.mode is not Mode.POLICY and not np.any(output.velocity)

    # --- executor thread ----------------------------------------------------------------------

    def query(self) -> None:
        """Hand the newest observation to the worker when it is idle and the policy wants one."""
        self.inputs.poll_cameras()
        now_s = self._now_s()
        if self._auto_start_pending:
            # Until the policy really drives: the first try may come before everything is there.
            self._auto_start_pending = self.supervisor.mode is Mode.HOLD
            self.supervisor.start(now_s)
        if not self.supervisor.wants_query(now_s) or now_s < self._next_query_s:
            return
        if self.worker.state is not WorkerState.READY:
            return
        cameras = self.inputs.cameras.newest_set(
            self._node.get_clock().now().nanoseconds, time.monotonic_ns()
        )
        measured = self.inputs.joints.measured()
        if isinstance(cameras, NoSet):
            self.waiting_for = cameras.reason
            return
        if measured is None:
            self.waiting_for = f"joint states of {', '.join(self.inputs.joints.missing())}"
            return
        self.waiting_for = ""
        observation = Observation(
            frames=cameras.frames,
            state=measured[0],
            prompt=self.prompt,
            time_s=now_s - max(cameras.age_s.values()),
            camera_stamp_ns=cameras.oldest_stamp_ns,
        )
        self._query = _Query(cameras, self.prompt, observation.time_s)
        if self.worker.submit(observation, self.supervisor.epoch, want_overlay=self.want_overlay):
            self._next_query_s = now_s + 1.0 / self.settings.query_rate_hz

    def start(self) -> Outcome:
        """Hand the arms to the policy, when the supervisor allows it."""
        return self.supervisor.start(self._now_s())

    def stop(self, reason: str) -> None:
        """Brake to a hold; nothing starts again by itself."""
        self._auto_start_pending = False
        self.supervisor.stop(reason)

    def reset(self) -> None:
        """A new episode: hold, forget the keyframe and the query count."""
        self.stop("episode reset")
        self.worker.reset_episode()

    def set_prompt(self, prompt: str) -> None:
        """Change the task from the next query on, which waits until the worker is ready for it.

        Raises:
            ConfigError: An empty prompt.
        """
        if not prompt.strip():
            raise ConfigError("~/set_prompt", "prompt", repr(prompt), "the task in words")
        self.worker.set_prompt(prompt)  # first: no query may bring it before
        self.prompt = prompt

    def set_pruner(self, pruner: PrunerSettings) -> None:
        """Change the pruning method between episodes.

        Raises:
            ConfigError: The policy is running.
        """
        if self.supervisor.mode is Mode.POLICY:
            raise ConfigError(
                "parameter", "pruner", "a change during an episode", "~/stop or ~/reset first"
            )
        self.worker.set_pruner(pruner)

    # --- worker client's thread ---------------------------------------------------------------

    def _on_event(self, event: WorkerEvent) -> None:
        now_s = self._now_s()
        logger = self._node.get_logger()
        if isinstance(event, WorkerResult):
            self._on_result(event, now_s)
        elif isinstance(event, WorkerProgress):
            logger.info(f"worker: {event.text} ({event.fraction:.0%})")
        elif isinstance(event, WorkerReady):
            self.checkpoint_id, self.engine = event.checkpoint_id, event.description
            self.image_decoder = event.image_decoder
            self.supervisor.on_worker_ready(now_s)
            self._ready.set()
            logger.info(
                f"worker ready: {event.description}, JPEG decoded by {event.image_decoder}, "
                f"checkpoint {event.checkpoint_id}"
            )
        elif isinstance(event, WorkerLost):
            self.supervisor.on_worker_lost(now_s)
            logger.error(f"worker lost: {event.reason}; holding, starting a new one")
        elif isinstance(event, WorkerFailed):
            self.supervisor.on_worker_lost(now_s)
            if self._ready.is_set():  # else `load` says it, as the reason of a failed configure
                logger.error(f"worker failed: {event.line}")
        elif isinstance(event, WorkerStepFailed):
            logger.warning(f"policy step failed: {event.line}", throttle_duration_sec=1.0)
        elif isinstance(event, WorkerPrunerRefused):
            logger.error(f"pruner refused, the old one stays: {event.line}")

    def _on_result(self, event: WorkerResult, now_s: float) -> None:
        query = self._query
        if event.overlays:
            self.overlays.append(dict(event.overlays))
        queue_actions = self.supervisor.remaining_actions
        outcome = self.supervisor.on_chunk(event.chunk, now_s)
        if not outcome.ok:
            self._warn(f"chunk dropped: {outcome.message}")
        if query is None:
            return
        step = FinishedStep(
            report=event.report,
            cameras=query.cameras,
            checkpoint=self.checkpoint_id,
            prompt=query.prompt,
            worker_ms=event.worker_ms,
            end_to_end_ms=float("nan"),
            dropped="" if outcome.ok else outcome.message,
            delay_ms=(now_s - query.time_s) * 1e3,
            queue_actions=queue_actions,
            epoch=event.chunk.epoch,
            horizon=len(event.chunk.actions),
            action_dt_s=event.chunk.dt_s,
        )
        (self._accepted if outcome.ok else self.finished).append(step)

    def _warn(self, line: str) -> None:
        self._node.get_logger().warning(line, throttle_duration_sec=1.0)


class _WorkerRefusedError(ConfigError):
    """The worker's one line, handed on as it is."""

    def __init__(self, line: str) -> None:
        Exception.__init__(self, line)
