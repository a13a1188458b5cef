"""What the control process and the worker say to each other. No torch, nothing heavy.

Control messages are pickled dataclasses, one per packet of a ``SOCK_SEQPACKET`` socket: a packet
arrives whole or not at all, so a process killed in the middle of a write leaves nothing half-read.
Image bytes do not travel in messages. They lie in one anonymous shared mapping, and only one
request is in flight, so the mapping needs no lock: the control process writes it while the worker
is idle, the worker owns it from request to result.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.types import ActionChunk, FloatArray, StepReport

if TYPE_CHECKING:
    from safe_pruner_node.engine.settings import EngineSettings
    from safe_pruner_node.pruning.settings import PrunerSettings

MESSAGE_BYTES_MAX = 128 * 1024
"""Largest pickled message. Below the kernel's default socket buffer (208 KiB), so that a packet
to an idle peer is always accepted at once."""

HANG_SIGNAL = signal.SIGUSR1
"""Makes the worker print where it stands to its stderr; sent to a hung one before it is killed."""


@dataclass(frozen=True)
class WorkerSettings:
    """How to run one worker process.

    Attributes:
        engine: What the worker builds; picklable, torch-free.
        robot_config: Path of the robot configuration (layout, units, cameras, calibration).
        prompt: The task in words that steps will bring at first, to warm up for; empty: not known.
        threads: CPU threads of the image work outside the engine, whose own are in ``engine``.
        niceness: Added to the worker's nice value, 0..19, so that control wins the CPU.
        heartbeat_s: Period of the idle worker's sign of life.
        hang_timeout_s: Longest step, and longest silence of an idle worker, before it is killed.
        start_timeout_s: Longest time from spawn to ready (load and warm-up), and longest change
            of the pruner or the prompt.
        max_respawns: Respawns in a row, without one completed step between, before giving up.
        respawn_backoff_s: Pause before the first respawn; doubles with each one in a row.
        frame_bytes_max: Shared memory for the frames of one request, bytes.

    Raises:
        ConfigError: A value is outside its range.
    """

    engine: EngineSettings
    robot_config: Path
    prompt: str = ""
    threads: int = 1
    niceness: int = 5
    heartbeat_s: float = 0.5
    hang_timeout_s: float = 5.0
    start_timeout_s: float = 300.0
    max_respawns: int = 5
    respawn_backoff_s: float = 0.2
    frame_bytes_max: int = 16 * 1024 * 1024

    def __post_init__(self) -> None:
        _require("threads", self.threads, self.threads >= 1, "at least 1")
        _require("niceness", self.niceness, 0 <= self.niceness <= 19, "0..19")
        _require("heartbeat_s", self.heartbeat_s, self.heartbeat_s > 0, "above 0")
        _require(
            "hang_timeout_s",
            self.hang_timeout_s,
            self.hang_timeout_s >= 2 * self.heartbeat_s,
            f"at least twice heartbeat_s ({2 * self.heartbeat_s:g})",
        )
        _require("start_timeout_s", self.start_timeout_s, self.start_timeout_s > 0, "above 0")
        _require("max_respawns", self.max_respawns, self.max_respawns >= 0, "at least 0")
        _require(
            "respawn_backoff_s", self.respawn_backoff_s, self.respawn_backoff_s >= 0, "0 or more"
        )
        _require("frame_bytes_max", self.frame_bytes_max, self.frame_bytes_max >= 1, "at least 1")


def _require(key: str, found: float, valid: bool, expected: str) -> None:
    if not valid:
        raise ConfigError("parameter", f"worker.{key}", found, expected)


# --- control process -> worker ---------------------------------------------------------------


@dataclass(frozen=True)
class FrameSlot:
    """One camera frame inside the shared mapping; fields as in ``types.CameraFrame``."""

    camera: str
    encoding: str
    height: int
    width: int
    row_bytes: int
    stamp_ns: int
    received_ns: int
    offset: int
    length: int


@dataclass(frozen=True)
class StepRequest:
    """One policy query; see ``types.Observation`` for units."""

    seq: int
    epoch: int
    prompt: str
    state: FloatArray
    frames: tuple[FrameSlot, ...]
    time_s: float
    camera_stamp_ns: int
    want_overlay: bool


@dataclass(frozen=True)
class Reset:
    """A new episode begins: forget the keyframe and the query count."""


@dataclass(frozen=True)
class SetPruner:
    """Run another pruning method or ratio from the next step on; answered by `PrunerAnswer`."""

    pruner: PrunerSettings


@dataclass(frozen=True)
class SetPrompt:
    """Make ready for steps with another prompt; answered by `PromptReady`."""

    prompt: str


@dataclass(frozen=True)
class Stop:
    """Leave the loop and exit with status 0."""


# --- worker -> control process ---------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """What the starting worker is doing; fraction 0..1."""

    text: str
    fraction: float


@dataclass(frozen=True)
class Ready:
    """The engine is loaded and warm.

    Attributes:
        description: Which engine path runs, in words.
        image_decoder: What decodes JPEG frames: ``cpu`` or ``nvjpeg``.
        checkpoint_id: Short hash of the checkpoint.
        horizon: Actions per chunk.
        action_dim: Size of one policy action.
    """

    description: str
    image_decoder: str
    checkpoint_id: str
    horizon: int
    action_dim: int


@dataclass(frozen=True)
class OverlaySlot:
    """One overlay JPEG inside the shared mapping; the frames there are spent by then."""

    camera: str
    offset: int
    length: int


@dataclass(frozen=True)
class StepResult:
    """A finished step; ``worker_ms`` runs from the request's arrival to this message."""

    seq: int
    chunk: ActionChunk
    report: StepReport
    overlays: tuple[OverlaySlot, ...]
    worker_ms: float


@dataclass(frozen=True)
class StepFailed:
    """A step raised.

    Attributes:
        seq: The request's number.
        line: One line, ``Type: message``; the traceback is in the worker's stderr.
        input_fault: True when the observation was to blame (an undecodable frame), so that the
            worker itself is as good as before.
    """

    seq: int
    line: str
    input_fault: bool


@dataclass(frozen=True)
class PrunerAnswer:
    """The pruner was changed, or refused in one line and the previous one stays."""

    refusal: str | None


@dataclass(frozen=True)
class PromptReady:
    """Steps with the prompt may come; what is wrong with it, the first of them says."""


@dataclass(frozen=True)
class Failed:
    """A wrong configuration: starting again with the same settings would fail again."""

    line: str


@dataclass(frozen=True)
class Dying:
    """The worker cannot go on, and exits after this message."""

    line: str
    out_of_memory: bool


@dataclass(frozen=True)
class Heartbeat:
    """The idle worker's own loop is turning."""


ToWorker = StepRequest | Reset | SetPruner | SetPrompt | Stop
FromWorker = (
    Progress
    | Ready
    | StepResult
    | StepFailed
    | PrunerAnswer
    | PromptReady
    | Failed
    | Dying
    | Heartbeat
)
