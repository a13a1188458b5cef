"""Section ``end_to_end``: what the node feels, from camera bytes to a chunk in its own process.

The random policy is written as a checkpoint, and the node's own client starts the node's own
worker on it: camera frames go through shared memory, JPEG is decoded, the engine steps, and the
chunk comes back. ROS alone is not there.
"""

from __future__ import annotations

import queue
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from safe_pruner_node.engine.nvjpeg import choose_decoder
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.evaluation import bench_report
from safe_pruner_node.evaluation.bench import MovingScene
from safe_pruner_node.evaluation.bench_gpu import methods
from safe_pruner_node.evaluation.bench_gpu.decoder_check import decoder_difference
from safe_pruner_node.evaluation.bench_gpu.gpu_timing import percentiles
from safe_pruner_node.evaluation.bench_gpu.queries import BASE
from safe_pruner_node.evaluation.bench_gpu.section import Bench
from safe_pruner_node.inference.client import WorkerClient
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
from safe_pruner_node.pi05.checkpoint import save_openpi
from safe_pruner_node.pi05.nano import ASSET_ID, s1_norm_stats, train_tokenizer
from safe_pruner_node.pi05.tokenizer import PromptTokenizer
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import RobotConfig, load_robot_config
from safe_pruner_node.types import CameraFrame, Observation

STEPS = 200
WARM_UP_STEPS = 10
RHO = 0.75
SCENES = 8
"""Sets of frames that take turns."""
THREADS = 3
"""Images decoded at the same time."""
JPEG_QUALITY = 90
MODEL_STAGES = ("vision", *bench_report.PREFILL, "denoise")
"""Stages of the step itself, as the section ``latency`` times it; the others are the way there."""
PATIENCE_S = 300.0
VOCABULARY = 1024
"""Of the tokenizer made for the random policy; every bin of the state is one piece of it."""


def end_to_end(bench: Bench) -> Iterator[dict[str, Any]]:
    """Start a worker and send it observations.

    Yields:
        How long the worker took to be ready, the cameras' mean bytes per frame, how far nvJPEG's
        pixels are from the CPU's where it runs (see `decoder_difference`), how much of the GPU's
        memory the worker has taken, its context included, and a row for each kind of step so far.

    Raises:
        RuntimeError: The worker failed, died, or refused a step.
    """
    config = bench.model.config
    robot_file = resource("config/astribot_s1.yaml")
    robot = load_robot_config(robot_file)
    kinds = {
        methods.pruned_name(RHO): methods.pruned(RHO, config, len(robot.cameras)),
        methods.FULL: methods.full(),
        methods.KEYFRAME: methods.keyframe(config, len(robot.cameras)),
    }
    with tempfile.TemporaryDirectory() as folder:
        bench.say("writing the policy as a checkpoint")
        prompt = _write_checkpoint(bench, Path(folder), robot)
        observations = _observations(robot, prompt)
        engine = EngineSettings(
            Path(folder),
            device=bench.model.device.type,
            dtype="bf16",
            path=bench.runner.path,
            pruner=kinds[methods.pruned_name(RHO)],
        )
        worker_settings = WorkerSettings(
            engine,
            robot_file,
            prompt=prompt,
            threads=THREADS,
            hang_timeout_s=PATIENCE_S,  # a first step may compile kernels
            start_timeout_s=PATIENCE_S,
        )
        difference = _decoder_difference(bench, engine.image_decoder, observations)
        worker = _Worker(worker_settings)
        free_bytes = _free_bytes(bench)
        try:
            data: dict[str, Any] = {
                "start": worker.start(),
                "frame_bytes": _frame_bytes(observations),
                "decoder_difference": difference,
                "rows": [],
                "device_bytes": 0,
            }
            bench.say(f"worker ready after {data['start']['ready_s']:.1f} s")
            yield data
            for mode, settings in kinds.items():
                worker.client.set_pruner(settings)
                results = _run(bench, worker, observations)
                data["device_bytes"] = max(data["device_bytes"], free_bytes - _free_bytes(bench))
                data["rows"].append(row := {"mode": mode, **_summary(results)})
                p50 = row["round_trip_ms"]["p50"]
                bench.say(f"{mode}, camera bytes to chunk: p50 {p50:.2f} ms")
                yield data
        finally:
            worker.client.stop()


def _frame_bytes(observations: list[Observation]) -> dict[str, int]:
    """Camera to bytes of a frame, mean: the work of decoding goes with them."""
    return {
        camera: round(np.mean([len(o.frames[camera].data) for o in observations]))
        for camera in observations[0].frames
    }


