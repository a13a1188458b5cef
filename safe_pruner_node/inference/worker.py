"""The worker process: builds the engine, then answers one request at a time.

Only this process imports torch and touches CUDA. It may crash, hang or run out of memory; the
control process sees a closed socket or a missed deadline and starts another one.
"""

from __future__ import annotations

import faulthandler
import gc
import pickle
import select
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from ctypes import Array
from typing import TYPE_CHECKING

import cv2

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.inference.policy_step import InputError, PolicyStep
from safe_pruner_node.inference.process import (
    die_with_parent,
    keep_freed_memory,
    yield_to_control,
)
from safe_pruner_node.inference.protocol import (
    HANG_SIGNAL,
    MESSAGE_BYTES_MAX,
    Dying,
    Failed,
    FromWorker,
    Heartbeat,
    OverlaySlot,
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
from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.types import CameraFrame, Observation

if TYPE_CHECKING:
    from safe_pruner_node.engine.base import Engine
    from safe_pruner_node.engine.settings import EngineSettings

_LINE_MAX = 2000

EngineFactory = Callable[["EngineSettings"], "Engine"]


def worker_main(
    settings: WorkerSettings,
    channel: socket.socket,
    frames: Array,
    engine_factory: EngineFactory | None,
    parent_pid: int,
) -> None:
    """Entry point of the spawned process.

    Args:
        settings: How to run.
        channel: Packets to and from the control process.
        frames: Shared memory for the frames of a request and the overlays of its answer.
        engine_factory: Builds the engine; None is ``engine.build.build_engine``.
        parent_pid: The control process.
    """
    die_with_parent(parent_pid)
    yield_to_control(settings.niceness)
    keep_freed_memory()
    faulthandler.enable()
    faulthandler.register(HANG_SIGNAL)
    cv2.setNumThreads(settings.threads)
    try:
        worker = _Worker(settings, channel, memoryview(frames).cast("B"), engine_factory)
        worker.serve()
    except ConfigError as error:
        _send(channel, Failed(_cut(str(error))))
    except (BrokenPipeError, ConnectionResetError):
        pass  # the control process is gone, and with it the reason to live
    except Exception as error:  # noqa: BLE001 - a worker's last word, whatever it died of
        traceback.print_exc()
        _send(channel, Dying(_one_line(error), out_of_memory=_is_out_of_memory(error)))
        sys.exit(1)


class _Worker:
    """The engine and the loop around it."""

    def __init__(
        self,
        settings: WorkerSettings,
        channel: socket.socket,
        frames: memoryview,
        engine_factory: EngineFactory | None,
    ) -> None:
        self._settings = settings
        self._channel = channel
        self._frames = frames
        self._progress("reading the robot configuration", 0.0)
        robot = load_robot_config(settings.robot_config)
        self._progress(f"loading {settings.engine.checkpoint}", 0.05)
        engine, checkpoint_id = _build(settings.engine, engine_factory)
        engine.warm_up(
            lambda text, fraction: self._progress(text, 0.4 + 0.5 * fraction),
            prompt=settings.prompt,
            cameras=len(robot.cameras),
        )
        self._progress("rehearsing one step", 0.9)
        self._policy = PolicyStep(engine, robot, threads=settings.threads)
        horizon, action_dim = self._policy.rehearse(settings.prompt)
        # What is here stays: a collection that looks through all of torch costs a step or two.
        gc.collect()
        gc.freeze()
        decoder = "nvjpeg" if engine.decodes_jpeg else "cpu"
        _send(channel, Ready(engine.describe(), decoder, checkpoint_id, horizon, action_dim))

    def serve(self) -> None:
        """Answer messages until told to stop or until the control process is gone."""
        arrivals = select.poll()
        arrivals.register(self._channel, select.POLLIN)
        while True:
            if not arrivals.poll(self._settings.heartbeat_s * 1e3):
                _send(self._channel, Heartbeat())
                continue
            packet = self._channel.recv(MESSAGE_BYTES_MAX)
            if not packet:
                return
            message: ToWorker = pickle.loads(packet)  # noqa: S301 - written by our own parent
            if isinstance(message, StepRequest):
                self._step(message)
            elif isinstance(message, Reset):
                self._policy.engine.reset()
            elif isinstance(message, SetPruner):
                self._set_pruner(message)
            elif isinstance(message, SetPrompt):
                self._set_prompt(message)
            elif isinstance(message, Stop):
                return

    def _step(self, request: StepRequest) -> None:
        start_s = time.perf_counter()
        try:
            output = self._policy.run(
                self._observation(request), request.epoch, want_overlay=request.want_overlay
            )
        except InputError as error:
            _send(self._channel, StepFailed(request.seq, _cut(str(error)), input_fault=True))
            return
        except Exception as error:
            if _is_out_of_memory(error):
                raise
            traceback.print_exc()
            # A step that broke half-way may have left half a keyframe behind.
            self._policy.engine.reset()
            _send(self._channel, StepFailed(request.seq, _one_line(error), input_fault=False))
            return
        _send(
            self._channel,
            StepResult(
                seq=request.seq,
                chunk=output.chunk,
                report=output.report,
                overlays=self._store_overlays(output.overlays),
                worker_ms=(time.perf_counter() - start_s) * 1e3,
            ),
        )

    def _set_pruner(self, message: SetPruner) -> None:
        refusal = None
        try:
            self._policy.engine.set_pruner(message.pruner)
        except ConfigError as error:
            refusal = _cut(str(error))
        _send(self._channel, PrunerAnswer(refusal))

    def _set_prompt(self, message: SetPrompt) -> None:
        with suppress(ConfigError):  # the first step with it says so
            self._policy.engine.set_prompt(message.prompt, self._progress)
        _send(self._channel, PromptReady())

    def _observation(self, request: StepRequest) -> Observation:
        return Observation(
            frames={
                slot.camera: CameraFrame(
                    data=bytes(self._frames[slot.offset : slot.offset + slot.length]),
                    encoding=slot.encoding,
                    height=slot.height,
                    width=slot.width,
                    row_bytes=slot.row_bytes,
                    stamp_ns=slot.stamp_ns,
                    received_ns=slot.received_ns,
                )
                for slot in request.frames
            },
            state=request.state,
            prompt=request.prompt,
            time_s=request.time_s,
            camera_stamp_ns=request.camera_stamp_ns,
        )

    def _store_overlays(self, overlays: Mapping[str, bytes]) -> tuple[OverlaySlot, ...]:
        """Lay the overlays over the spent frames; one that does not fit is left out."""
        slots: list[OverlaySlot] = []
        offset = 0
        for camera, data in overlays.items():
            end = offset + len(data)
            if end > len(self._frames):
                break
            self._frames[offset:end] = data
            slots.append(OverlaySlot(camera, offset, len(data)))
            offset = end
        return tuple(slots)

    def _progress(self, text: str, fraction: float) -> None:
        _send(self._channel, Progress(text, fraction))


def _build(settings: EngineSettings, factory: EngineFactory | None) -> tuple[Engine, str]:
    """The engine and the checkpoint's short hash (empty for a factory's own engine)."""
    if factory is not None:
        return factory(settings), ""
    from safe_pruner_node.engine.build import build_engine  # noqa: PLC0415 - torch, worker only
    from safe_pruner_node.pi05.checkpoint import checkpoint_id  # noqa: PLC0415

    return build_engine(settings), checkpoint_id(settings.checkpoint)


def _send(channel: socket.socket, message: FromWorker) -> None:
    channel.send(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def _one_line(error: BaseException) -> str:
    return _cut(" ".join(f"{type(error).__name__}: {error}".split()))


def _cut(line: str) -> str:
    """A line that surely fits into one message; torch can list thousands of keys."""
    return line if len(line) <= _LINE_MAX else line[:_LINE_MAX] + " ..."


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # The CPU allocator has no exception type of its own.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
