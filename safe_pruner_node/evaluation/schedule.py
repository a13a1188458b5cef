"""Which episodes are run in which order, and how they are handed to the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.worker import Job, Refusal
from safe_pruner_node.pruning.settings import PrunerSettings
from safe_pruner_node.twin.tasks.seeds import Split

Submit = Callable[[Job], "Future[dict[str, Any] | Refusal]"]


@dataclass(frozen=True)
class Entrant:
    """A method that takes part.

    Attributes:
        method: Its name.
        rho: Rho under which it is filed.
        pruner: Its settings.
    """

    method: str
    rho: float
    pruner: PrunerSettings


def ordered_jobs(
    entrants: Sequence[Entrant], tasks: Sequence[str], split: Split, indices: Iterable[int]
) -> list[Job]:
    """Every episode, such that any beginning of the list is balanced over tasks and methods."""
    return [
        Job(entrant.method, entrant.rho, task, split, index, entrant.pruner)
        for index in indices
        for task in tasks
        for entrant in entrants
    ]


def run_jobs(
    jobs: Sequence[Job],
    submit: Submit,
    at_once: int,
    take: Callable[[dict[str, Any]], None],
    stop: Callable[[], bool],
) -> bool:
    """Keep the workers busy until the jobs are done or `stop` says so.

    Jobs that have begun are always finished and taken.

    Args:
        jobs: In order.
        submit: Hands a job to a worker.
        at_once: Jobs at the workers at the same time.
        take: Given every finished episode, in this thread.
        stop: True ends the handing out.

    Returns:
        True when every job was done.

    Raises:
        ConfigError: A worker refused a job.
    """
    waiting = list(reversed(jobs))
    running: set[Future[dict[str, Any] | Refusal]] = set()
    while True:
        while waiting and len(running) < at_once and not stop():
            running.add(submit(waiting.pop()))
        if not running:
            return not waiting
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            result = future.result()
            if isinstance(result, Refusal):
                raise RefusedError(result.line)
            take(result)


class RefusedError(ConfigError):
    """A worker's one line, handed on as it is."""

    def __init__(self, line: str) -> None:
        Exception.__init__(self, line)
