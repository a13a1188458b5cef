"""What a ``WorkerClient`` tells its owner, from the client's own thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from safe_pruner_node.types import ActionChunk, StepReport


@dataclass(frozen=True)
class WorkerProgress:
    """The worker is starting; fraction 0..1."""

    text: str
    fraction: float


@dataclass(frozen=True)
class WorkerReady:
    """The worker takes requests.

    Attributes:
        description: Which engine path runs, in words.
        image_decoder: What decodes JPEG frames: ``cpu`` or ``nvjpeg``.
        checkpoint_id: Short hash of the checkpoint.
        horizon: Actions per chunk.
        action_dim: Size of one policy action.
        pid: Process id of the worker.
        deaths: Workers lost before this one; 0 at the first start.
    """

    description: str
    image_decoder: str
    checkpoint_id: str
    horizon: int
    action_dim: int
    pid: int
    deaths: int


@dataclass(frozen=True)
class WorkerResult:
    """One finished policy step.

    Attributes:
        seq: Number of the request, counted up by ``submit`` from 1.
        chunk: Absolute targets in robot units, of the epoch the request was made in.
        report: What happened inside the step; ``stage_ms`` includes the worker's own stages.
        overlays: Camera to JPEG bytes; empty unless an overlay was asked for.
        camera_stamp_ns: Header stamp of the oldest frame used, ROS time, nanoseconds.
        worker_ms: From the request's arrival in the worker to its answer.
        round_trip_ms: From ``submit`` to the arrival of the answer here.
    """

    seq: int
    chunk: ActionChunk
    report: StepReport
    overlays: Mapping[str, bytes]
    camera_stamp_ns: int
    worker_ms: float
    round_trip_ms: float


@dataclass(frozen=True)
class WorkerStepFailed:
    """One step gave no chunk; the worker lives. ``line`` is ``Type: message``."""

    seq: int
    line: str


@dataclass(frozen=True)
class WorkerPrunerRefused:
    """New pruner settings do not fit the model, said in one line; the previous ones stay."""

    line: str


@dataclass(frozen=True)
class WorkerLost:
    """The worker died or was killed as hung; a new one is started by itself.

    Attributes:
        reason: One line.
        exit_code: As in ``multiprocessing.Process.exitcode``: negative is the signal, also our
            own SIGKILL for one that hung or took too long to leave.
        out_of_memory: The worker said that it ran out of (host or GPU) memory.
    """

    reason: str
    exit_code: int | None
    out_of_memory: bool


@dataclass(frozen=True)
class WorkerFailed:
    """The worker will not be started again by itself: wrong configuration or too many deaths."""

    line: str


WorkerEvent = (
    WorkerProgress
    | WorkerReady
    | WorkerResult
    | WorkerStepFailed
    | WorkerPrunerRefused
    | WorkerLost
    | WorkerFailed
)