def _decoder_difference(
    bench: Bench, image_decoder: str, observations: list[Observation]
) -> dict[str, dict[str, float]] | None:
    """Of the decoder that the worker will have; None where that is the CPU."""
    decoder = choose_decoder(image_decoder, bench.model.device)
    if decoder is None:
        return None
    frames = [frame for o in observations for frame in o.frames.values()]
    difference = decoder_difference(decoder, frames, bench.model.config.vision.image)
    for what, levels in difference.items():
        mean, most = levels["mean"], levels["max"]
        bench.say(f"nvJPEG against libjpeg, {what}: {mean:.2f} grey levels in the mean, {most:.0f}")
    return difference


def _free_bytes(bench: Bench) -> int:
    """Bytes of the GPU that nobody has; 0 on a CPU."""
    device = bench.model.device
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


class _Worker:
    """A client whose events can be waited for."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._events: queue.Queue[WorkerEvent] = queue.Queue()
        self.client = WorkerClient(settings, self._events.put)

    def start(self) -> dict[str, Any]:
        """Seconds from the spawn to ready, and when the worker began which part of it."""
        started_s = time.monotonic()
        self.client.start()
        parts = []
        while not isinstance(event := self._next(), WorkerReady):
            if isinstance(event, WorkerProgress):
                parts.append({"after_s": time.monotonic() - started_s, "text": event.text})
        return {
            "ready_s": time.monotonic() - started_s,
            "parts": parts,
            "engine": event.description,
            "image_decoder": event.image_decoder,
        }

    def step(self, observation: Observation) -> WorkerResult:
        """One query and its answer."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not self.client.submit(observation, epoch=0):  # while the pruner is changed
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the worker takes no request: {self.client.state.value}")
            time.sleep(0.001)
        while not isinstance(event := self._next(), WorkerResult):
            pass
        return event

    def _next(self) -> WorkerEvent:
        event = self._events.get(timeout=PATIENCE_S)
        match event:
            case WorkerFailed(line) | WorkerStepFailed(line=line) | WorkerPrunerRefused(line):
                raise RuntimeError(line)
            case WorkerLost(reason):
                raise RuntimeError(f"worker lost: {reason}")
        return event


def _run(bench: Bench, worker: _Worker, observations: list[Observation]) -> list[WorkerResult]:
    results = []
    steps = bench.steps(STEPS)
    for i in range(WARM_UP_STEPS + steps):
        bench.check_time()
        result = worker.step(observations[i % len(observations)])
        if i >= WARM_UP_STEPS:
            results.append(result)
    return results


def _summary(results: list[WorkerResult]) -> dict[str, Any]:
    """Percentiles of the whole way and of every stage of it."""
    last = results[-1].report
    stage_ms = {
        name: np.array([r.report.stage_ms.get(name, 0.0) for r in results])
        for name in last.stage_ms
    }
    round_trip_ms = np.array([r.round_trip_ms for r in results])
    step_ms = np.sum([ms for name, ms in stage_ms.items() if name in MODEL_STAGES], axis=0)
    return {
        "steps": len(results),
        "keyframes": sum(r.report.keyframe for r in results),
        "text_tokens": last.text_tokens,
        "kept_tokens": sum(last.kept_tokens.values()),
        "round_trip_ms": percentiles(round_trip_ms),
        "worker_ms": percentiles(np.array([r.worker_ms for r in results])),
        "step_ms": percentiles(step_ms),
        "beside_step_ms": percentiles(round_trip_ms - step_ms),
        "stage_ms": {name: percentiles(ms) for name, ms in stage_ms.items()},
    }


def _write_checkpoint(bench: Bench, folder: Path, robot: RobotConfig) -> str:
    """Write weights, statistics and a tokenizer; give a prompt of as many tokens as `BASE` has."""
    tokenizer_file = folder / "tokenizer.model"
    tokenizer_file.write_bytes(train_tokenizer(VOCABULARY))
    stats = s1_norm_stats()
    save_openpi(folder, bench.model, stats, ASSET_ID, tokenizer_file)
    tokenizer = PromptTokenizer(tokenizer_file, bench.model.config.max_prompt_tokens)
    state = stats.normalize_state(robot.layout.to_policy_state(robot.home))
    prompt = "pick up the red cube"
    while len(tokenizer.encode(prompt, state)) < BASE.prompt:
        prompt += " and the"
    return prompt


def _observations(robot: RobotConfig, prompt: str) -> list[Observation]:
    """Frames of a moving scene at the cameras' own resolutions, joints that move a little."""
    scene = MovingScene(len(robot.cameras), seed=0)
    random = np.random.default_rng(0)
    observations = []
    for t in range(SCENES):
        views = zip(robot.cameras, scene.frames(10 * t).values(), strict=True)
        frames = {}
        for camera, view in views:
            image = cv2.resize(view, (camera.width, camera.height))
            _, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
            frames[camera.name] = CameraFrame(jpeg.tobytes(), "jpeg", 0, 0, 0, t, t)
        state = robot.home + random.normal(0.0, 0.01, len(robot.home))
        observations.append(Observation(frames, state, prompt, float(t), t))
    return observations
