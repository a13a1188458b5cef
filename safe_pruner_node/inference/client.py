"""The control process's side of the worker: start it, feed it, watch it, start it again.

Nothing a worker does reaches the control loop: the caller's methods copy some bytes and return,
and one daemon thread of this module spawns, receives, keeps the deadlines and respawns. All
deadlines run on the steady clock. This module never imports torch.
"""

from __future__ import annotations

import enum
import importlib
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

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
from safe_pruner_node.inference.protocol import (
    HANG_SIGNAL,
    MESSAGE_BYTES_MAX,
    Dying,
    Failed,
    FrameSlot,
    FromWorker,
    Heartbeat,
    Progress,
    PromptReady,
    PrunerAnswer,
    Ready,
    Reset,
    SetPrompt,
    SetPruner,
    StepFailed,
    StepRequest,
    StepResult,
    Stop,
    ToWorker,
    WorkerSettings,
)
from safe_pruner_node.realtime import SERVICE_PRIORITY, request_realtime
from safe_pruner_node.types import CameraFrame, Observation

if TYPE_CHECKING:
    from safe_pruner_node.pruning.settings import PrunerSettings

_LOG = logging.getLogger(__name__)
_ENGINE_FAULTS_MAX = 3
_SPAWN = multiprocessing.get_context("spawn")


