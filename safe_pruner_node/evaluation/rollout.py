"""One episode of a policy in the twin, in lock-step: engine, control and twin as the node has them.

Time is simulated. A query takes images and joints at one instant; its chunk reaches the control
side `latency_s` later, whatever the machine needs to compute it. So a rollout is the same on any
machine, and the latency is an assumption that stands in every result.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import cv2
import numpy as np

from safe_pruner_node.control.supervisor import ControlOutput, ControlSupervisor, Mode
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.inference.policy_step import PolicyStep
from safe_pruner_node.pruning.settings import PrunerSettings
from safe_pruner_node.robot_control import control_supervisor
from safe_pruner_node.twin.cameras import CameraRig, drawn_resolutions
from safe_pruner_node.twin.tasks.base import Task
from safe_pruner_node.twin.tasks.episode import Episode
from safe_pruner_node.types import (
    ActionChunk,
    CameraFrame,
    FloatArray,
    Observation,
    RgbImage,
    StepReport,
)

_EPSILON_S = 1e-9


@dataclass(frozen=True)
class RolloutSettings:
    """How an episode is run; every construction validates.

    Attributes:
        control_rate_hz: Joint commands per second.
        query_period_s: Time between two policy queries at least; the control side makes a query
            wait until its images show the chunk before it.
        latency_s: Time from a query to its chunk in the control side.
        jpeg_quality: Quality of the images on the wire, 1..100; 0 hands over the pixels.
        noise_seed: Seed of the flow noise, the same for every method.
        time_limit_s: Ends an episode before the task's own limit; 0 keeps that.
    """

    control_rate_hz: float = 100.0
    query_period_s: float = 0.5
    latency_s: float = 0.1
    jpeg_quality: int = 90
    noise_seed: int = 0
    time_limit_s: float = 0.0

    def __post_init__(self) -> None:
        if not 10.0 <= self.control_rate_hz <= 1000.0:
            raise _wrong("control-rate-hz", self.control_rate_hz, "10 to 1000")
        if not 0.0 < self.query_period_s <= 60.0:
            raise _wrong("query-period-s", self.query_period_s, "more than 0, at most 60")
        if not 0.0 <= self.latency_s <= 10.0:
            raise _wrong("latency-s", self.latency_s, "0 to 10")
        if not 0 <= self.jpeg_quality <= 100:
            raise _wrong("jpeg-quality", self.jpeg_quality, "0 to 100")
        if self.noise_seed < 0:
            raise _wrong("noise-seed", self.noise_seed, "at least 0")
        if not self.time_limit_s >= 0.0:
            raise _wrong("time-limit-s", self.time_limit_s, "more than 0, or 0 for the task's own")


@dataclass(frozen=True)
class Query:
    """One policy step of an episode.

    Attributes:
        time_s: Simulated time of its images and joints.
        step_ms: Wall time from encoded images to the chunk, as the node's worker measures it.
        report: What the engine says.
        overlays: Camera to a JPEG of what was kept; empty unless somebody watches.
    """

    time_s: float
    step_ms: float
    report: StepReport
    overlays: Mapping[str, bytes]


@dataclass(frozen=True)
class ControlTotals:
    """What the control side counted over an episode; see `ControlCounters`."""

    starved_ticks: int
    clamped_ticks: int
    holds: int
    dropped_chunks: int
    refusal: str


@dataclass(frozen=True)
class Rollout:
    """What came of an episode.

    Attributes:
        success: The task's judge says so.
        progress: Furthest stage, 0 to 100.
        seconds: Simulated time at its end.
        queries: Policy steps in order.
        control: Totals of the control side.
        wall_s: Real time of its parts: ``build``, ``render``, ``policy``, ``control``,
            ``physics`` (with the judge), ``total``.
    """

    success: bool
    progress: float
    seconds: float
    queries: tuple[Query, ...]
    control: ControlTotals
    wall_s: dict[str, float]


@dataclass(frozen=True)
class Instant:
    """What somebody who watches is shown after every control period.

    Attributes:
        time_s: Simulated time.
        progress: So far, 0 to 100.
        output: What the control side did.
        draw: Camera to image of this instant; renders only when called.
        last: The newest policy step; None before the first.
    """

    time_s: float
    progress: float
    output: ControlOutput
    draw: Callable[[], dict[str, RgbImage]]
    last: Query | None


def flow_noise(
    noise_seed: int, task: str, index: int, query: int, shape: tuple[int, int]
) -> FloatArray:
    """Noise of one query: a function of these numbers alone, so that methods pair up.

    Args:
        noise_seed: Of the whole evaluation.
        task: Name of the task.
        index: Number of the episode within its split.
        query: Number of the query within the episode.
        shape: Horizon and action size of the model.
    """
    key = [noise_seed, zlib.crc32(task.encode()), index, query]
    return np.random.default_rng(key).standard_normal(shape)


def roll_out(
    policy: PolicyStep,
    pruner: PrunerSettings,
    task: Task,
    index: int,
    settings: RolloutSettings,
    *,
    noise_shape: tuple[int, int],
    watch: Callable[[Instant], None] | None = None,
) -> Rollout:
    """Run one episode to its success or its time limit.

    Args:
        policy: Engine and robot; its session begins anew.
        pruner: The method of this episode.
        task: The episode's task.
        index: Number of the episode within its split, for the noise.
        settings: Rates and times.
        noise_shape: Horizon and action size of the model.
        watch: Called after every control period.

    Raises:
        ConfigError: The pruner does not fit the model or the cameras.
        InputError: The engine refuses what the twin shows it.
    """
    watch_s = _Stopwatch()
    with watch_s.of("total"):
        with watch_s.of("build"):
            if pruner.method == "random":  # its draws belong to the episode, not to the worker
                key = [settings.noise_seed, pruner.seed, zlib.crc32(task.name.encode()), index]
                drawn = int(np.random.default_rng(key).integers(2**31))
                pruner = replace(pruner, seed=drawn)
            policy.engine.set_pruner(pruner)
            policy.engine.reset()
            episode = Episode(task, policy.robot)
            rig = CameraRig(episode.sim.model, drawn_resolutions(policy.robot))
        try:
            run = _Run(policy, episode, rig, index, settings, noise_shape, watch_s, watch)
            run.to_the_end()
        finally:
            rig.close()
    return Rollout(
        success=episode.success,
        progress=episode.progress,
        seconds=round(episode.time_s, 6),
        queries=tuple(run.queries),
        control=run.totals(),
        wall_s=watch_s.seconds,
    )


@dataclass
class _Run:
    """The loop of one episode and what it remembers."""

    policy: PolicyStep
    episode: Episode
    rig: CameraRig
    index: int
    settings: RolloutSettings
    noise_shape: tuple[int, int]
    stopwatch: _Stopwatch
    watch: Callable[[Instant], None] | None
    queries: list[Query] = field(default_factory=list)
    refusal: str = ""

    def __post_init__(self) -> None:
        rate_hz = self.settings.control_rate_hz
        self.supervisor: ControlSupervisor = control_supervisor(
            self.policy.robot, rate_hz, auto_resume=True
        )
        self._in_flight: tuple[float, ActionChunk] | None = None
        self._next_query_s = 0.0
        self._start_pending = True

    def to_the_end(self) -> None:
        """Control periods until the episode is over."""
        episode, settings = self.episode, self.settings
        limit_s = settings.time_limit_s or np.inf
        self.supervisor.on_worker_ready(0.0)
        tick = 0
        while not episode.over and episode.time_s < limit_s - _EPSILON_S:
            now_s = tick / settings.control_rate_hz
            with self.stopwatch.of("control"):
                self._deliver(now_s)
                self.supervisor.on_state(episode.state(), now_s)
                output = self.supervisor.tick(now_s)
            self._query(now_s)
            with self.stopwatch.of("physics"):
                command = episode.state() if output.position is None else output.position
                episode.advance(command, 1.0 / settings.control_rate_hz)
            if self.watch is not None:
                last = self.queries[-1] if self.queries else None
                self.watch(Instant(episode.time_s, episode.progress, output, self._draw, last))
            tick += 1

    def totals(self) -> ControlTotals:
        """What the control side counted."""
        counters = self.supervisor.counters
        return ControlTotals(
            starved_ticks=counters.starved_ticks,
            clamped_ticks=counters.clamped_ticks,
            holds=counters.holds,
            dropped_chunks=counters.dropped_chunks,
            refusal=self.refusal,
        )

    def _deliver(self, now_s: float) -> None:
        if self._in_flight is None or now_s + _EPSILON_S < self._in_flight[0]:
            return
        outcome = self.supervisor.on_chunk(self._in_flight[1], now_s)
        self._in_flight = None
        if not outcome.ok:
            self.refusal = outcome.message

    def _query(self, now_s: float) -> None:
        """As `RobotSession.query` does it, with the answer kept back for the latency."""
        supervisor = self.supervisor
        if self._start_pending:  # until the policy really drives, as with auto_start
            self._start_pending = supervisor.mode is Mode.HOLD
            supervisor.start(now_s)
        if not supervisor.wants_query(now_s) or self._in_flight is not None:
            return
        if now_s + _EPSILON_S < self._next_query_s:
            return
        observation = self._observe(now_s)
        noise = flow_noise(
            self.settings.noise_seed,
            self.episode.task.name,
            self.index,
            len(self.queries),
            self.noise_shape,
        )
        with self.stopwatch.of("policy"):
            begun_s = time.perf_counter()
            step = self.policy.run(
                observation, supervisor.epoch, want_overlay=self.watch is not None, noise=noise
            )
            step_ms = (time.perf_counter() - begun_s) * 1e3
        self.queries.append(Query(now_s, step_ms, step.report, step.overlays))
        self._in_flight = (now_s + self.settings.latency_s, step.chunk)
        self._next_query_s = now_s + self.settings.query_period_s

    def _observe(self, now_s: float) -> Observation:
        stamp_ns = round(now_s * 1e9)
        with self.stopwatch.of("render"):
            frames = {
                camera: _frame(image, self.settings.jpeg_quality, stamp_ns)
                for camera, image in self._draw().items()
            }
        return Observation(
            frames=frames,
            state=self.episode.state(),
            prompt=self.episode.task.prompt,
            time_s=now_s,
            camera_stamp_ns=stamp_ns,
        )

    def _draw(self) -> dict[str, RgbImage]:
        self.rig.show(self.episode.sim.snapshot())
        return {camera.name: self.rig.render(camera.name) for camera in self.policy.robot.cameras}


class _Stopwatch:
    """Real time by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        begun_s = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun_s


def _frame(image: RgbImage, jpeg_quality: int, stamp_ns: int) -> CameraFrame:
    """An image as the twin's topic carries it, or as raw pixels."""
    height, width = image.shape[:2]
    if not jpeg_quality:
        return CameraFrame(image.tobytes(), "rgb8", height, width, 3 * width, stamp_ns, stamp_ns)
    quality = (cv2.IMWRITE_JPEG_QUALITY, jpeg_quality)
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality)
    return CameraFrame(jpeg.tobytes(), "jpeg", 0, 0, 0, stamp_ns, stamp_ns)


def _wrong(key: str, found: object, expected: str) -> ConfigError:
    return ConfigError("parameter", f"--{key}", found, expected)
