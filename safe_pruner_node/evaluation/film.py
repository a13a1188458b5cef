"""Rollouts for people: what the cameras saw, what the policy kept of it, progress and kappa."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import cv2
from rich.console import Console

from safe_pruner_node.control.supervisor import Mode
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.rollout import Instant, Query, Rollout, roll_out
from safe_pruner_node.evaluation.run_record import ControlRecord, EpisodeRecord, StepRecord
from safe_pruner_node.evaluation.video import FPS, RolloutFilm
from safe_pruner_node.evaluation.worker import Bench, Job
from safe_pruner_node.inference.overlay import encode_jpeg
from safe_pruner_node.twin.tasks.registry import build_task
from safe_pruner_node.twin.tasks.seeds import episode_seed
from safe_pruner_node.types import RgbImage


def film_episodes(bench: Bench, jobs: list[Job], path: Path, console: Console) -> None:
    """Run episodes and append each to a film, in simulated time.

    Args:
        bench: The engine.
        jobs: What to film.
        path: MP4 to write.
        console: Told how each ended.

    Raises:
        ConfigError: The pruner does not fit, or there is no such folder.
    """
    cv2.setNumThreads(bench.plan.engine.threads)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        film = RolloutFilm(path)
    except OSError as error:
        raise ConfigError("parameter", "--video", f"{path}: {error.strerror}", "a file") from None
    with closing(film):
        for job in jobs:
            with console.status(f"{job.task}, {job.method}"):
                episode = record_episode(bench, job)
            film.add(episode)
            how = f"success after {episode.seconds:.1f} s" if episode.success else "not done"
            console.print(
                f"{job.task}, seed {episode.seed}, {job.method}: {how}, progress "
                f"{episode.progress:.0f}, {len(episode.steps)} policy steps"
            )
    console.print(f"wrote {path}")


def record_episode(bench: Bench, job: Job) -> EpisodeRecord:
    """Run one episode and keep what a film needs of it.

    Raises:
        ConfigError: The pruner does not fit the model or the cameras.
    """
    seed = episode_seed(job.split, job.index)
    task = build_task(job.task, seed)
    settings = bench.plan.rollout
    camera = _Camera([camera.name for camera in bench.policy.robot.cameras])
    rollout = roll_out(
        bench.policy,
        job.pruner,
        task,
        job.index,
        settings,
        noise_shape=bench.noise_shape,
        watch=camera.watch,
    )
    return EpisodeRecord(
        task=task.name,
        prompt=task.prompt,
        seed=seed,
        time_limit_s=settings.time_limit_s or task.time_limit_s,
        control=_control(rollout, settings.control_rate_hz),
        success=rollout.success,
        progress=rollout.progress,
        seconds=rollout.seconds,
        simulated_s=rollout.seconds,
        wall_s=rollout.seconds,  # the film runs in simulated time
        steps=[_step(query, settings.latency_s) for query in rollout.queries],
        stages=camera.stages,
        images=camera.images,
        overlays={
            name: [(q.time_s + settings.latency_s, q.overlays[name]) for q in rollout.queries]
            for name in camera.images
        },
    )


class _Camera:
    """Takes a picture of every camera now and then, and notes where progress changes."""

    def __init__(self, names: list[str]) -> None:
        self.images: dict[str, list[tuple[float, bytes]]] = {name: [] for name in names}
        self.stages: list[tuple[float, float]] = [(0.0, 0.0)]

    def watch(self, instant: Instant) -> None:
        if instant.progress != self.stages[-1][1]:
            self.stages.append((instant.time_s, instant.progress))
        taken = len(next(iter(self.images.values())))
        if instant.time_s * FPS >= taken:
            self._take(instant.time_s, instant.draw())

    def _take(self, time_s: float, images: Mapping[str, RgbImage]) -> None:
        for name, image in images.items():
            self.images[name].append((time_s, encode_jpeg(image)))


def _step(query: Query, latency_s: float) -> StepRecord:
    """A policy step when its chunk arrived."""
    report = query.report
    return StepRecord(
        time_s=query.time_s + latency_s,
        query=report.query,
        keyframe=report.keyframe,
        kappa=report.kappa,
        gamma=report.gamma,
        stage_ms=report.stage_ms,
        step_ms=query.step_ms,
        end_to_end_ms=latency_s * 1e3,
        visual_tokens=sum(report.visual_tokens.values()),
        kept_tokens=sum(report.kept_tokens.values()),
        flops=(report.flops.paper_padded, report.flops.paper_trimmed, report.flops.exact),
    )


def _control(rollout: Rollout, rate_hz: float) -> ControlRecord:
    """The control side's totals; simulated time has no jitter."""
    ticks = round(rollout.seconds * rate_hz)
    return ControlRecord(
        rate_hz=rate_hz,
        ticks=ticks,
        ticks_expected=ticks,
        starved_ticks=rollout.control.starved_ticks,
        clamped_ticks=rollout.control.clamped_ticks,
        holds=rollout.control.holds,
        worker_deaths=0,
        max_step=(),
        mode_name=Mode.POLICY.name,
        periods_ms=(),
    )