class WorkerState(enum.Enum):
    """Where the worker stands; see `WorkerClient`."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    LOST = "lost"
    FAILED = "failed"


@dataclass
class _Child:
    process: BaseProcess
    channel: socket.socket
    pid: int


@dataclass(frozen=True)
class _Loss:
    reason: str
    out_of_memory: bool = False
    hung: bool = False


class _ConfigurationRefused(Exception):  # noqa: N818 - an outcome, not an error
    """The worker said that its configuration is wrong."""


def _run_worker(*args: Any) -> None:  # noqa: ANN401 - handed through to worker_main
    # By name: the control process must not reach torch by importing the worker's module.
    importlib.import_module("safe_pruner_node.inference.worker").worker_main(*args)


class WorkerClient:
    """Runs one worker process and keeps it running.

    States: STOPPED -> STARTING -> READY <-> BUSY; a death or a hang leads to LOST and, after the
    backoff, to STARTING again; a wrong configuration, or more than ``max_respawns`` losses
    without a completed step between them, leads to FAILED, from where ``start`` may be called
    again. Every method returns at once except ``stop``.

    Args:
        settings: How to run the worker.
        on_event: Called with each `WorkerEvent` from the client's own thread; must be quick,
            may call ``submit``, ``reset_episode``, ``set_pruner`` and ``set_prompt``.
        engine_factory: Picklable callable ``EngineSettings -> Engine`` run in the worker; None
            is ``engine.build.build_engine``.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        on_event: Callable[[WorkerEvent], None],
        *,
        engine_factory: Callable[..., Any] | None = None,
    ) -> None:
        self._settings = settings
        self._on_event = on_event
        self._engine_factory = engine_factory
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None
        self._stop_by: float | None = None
        self._state = WorkerState.STOPPED
        self._child: _Child | None = None
        self._failure = ""
        self._deaths = 0
        self._seq = 0
        self._request: StepRequest | None = None
        self._deadline = 0.0
        self._submitted_s = 0.0
        self._pruner = settings.engine.pruner
        self._pruner_sent = self._pruner
        self._pruner_running = self._pruner
        self._pruner_pending = False
        self._prompt = settings.prompt
        self._prompt_pending = False
        self._reset_pending = False
        self._own_events: deque[WorkerEvent] = deque()
        self._losses_in_row = 0
        self._faults_in_row = 0

    def __del__(self) -> None:
        os.close(self._wake)

    @property
    def state(self) -> WorkerState:
        """Where the worker stands now."""
        return self._state

    @property
    def failure(self) -> str:
        """The one line of the last FAILED; empty otherwise."""
        return self._failure

    @property
    def deaths(self) -> int:
        """Workers lost since this client was made: died, hung, or given up on."""
        return self._deaths

    @property
    def pid(self) -> int | None:
        """Process id of the living worker; None when there is none."""
        child = self._child
        return child.pid if child is not None else None

    def start(self, settings: WorkerSettings | None = None) -> None:
        """Start the worker; READY is announced by an event.

        Args:
            settings: Replaces the settings of the last start.

        Raises:
            RuntimeError: The worker runs already.
        """
        if self._thread is not None and self._thread.is_alive():
            if self._state is not WorkerState.FAILED:
                raise RuntimeError(f"worker is {self._state.value}; stop it first")
            self._thread.join()
        if settings is not None:
            self._settings = settings
            self._pruner = settings.engine.pruner
            self._prompt = settings.prompt
        self._frames = _SPAWN.RawArray("B", self._settings.frame_bytes_max)
        self._frame_bytes = memoryview(self._frames).cast("B")
        self._failure = ""
        self._losses_in_row = 0
        self._stop_by = None
        self._state = WorkerState.STARTING
        self._thread = threading.Thread(target=self._supervise, name="worker-client", daemon=True)
        self._thread.start()

    def submit(self, observation: Observation, epoch: int, *, want_overlay: bool = False) -> bool:
        """Hand one observation to the worker, if it is idle.

        Copies the frames into shared memory and sends one small message; never waits.

        Args:
            observation: What the policy is to see.
            epoch: Buffer epoch that the chunk will carry.
            want_overlay: Also draw which patches were kept, as JPEG per camera.

        Returns:
            False when the worker is not READY, or when the frames do not fit into
            ``frame_bytes_max`` (then a `WorkerStepFailed` says so).
        """
        with self._lock:
            if self._state is not WorkerState.READY or self._child is None:
                return False
            self._seq += 1
            slots, used = _lay_out(observation)
            if used > self._settings.frame_bytes_max:
                return self._refuse(
                    f"frames of {used} bytes do not fit into "
                    f"frame_bytes_max = {self._settings.frame_bytes_max}"
                )
            request = StepRequest(
                seq=self._seq,
                epoch=epoch,
                prompt=observation.prompt,
                state=observation.state,
                frames=slots,
                time_s=observation.time_s,
                camera_stamp_ns=observation.camera_stamp_ns,
                want_overlay=want_overlay,
            )
            packet = pickle.dumps(request, pickle.HIGHEST_PROTOCOL)
            if len(packet) > MESSAGE_BYTES_MAX:
                return self._refuse(f"prompt of {len(observation.prompt)} characters is too long")
            for slot in slots:
                data = observation.frames[slot.camera].data
                self._frame_bytes[slot.offset : slot.offset + slot.length] = data
            self._submitted_s = time.monotonic()
            if not _send(self._child.channel, packet):
                return False
            self._request = request
            self._deadline = self._submitted_s + self._settings.hang_timeout_s
            self._state = WorkerState.BUSY
            return True

    def reset_episode(self) -> None:
        """Begin a new episode before the next step; a step in flight is not interrupted."""
        with self._lock:
            self._reset_pending = True
            self._flush()

    def set_pruner(self, pruner: PrunerSettings) -> None:
        """Change the pruning method before the next step, and for every respawn.

        Settings that do not fit the model are answered by `WorkerPrunerRefused`.
        """
        with self._lock:
            self._pruner = pruner
            self._pruner_pending = True
            self._flush()

    def set_prompt(self, prompt: str) -> None:
        """Make the worker ready for another prompt before the next step, and every respawn.

        A prompt of a length that was not captured yet takes seconds on an engine that captures;
        until then ``submit`` refuses.
        """
        with self._lock:
            self._prompt = prompt
            self._prompt_pending = True
            self._flush()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the worker surely: asked first, then SIGTERM, then SIGKILL. Idempotent.

        Args:
            timeout_s: Time for all three together.
        """
        thread = self._thread
        if thread is None:
            return
        if self._stop_by is None:
            self._stop_by = time.monotonic() + timeout_s
        os.eventfd_write(self._wake, 1)
        if thread is threading.current_thread():
            return
        thread.join(timeout_s + 1.0)
        if thread.is_alive():  # on_event blocks: the process ends all the same
            _LOG.error("the worker client's thread did not end: on_event is blocked")
            child = self._child
            if child is not None:
                os.kill(child.pid, signal.SIGKILL)
            return
        self._thread = None

    # --- caller's side, lock held -------------------------------------------------------------

    def _refuse(self, line: str) -> bool:
        self._own_events.append(WorkerStepFailed(self._seq, line))
        os.eventfd_write(self._wake, 1)
        return False

    def _flush(self) -> None:
        """Send what waits for an idle worker; an idle worker's socket always has room."""
        if self._state is not WorkerState.READY or self._child is None:
            return
        if self._reset_pending:
            self._reset_pending = False
            _send(self._child.channel, _pack(Reset()))
        if self._pruner_pending:
            self._pruner_pending = False
            self._pruner_sent = self._pruner
            self._ask(self._child, _pack(SetPruner(self._pruner)))
        elif self._prompt_pending:
            self._prompt_pending = False
            packet = _pack(SetPrompt(self._prompt))
            if len(packet) <= MESSAGE_BYTES_MAX:  # else `submit` says it
                self._ask(self._child, packet)

    def _ask(self, child: _Child, packet: bytes) -> None:
        """Send what takes as long as a part of the start, and is answered."""
        _send(child.channel, packet)
        self._deadline = time.monotonic() + self._settings.start_timeout_s
        self._state = WorkerState.BUSY

    # --- the client's thread ------------------------------------------------------------------

    def _supervise(self) -> None:
        # Inherited by the worker, also while it still imports: Ctrl-C is the parent's to handle.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        request_realtime(SERVICE_PRIORITY)
        try:
            self._keep_running()
        except Exception as error:  # noqa: BLE001 - a silent thread would look like a slow worker
            _LOG.exception("supervision of the worker broke")
            self._fail(f"cannot supervise the worker: {type(error).__name__}: {error}")

    def _keep_running(self) -> None:
        while not self._stopping:
            loss, exit_code = self._run_one()
            if loss is None:
                break
            self._deaths += 1
            self._losses_in_row += 1
            self._state = WorkerState.LOST
            self._emit(WorkerLost(loss.reason, exit_code, loss.out_of_memory))
            if self._losses_in_row > self._settings.max_respawns:
                self._fail(f"worker lost {self._losses_in_row} times in a row: {loss.reason}")
                return
            self._pause(self._settings.respawn_backoff_s * 2 ** (self._losses_in_row - 1))
        if self._state is not WorkerState.FAILED:
            self._state = WorkerState.STOPPED

    def _run_one(self) -> tuple[_Loss | None, int | None]:
        """One life of a worker; the loss is None when it was stopped or its settings are wrong."""
        try:
            child = self._spawn()
        except OSError as error:
            return _Loss(f"cannot start a process: {error}"), None
        loss: _Loss | None = None
        refusal = ""
        try:
            loss = self._watch(child)
        except _ConfigurationRefused as refused:
            refusal = str(refused)
        finally:
            with self._lock:
                self._child = None
                self._request = None
                if loss is not None:
                    self._state = WorkerState.LOST
            exit_code = self._end(child, loss)
        if refusal:
            self._fail(refusal)
        elif loss is not None and not loss.reason:
            loss = _Loss(_describe_exit(exit_code))
        return loss, exit_code

    def _spawn(self) -> _Child:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with self._lock:
            self._pruner_pending = False
            self._prompt_pending = False
            self._reset_pending = False
            self._pruner_running = self._pruner
            engine = replace(self._settings.engine, pruner=self._pruner)
            prompt = self._prompt
        process = _SPAWN.Process(
            target=_run_worker,
            args=(
                replace(self._settings, engine=engine, prompt=prompt),
                theirs,
                self._frames,
                self._engine_factory,
                os.getpid(),
            ),
            name="safe_pruner_worker",
            daemon=True,
        )
        try:
            # The worker asks the kernel to be killed when the thread that started it ends:
            # this thread, which outlives every worker.
            process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        child = _Child(process, ours, process.pid or 0)
        with self._lock:
            self._child = child
            self._faults_in_row = 0
            self._deadline = time.monotonic() + self._settings.start_timeout_s
            self._state = WorkerState.STARTING
        return child

    def _watch(self, child: _Child) -> _Loss | None:
        """Serve one worker until it is lost (a reason, or empty: ask the exit code) or stopped."""
        while not self._stopping:
            timeout_s = max(0.0, self._deadline - time.monotonic())
            wait([child.channel, child.process.sentinel, self._wake], timeout_s)
            self._drain_wake()
            dead = not child.process.is_alive()
            # What lies in the socket comes first: a last word, or signs of life that waited
            # there while this process itself was stopped.
            try:
                while (message := _receive(child.channel)) is not None:
                    loss = self._handle(child, message)
                    if loss is not None:
                        return loss
            except (EOFError, OSError, pickle.UnpicklingError):
                return _Loss("")
            if dead:
                return _Loss("")
            with self._lock:
                if time.monotonic() > self._deadline:
                    return _Loss(_describe_hang(self._state, self._settings), hung=True)
        return None

    def _handle(self, child: _Child, message: FromWorker) -> _Loss | None:
        if isinstance(message, StepResult):
            self._finish(message)
        elif isinstance(message, StepFailed):
            return self._step_failed(message)
        elif isinstance(message, Heartbeat):
            with self._lock:
                if self._state is WorkerState.READY:
                    self._deadline = time.monotonic() + self._settings.hang_timeout_s
        elif isinstance(message, Progress):
            self._emit(WorkerProgress(message.text, message.fraction))
        elif isinstance(message, Ready):
            self._become_idle()
            self._emit(
                WorkerReady(
                    description=message.description,
                    image_decoder=message.image_decoder,
                    checkpoint_id=message.checkpoint_id,
                    horizon=message.horizon,
                    action_dim=message.action_dim,
                    pid=child.pid,
                    deaths=self._deaths,
                )
            )
        elif isinstance(message, PrunerAnswer | PromptReady):
            self._answered(message)
        elif isinstance(message, Failed):
            raise _ConfigurationRefused(message.line)
        elif isinstance(message, Dying):
            return _Loss(message.line, message.out_of_memory)
        return None

    def _finish(self, message: StepResult) -> None:
        now_s = time.monotonic()
        with self._lock:  # the answer may be here before `submit` has noted its request
            request = self._request
        if request is None or request.seq != message.seq:
            return
        # Copied before the worker becomes idle: the next request overwrites this memory.
        overlays = {
            slot.camera: bytes(self._frame_bytes[slot.offset : slot.offset + slot.length])
            for slot in message.overlays
        }
        self._losses_in_row = 0
        self._faults_in_row = 0
        round_trip_ms = (now_s - self._submitted_s) * 1e3
        self._become_idle()
        self._emit(
            WorkerResult(
                seq=message.seq,
                chunk=message.chunk,
                report=message.report,
                overlays=overlays,
                camera_stamp_ns=request.camera_stamp_ns,
                worker_ms=message.worker_ms,
                round_trip_ms=round_trip_ms,
            )
        )

    def _step_failed(self, message: StepFailed) -> _Loss | None:
        self._faults_in_row = 0 if message.input_fault else self._faults_in_row + 1
        worn_out = self._faults_in_row >= _ENGINE_FAULTS_MAX
        if not worn_out:
            self._become_idle()
        self._emit(WorkerStepFailed(message.seq, message.line))
        if worn_out:
            return _Loss(f"{self._faults_in_row} steps in a row failed: {message.line}")
        return None

    def _answered(self, message: PrunerAnswer | PromptReady) -> None:
        refusal = None
        if isinstance(message, PrunerAnswer):
            refusal = message.refusal
            with self._lock:
                if refusal is None:
                    self._pruner_running = self._pruner_sent
                elif not self._pruner_pending:  # nor has another been asked for since
                    self._pruner = self._pruner_running
        self._become_idle()
        if refusal is not None:
            self._emit(WorkerPrunerRefused(refusal))

    def _become_idle(self) -> None:
        with self._lock:
            self._request = None
            self._deadline = time.monotonic() + self._settings.hang_timeout_s
            self._state = WorkerState.READY
            self._flush()

    def _end(self, child: _Child, loss: _Loss | None) -> int | None:
        """End one process for sure and free what it held; gently when it was not lost."""
        process = child.process
        if loss is None:
            now_s = time.monotonic()
            budget_s = max(0.0, (self._stop_by or now_s + 1.0) - now_s)
            if self._state is not WorkerState.STARTING:  # then it would not listen yet
                _send(child.channel, _pack(Stop()))
                process.join(budget_s * 0.6)
            if process.is_alive():
                process.terminate()
                process.join(budget_s * 0.2)
        elif process.exitcode is None:
            if loss.hung:
                os.kill(child.pid, HANG_SIGNAL)
            process.join(0.1)  # its own exit code says more than our SIGKILL
        if process.exitcode is None:
            process.kill()
        process.join(2.0)
        exit_code = process.exitcode
        child.channel.close()
        if exit_code is None:
            _LOG.error("worker %s does not end even by SIGKILL (stuck in a driver?)", child.pid)
        else:
            process.close()
        return exit_code

    def _fail(self, line: str) -> None:
        self._failure = line
        self._state = WorkerState.FAILED
        self._emit(WorkerFailed(line))

    def _emit(self, event: WorkerEvent) -> None:
        try:
            self._on_event(event)
        except Exception:  # noqa: BLE001 - supervision must survive its owner's mistake
            _LOG.exception("on_event failed for %s", type(event).__name__)

    @property
    def _stopping(self) -> bool:
        return self._stop_by is not None

    def _drain_wake(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return
        while self._own_events:
            self._emit(self._own_events.popleft())

    def _pause(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while not self._stopping and (left_s := until_s - time.monotonic()) > 0:
            wait([self._wake], left_s)
            self._drain_wake()


def _lay_out(observation: Observation) -> tuple[tuple[FrameSlot, ...], int]:
    """Place the frames one after another; returns the slots and the bytes they need."""
    slots: list[FrameSlot] = []
    offset = 0
    for camera, frame in observation.frames.items():
        slots.append(_slot(camera, frame, offset))
        offset += len(frame.data)
    return tuple(slots), offset


def _slot(camera: str, frame: CameraFrame, offset: int) -> FrameSlot:
    return FrameSlot(
        camera=camera,
        encoding=frame.encoding,
        height=frame.height,
        width=frame.width,
        row_bytes=frame.row_bytes,
        stamp_ns=frame.stamp_ns,
        received_ns=frame.received_ns,
        offset=offset,
        length=len(frame.data),
    )


def _pack(message: ToWorker) -> bytes:
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def _send(channel: socket.socket, packet: bytes) -> bool:
    """Send without waiting; False when the worker is gone or does not read."""
    try:
        channel.send(packet)
    except OSError:
        return False
    return True


def _receive(channel: socket.socket) -> FromWorker | None:
    """The next message; None when there is none now.

    Raises:
        EOFError: The worker's end is closed.
    """
    try:
        packet = channel.recv(MESSAGE_BYTES_MAX)
    except BlockingIOError:
        return None
    if not packet:
        raise EOFError
    message: FromWorker = pickle.loads(packet)  # noqa: S301 - written by our own child
    return message


def _describe_exit(exit_code: int | None) -> str:
    if exit_code is None:
        return "worker closed its channel"
    if exit_code < 0:
        return f"worker killed by {signal.Signals(-exit_code).name}"
    return f"worker exited with status {exit_code}"


def _describe_hang(state: WorkerState, settings: WorkerSettings) -> str:
    if state is WorkerState.STARTING:
        return f"worker not ready within start_timeout_s = {settings.start_timeout_s:g}"
    if state is WorkerState.BUSY:
        return f"step not finished within hang_timeout_s = {settings.hang_timeout_s:g}"
    return f"no sign of life within hang_timeout_s = {settings.hang_timeout_s:g}"
