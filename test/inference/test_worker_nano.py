"""The worker around the real engine and a real (nano, random) checkpoint."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal

import numpy as np
import pytest
import torch

from safe_pruner_node.engine.build import build_engine
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.inference.client import WorkerState
from safe_pruner_node.inference.events import WorkerFailed, WorkerLost, WorkerReady, WorkerResult
from safe_pruner_node.inference.policy_step import PolicyStep
from safe_pruner_node.inference.worker import _is_out_of_memory
from safe_pruner_node.pi05.checkpoint import checkpoint_id
from safe_pruner_node.pi05.nano import build_nano


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return build_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture
def nano(settings, checkpoint, robot):
    engine = EngineSettings(
        checkpoint=checkpoint,
        device="cpu",
        threads=1,
        flow_steps=2,
        state_dim=robot.layout.dof,
        action_dim=robot.layout.dof,
    )
    return dataclasses.replace(settings, engine=engine, hang_timeout_s=60.0)


def first_chunk_in_process(nano, robot, observation):
    threads = torch.get_num_threads()
    try:
        step = PolicyStep(build_engine(nano.engine), robot)
        step.rehearse()
        return step.run(observation, 0, want_overlay=False).chunk.actions
    finally:
        torch.set_num_threads(threads)


def test_steps_prunes_resets_and_survives_a_kill(launch, nano, observe, robot):
    worker = launch(None, nano)
    first = worker.wait_for(WorkerReady)
    assert first.image_decoder == "cpu"
    assert first.checkpoint_id == checkpoint_id(nano.engine.checkpoint)
    assert (first.horizon, first.action_dim) == (30, robot.layout.dof)

    def step(number, **kwargs):
        assert worker.submit(observe(), **kwargs)
        return worker.wait_for(WorkerResult, number)

    keyframe = step(1)
    assert keyframe.report.keyframe
    assert sum(keyframe.report.kept_tokens.values()) == 3 * 256
    np.testing.assert_allclose(
        keyframe.chunk.actions, first_chunk_in_process(nano, robot, observe()), atol=1e-6
    )
    stages = list(keyframe.report.stage_ms)
    assert stages[:3] == ["decode", "resize", "vision"]
    assert stages[-1] == "to_robot"
    assert sum(keyframe.report.stage_ms.values()) <= keyframe.worker_ms

    pruned = step(2, want_overlay=True)
    assert not pruned.report.keyframe
    assert sum(pruned.report.kept_tokens.values()) == 192
    assert set(pruned.overlays) == set(robot.policy.camera_order)

    worker.client.reset_episode()
    assert step(3).report.keyframe

    os.kill(first.pid, signal.SIGKILL)
    worker.wait_for(WorkerReady, 2)
    assert step(4).report.keyframe
    assert worker.client.deaths == 1


def test_truncated_checkpoint_fails_in_one_line_and_a_good_one_starts(launch, nano, tmp_path):
    broken = shutil.copytree(nano.engine.checkpoint, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    engine = dataclasses.replace(nano.engine, checkpoint=broken)
    worker = launch(None, dataclasses.replace(nano, engine=engine))
    line = worker.wait_for(WorkerFailed).line
    assert line.startswith(str(weights))
    assert "\n" not in line
    assert worker.client.state is WorkerState.FAILED
    assert not any(isinstance(event, WorkerLost) for event in worker.events)
    worker.client.start(nano)
    worker.wait_for(WorkerReady)


def test_missing_checkpoint_is_one_line(launch, nano, tmp_path):
    engine = dataclasses.replace(nano.engine, checkpoint=tmp_path / "nowhere")
    worker = launch(None, dataclasses.replace(nano, engine=engine))
    line = worker.wait_for(WorkerFailed).line
    assert line == (
        f"parameter: checkpoint: found {tmp_path / 'nowhere'}, expected an existing directory"
    )
    assert worker.client.deaths == 0


def test_torch_running_out_of_host_memory_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert _is_out_of_memory(caught.value)
    assert _is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not _is_out_of_memory(RuntimeError("shape mismatch"))
