"""Processes that record demonstrations side by side, each with its own GL context."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safe_pruner_node.demonstrations.recording import Recorder, Recording
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.config import load_robot_config

_POLL_S = 0.2

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""The processes share the cores; the expert's small matrices gain nothing from threads."""


@dataclass(frozen=True)
class Job:
    """One episode to record.

    Attributes:
        task: Name of the task.
        seed: The episode's seed.
        folder: Where its part goes. Where the expert fails, ``<folder>.failed`` is written.
    """

    task: str
    seed: int
    folder: Path


@dataclass(frozen=True)
class _Failure:
    """The arguments of a ConfigError, which does not travel between processes."""

    source: str
    key: str
    found: str
    expected: str

    @staticmethod
    def of(error: Exception) -> _Failure:
        if isinstance(error, ConfigError):
            return _Failure(error.source, error.key, error.found, error.expected)
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        found = f"{type(error).__name__}: {error} ({place})"
        return _Failure("recording", "", found, "a demonstration")


def failure_file(folder: Path) -> Path:
    """What stands for a part whose expert failed."""
    return folder.with_name(f"{folder.name}.failed")


class WorkerPool:
    """Takes jobs one by one from a shared counter, in as many processes as asked for.

    Args:
        jobs: What to record, in this order.
        workers: How many processes.
        robot_config: The robot file.
        image_size: Longer side of the recorded images, pixels.
    """

    def __init__(
        self, jobs: Sequence[Job], workers: int, robot_config: Path, image_size: int
    ) -> None:
        for variable in _ONE_THREAD:
            os.environ[variable] = "1"  # the processes inherit it
        os.environ.setdefault("MUJOCO_GL", "egl")
        context = multiprocessing.get_context("spawn")  # GL does not survive a fork
        self._stop = context.Event()
        self._outcomes: Any = context.Queue()
        self._counter = context.Value("q", 0)  # kept: a semaphore goes with its last owner
        arguments = (
            list(jobs),
            self._counter,
            self._stop,
            self._outcomes,
            robot_config,
            image_size,
        )
        self._processes = [
            context.Process(target=_work, args=arguments, daemon=True, name=f"recorder {number}")
            for number in range(min(workers, len(jobs)))
        ]
        for process in self._processes:
            process.start()

    def stop(self) -> None:
        """Takes no new jobs; those begun are still recorded."""
        self._stop.set()

    def outcomes(self) -> Iterator[Recording | None]:
        """Recordings as they come, and None several times a second in between.

        Raises:
            ConfigError: A process has failed or died.
        """
        while True:
            running = any(process.is_alive() for process in self._processes)
            try:
                outcome = self._outcomes.get(timeout=_POLL_S if running else 0.0)
            except queue.Empty:
                self._check_alive()
                if not running:
                    return
                yield None
                continue
            if isinstance(outcome, _Failure):
                raise ConfigError(outcome.source, outcome.key, outcome.found, outcome.expected)
            yield outcome

    def close(self) -> None:
        """Ends the processes: in a moment when stopped, at once otherwise."""
        deadline_s = time.monotonic() + (60.0 if self._stop.is_set() else 0.0)
        for process in self._processes:
            process.join(max(0.0, deadline_s - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()

    def _check_alive(self) -> None:
        for process in self._processes:
            if process.exitcode not in {None, 0}:
                found = f"{process.name} ended with {process.exitcode}"
                raise ConfigError("recording", "", found, "a process that lives to the end")


def _work(
    jobs: Sequence[Job],
    counter: Any,  # noqa: ANN401 - multiprocessing's synchronised types have no public name
    stop: Any,  # noqa: ANN401
    outcomes: Any,  # noqa: ANN401
    robot_config: Path,
    image_size: int,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to decide about
    try:
        recorder = Recorder(load_robot_config(robot_config), image_size)
        parent = multiprocessing.parent_process()
        while not stop.is_set() and (parent is None or parent.is_alive()):
            with counter.get_lock():
                number = counter.value
                counter.value += 1
            if number >= len(jobs):
                break
            job = jobs[number]
            recording = recorder.record(job.task, job.seed, job.folder)
            if not recording.success:
                failure_file(job.folder).write_text(json.dumps(asdict(recording)))
            outcomes.put(recording)
        recorder.close()
    except Exception as error:  # noqa: BLE001 - reported by the parent in one line
        outcomes.put(_Failure.of(error))
