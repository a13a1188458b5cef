"""The worker as its owner sees it when nothing goes wrong."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time

import numpy as np
import pytest
import worker_fakes

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.inference import client
from safe_pruner_node.inference.client import WorkerState
from safe_pruner_node.inference.events import WorkerProgress, WorkerReady, WorkerResult
from safe_pruner_node.inference.protocol import WorkerSettings


@pytest.mark.parametrize("module", ["client", "protocol", "events"])
def test_control_process_never_imports_torch(module):
    script = (
        f"import sys, safe_pruner_node.inference.{module}; "
        "sys.exit(any(m.split('.')[0] == 'torch' for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_life_of_a_worker(launch, observe, robot):
    worker = launch(worker_fakes.good)
    ready = worker.wait_for(WorkerReady)
    assert (ready.description, ready.horizon, ready.action_dim) == ("fake", 50, robot.layout.dof)
    assert ready.deaths == 0
    fractions = [event.fraction for event in worker.events if isinstance(event, WorkerProgress)]
    assert fractions == sorted(fractions)
    assert 0.0 <= fractions[0] < fractions[-1] <= 1.0

    assert worker.submit(observe(), epoch=3)
    result = worker.wait_for(WorkerResult)
    assert worker.client.state is WorkerState.READY
    assert result.chunk.epoch == 3
    assert result.camera_stamp_ns == 777
    said = robot.layout.to_policy_state(robot.home)[None]  # the fake says what it saw
    meant = robot.layout.to_robot_actions(said, robot.home)[0]
    np.testing.assert_allclose(result.chunk.actions[0], meant, atol=1e-12)
    assert result.overlays == {}
    assert 0 < result.worker_ms < result.round_trip_ms


def test_the_engine_is_warmed_for_the_prompt_and_the_robots_cameras(launch, settings, robot):
    worker = launch(worker_fakes.good, dataclasses.replace(settings, prompt="stand still"))
    worker.wait_for(WorkerReady)
    texts = [event.text for event in worker.events if isinstance(event, WorkerProgress)]
    assert f"warming up: 'stand still', {len(robot.cameras)} cameras" in texts


def test_busy_worker_takes_no_second_request(launch, observe):
    worker = launch(worker_fakes.good)
    assert not worker.submit(observe())  # still starting
    worker.wait_for(WorkerReady)
    assert worker.submit(observe("sleep 0.3"))
    assert worker.client.state is WorkerState.BUSY
    assert not worker.submit(observe())
    worker.wait_for(WorkerResult)
    assert worker.submit(observe())
    assert worker.wait_for(WorkerResult, 2).seq == 2


def test_next_request_may_be_submitted_from_the_event(launch, observe):
    worker = launch(worker_fakes.good)
    worker.wait_for(WorkerReady)
    keep, accepted = worker.client._on_event, []

    def submit_again(event):
        keep(event)
        if isinstance(event, WorkerResult) and len(accepted) < 20:
            accepted.append(worker.client.submit(observe(), 0))

    worker.client._on_event = submit_again
    assert worker.submit(observe())
    assert worker.wait_for(WorkerResult, 21).report.query == 21
    assert all(accepted)


def test_reset_during_a_step_takes_effect_before_the_next(launch, observe):
    worker = launch(worker_fakes.good)
    worker.wait_for(WorkerReady)
    for query in (1, 2):
        assert worker.submit(observe("sleep 0.2"))
        if query == 2:
            worker.client.reset_episode()
        assert worker.wait_for(WorkerResult, query).report.query == query
    assert worker.submit(observe())
    assert worker.wait_for(WorkerResult, 3).report.query == 1


def test_pruner_chosen_during_a_step_runs_the_next(launch, observe, settings):
    worker = launch(worker_fakes.good)
    worker.wait_for(WorkerReady)
    assert worker.submit(observe("sleep 0.2"))
    worker.client.set_pruner(dataclasses.replace(settings.engine.pruner, rho=0.5))
    assert worker.wait_for(WorkerResult).report.rho == settings.engine.pruner.rho
    while not worker.submit(observe()):
        pass
    assert worker.wait_for(WorkerResult, 2).report.rho == 0.5


def test_the_worker_is_ready_for_a_prompt_before_a_step_brings_it(launch, observe):
    worker = launch(worker_fakes.good)
    worker.wait_for(WorkerReady)
    assert worker.submit(observe("sleep 0.2"))
    worker.client.set_prompt("slow 0.2")  # a step is under way
    assert worker.wait_for(WorkerResult).report.engine == "fake, ready for ''"
    while not worker.submit(observe("slow 0.2")):
        pass
    assert worker.wait_for(WorkerResult, 2).report.engine == "fake, ready for 'slow 0.2'"
    worker.client.set_prompt("slow 0.1")  # none is
    assert not worker.submit(observe("slow 0.1"))
    while not worker.submit(observe("slow 0.1")):
        pass
    assert worker.wait_for(WorkerResult, 3).report.engine == "fake, ready for 'slow 0.1'"
    told = [event.text for event in worker.events if isinstance(event, WorkerProgress)]
    assert told[-2:] == ["making ready for 'slow 0.2'", "making ready for 'slow 0.1'"]


def test_pruner_and_prompt_chosen_during_a_step_both_come_before_the_next(
    launch, observe, settings
):
    worker = launch(worker_fakes.good)
    worker.wait_for(WorkerReady)
    assert worker.submit(observe("sleep 0.2"))
    worker.client.set_prompt("slow 0.1")
    worker.client.set_pruner(dataclasses.replace(settings.engine.pruner, rho=0.5))
    worker.wait_for(WorkerResult)
    while not worker.submit(observe()):
        pass
    report = worker.wait_for(WorkerResult, 2).report
    assert (report.rho, report.engine) == (0.5, "fake, ready for 'slow 0.1'")


def test_overlays_come_through_shared_memory_whole(launch, observe, robot):
    worker = launch(worker_fakes.good)
    worker.wait_for(WorkerReady)
    assert worker.submit(observe(), want_overlay=True)
    overlays = worker.wait_for(WorkerResult).overlays
    assert set(overlays) == set(robot.policy.camera_order)
    for data in overlays.values():
        assert data.startswith(b"\xff\xd8")
        assert data.endswith(b"\xff\xd9")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threads", 0),
        ("niceness", 20),
        ("heartbeat_s", 0.0),
        ("hang_timeout_s", 0.5),
        ("start_timeout_s", -1.0),
        ("max_respawns", -1),
        ("respawn_backoff_s", -0.1),
        ("frame_bytes_max", 0),
    ],
)
def test_settings_out_of_range_are_one_line(settings, key, value):
    with pytest.raises(ConfigError, match=f"worker.{key}: found {value}"):
        WorkerSettings(settings.engine, settings.robot_config, **{key: value})


def test_an_answer_that_overtakes_the_note_of_its_request_arrives(launch, observe, monkeypatch):
    """The caller's thread may lose the processor as soon as it has sent."""
    watched = launch(worker_fakes.good)
    watched.wait_for(WorkerReady)
    send = client._send

    def send_and_be_suspended(channel, packet):
        sent = send(channel, packet)
        time.sleep(0.3)
        return sent

    monkeypatch.setattr(client, "_send", send_and_be_suspended)
    assert watched.submit(observe())
    assert watched.wait_for(WorkerResult).seq == 1
