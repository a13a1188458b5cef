"""Real worker processes that die, hang and run out of memory: the control process never waits."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import conftest
import pytest
import worker_fakes

from safe_pruner_node.inference.client import WorkerState
from safe_pruner_node.inference.events import (
    WorkerFailed,
    WorkerLost,
    WorkerProgress,
    WorkerPrunerRefused,
    WorkerReady,
    WorkerResult,
    WorkerStepFailed,
)


def is_running(pid):
    """True for a process that exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pid):
    until_s = time.monotonic() + conftest.PATIENCE_S
    while is_running(pid):
        assert time.monotonic() < until_s, f"process {pid} still runs"
        time.sleep(0.01)


def test_killed_in_a_step_comes_back_by_itself(launch, observe):
    worker = launch(worker_fakes.good)
    first = worker.wait_for(WorkerReady)
    assert worker.submit(observe("sleep 100"))
    os.kill(first.pid, signal.SIGKILL)
    while worker.client.state is not WorkerState.LOST:
        assert not worker.submit(observe())
    lost = worker.wait_for(WorkerLost)
    second = worker.wait_for(WorkerReady, 2)
    assert lost.exit_code == -signal.SIGKILL
    assert "SIGKILL" in lost.reason
    assert not lost.out_of_memory
    assert second.pid == worker.client.pid != first.pid
    assert worker.client.deaths == second.deaths == 1
    assert worker.submit(observe())
    assert worker.wait_for(WorkerResult).seq == worker.client._seq


def test_killed_while_idle_is_noticed_without_a_request(launch):
    worker = launch(worker_fakes.good)
    os.kill(worker.wait_for(WorkerReady).pid, signal.SIGKILL)
    worker.wait_for(WorkerLost)
    worker.wait_for(WorkerReady, 2)


def test_hung_step_is_killed_and_the_worker_respawned(launch, settings, observe, capfd):
    worker = launch(worker_fakes.good, dataclasses.replace(settings, hang_timeout_s=0.5))
    first = worker.wait_for(WorkerReady)
    assert worker.submit(observe("hang"))
    assert "hang_timeout_s" in worker.wait_for(WorkerLost).reason
    worker.wait_for(WorkerReady, 2)
    assert not is_running(first.pid)
    assert worker.client.deaths == 1
    assert "worker_fakes.py" in capfd.readouterr().err  # where it hung


def test_stopped_while_idle_misses_its_heartbeat(launch, settings):
    worker = launch(worker_fakes.good, dataclasses.replace(settings, hang_timeout_s=0.5))
    first = worker.wait_for(WorkerReady)
    os.kill(first.pid, signal.SIGSTOP)
    assert "no sign of life" in worker.wait_for(WorkerLost).reason
    worker.wait_for(WorkerReady, 2)
    assert not is_running(first.pid)


def test_idle_worker_outlives_its_hang_timeout(launch, settings, observe):
    worker = launch(worker_fakes.good, dataclasses.replace(settings, hang_timeout_s=0.5))
    worker.wait_for(WorkerReady)
    time.sleep(1.2)
    assert worker.client.deaths == 0
    assert worker.submit(observe())
    worker.wait_for(WorkerResult)


def test_hang_at_start_is_bounded(launch, settings):
    worker = launch(
        worker_fakes.hangs_at_start,
        dataclasses.replace(settings, start_timeout_s=0.5, max_respawns=1),
    )
    failed = worker.wait_for(WorkerFailed)
    assert "start_timeout_s" in failed.line
    assert worker.client.deaths == 2
    assert worker.client.pid is None


def test_death_at_start_is_survived(launch):
    worker = launch(worker_fakes.dies_once)
    worker.wait_for(WorkerReady)
    assert worker.client.deaths == 1


def test_wrong_configuration_is_one_line_and_not_retried(launch, settings, observe):
    worker = launch(worker_fakes.misconfigured)
    failed = worker.wait_for(WorkerFailed)
    assert failed.line == f"{settings.engine.checkpoint}: norm_stats: found 7 numbers, expected 16"
    assert worker.client.failure == failed.line
    assert worker.client.state is WorkerState.FAILED
    assert worker.client.deaths == 0
    assert not worker.submit(observe())


def test_start_again_after_a_failure(launch, settings, tmp_path):
    absent = dataclasses.replace(settings, robot_config=tmp_path / "absent.yaml")
    worker = launch(worker_fakes.good, absent)
    assert "absent.yaml" in worker.wait_for(WorkerFailed).line
    worker.client.start(settings)
    worker.wait_for(WorkerReady)
    assert worker.client.failure == ""


def test_unexpected_start_failure_gives_up_after_bounded_respawns(launch, settings):
    worker = launch(worker_fakes.broken, dataclasses.replace(settings, max_respawns=1))
    failed = worker.wait_for(WorkerFailed)
    assert failed.line == "worker lost 2 times in a row: OSError: no such device"
    assert worker.wait_for(WorkerLost).reason == "OSError: no such device"


def test_factory_that_cannot_be_sent_is_a_failure_and_not_silence(launch):
    worker = launch(lambda settings: settings)
    assert "pickle" in worker.wait_for(WorkerFailed).line
    assert worker.client.state is WorkerState.FAILED


def test_endless_error_is_cut_to_a_line_that_fits(launch):
    worker = launch(worker_fakes.wordy)
    line = worker.wait_for(WorkerFailed).line
    assert "key.0, key.1" in line
    assert len(line) < 3000


def test_out_of_memory_is_said_and_restarted(launch, observe):
    worker = launch(worker_fakes.good)
    worker.wait_for(WorkerReady)
    assert worker.submit(observe("memory"))
    lost = worker.wait_for(WorkerLost)
    assert lost.out_of_memory
    assert lost.reason == "MemoryError: no more"
    worker.wait_for(WorkerReady, 2)


def test_out_of_memory_every_time_gives_up(launch, observe):
    worker = launch(worker_fakes.good)
    for life in (1, 2, 3):
        worker.wait_for(WorkerReady, life)
        assert worker.submit(observe("memory"))
        worker.wait_for(WorkerLost, life)
    assert "MemoryError" in worker.wait_for(WorkerFailed).line


def test_third_failed_step_in_a_row_respawns(launch, observe):
    worker = launch(worker_fakes.good)
    first = worker.wait_for(WorkerReady)
    for attempt in (1, 2, 3):
        assert worker.submit(observe("raise"))
        failed = worker.wait_for(WorkerStepFailed, attempt)
        assert failed.line == "RuntimeError: the engine broke"
    assert worker.wait_for(WorkerLost).reason.startswith("3 steps in a row failed")
    assert worker.wait_for(WorkerReady, 2).pid != first.pid


@pytest.mark.parametrize("fault", ["jpeg", "missing camera", "refused by the engine"])
def test_bad_observation_fails_the_step_and_not_the_worker(launch, observe, fault):
    bad = observe("refuse" if fault == "refused by the engine" else "stand still")
    if fault == "jpeg":
        bad = observe(head=conftest.frame_of(b"\xff\xd8 no image"))
    elif fault == "missing camera":
        bad = dataclasses.replace(bad, frames={"head": bad.frames["head"]})
    expected = {
        "jpeg": "camera head: ",
        "missing camera": "camera left_wrist: no frame",
        "refused by the engine": "observation: prompt: ",
    }
    worker = launch(worker_fakes.good)
    worker.wait_for(WorkerReady)
    for attempt in range(1, 5):  # more than the engine's own faults would be allowed
        assert worker.submit(bad)
        line = worker.wait_for(WorkerStepFailed, attempt).line
        assert line.startswith(expected[fault])
        assert "\n" not in line
    assert worker.submit(observe())
    worker.wait_for(WorkerResult)
    assert worker.client.deaths == 0


def test_frames_that_do_not_fit_are_refused_in_one_line(launch, settings, observe):
    worker = launch(worker_fakes.good, dataclasses.replace(settings, frame_bytes_max=1000))
    worker.wait_for(WorkerReady)
    assert not worker.submit(observe())
    assert "frame_bytes_max = 1000" in worker.wait_for(WorkerStepFailed).line
    assert worker.client.state is WorkerState.READY


def test_endless_prompt_is_refused_in_one_line(launch, observe):
    worker = launch(worker_fakes.good)
    worker.wait_for(WorkerReady)
    assert not worker.submit(observe("x" * 1_000_000))
    assert "too long" in worker.wait_for(WorkerStepFailed).line


def test_pruner_that_does_not_fit_is_refused_and_the_old_one_survives_a_respawn(
    launch, settings, observe
):
    pruner = settings.engine.pruner
    worker = launch(worker_fakes.good)
    first = worker.wait_for(WorkerReady)
    worker.client.set_pruner(dataclasses.replace(pruner, layer=99))
    assert "layer" in worker.wait_for(WorkerPrunerRefused).line
    assert worker.client._pruner == pruner
    worker.client.set_pruner(dataclasses.replace(pruner, rho=0.5))
    worker.client.set_pruner(dataclasses.replace(pruner, layer=77))
    assert "77" in worker.wait_for(WorkerPrunerRefused, 2).line
    os.kill(first.pid, signal.SIGKILL)
    worker.wait_for(WorkerReady, 2)
    assert worker.submit(observe())
    assert worker.wait_for(WorkerResult).report.rho == 0.5


def test_a_prompt_may_take_as_long_as_a_part_of_the_start(launch, settings, observe):
    worker = launch(worker_fakes.good, dataclasses.replace(settings, hang_timeout_s=0.3))
    worker.wait_for(WorkerReady)
    worker.client.set_prompt("slow 1.0")
    while not worker.submit(observe()):
        time.sleep(0.01)
    assert worker.wait_for(WorkerResult).report.engine == "fake, ready for 'slow 1.0'"
    assert worker.client.deaths == 0


def test_a_prompt_that_is_refused_is_said_by_its_first_step(launch, observe):
    worker = launch(worker_fakes.good)
    worker.wait_for(WorkerReady)
    worker.client.set_prompt("refuse")
    while not worker.submit(observe("refuse")):
        pass
    assert "expected another prompt" in worker.wait_for(WorkerStepFailed).line
    assert worker.client.deaths == 0


def test_a_prompt_as_long_as_a_message_changes_nothing_until_a_step_brings_it(launch, observe):
    worker = launch(worker_fakes.good)
    worker.wait_for(WorkerReady)
    worker.client.set_prompt("x" * 1_000_000)
    assert worker.client.state is WorkerState.READY
    assert worker.submit(observe())
    assert worker.wait_for(WorkerResult).report.engine == "fake, ready for ''"


def test_a_respawned_worker_warms_up_for_the_prompt_of_now(launch, observe):
    worker = launch(worker_fakes.good)
    first = worker.wait_for(WorkerReady)
    worker.client.set_prompt("put it back")
    while not worker.submit(observe()):
        pass
    worker.wait_for(WorkerResult)
    os.kill(first.pid, signal.SIGKILL)
    worker.wait_for(WorkerReady, 2)
    told = [event.text for event in worker.events if isinstance(event, WorkerProgress)]
    assert "warming up: 'put it back', 3 cameras" in told


def test_stop_ends_even_a_hung_worker_and_leaves_nothing(launch, observe):
    threads = set(threading.enumerate())
    worker = launch(worker_fakes.good)
    pid = worker.wait_for(WorkerReady).pid
    assert worker.submit(observe("hang"))
    worker.client.stop(timeout_s=0.5)
    worker.client.stop()
    assert worker.client.state is WorkerState.STOPPED
    assert worker.client.pid is None
    assert not Path(f"/proc/{pid}").exists()  # reaped: not even a zombie
    assert set(threading.enumerate()) <= threads
    assert not worker.submit(observe())


def test_shared_memory_has_no_name_that_could_outlive_a_killed_process(launch):
    worker = launch(worker_fakes.good)
    maps = Path(f"/proc/{worker.wait_for(WorkerReady).pid}/maps").read_text()
    shared = [line for line in maps.splitlines() if " rw-s " in line]
    assert shared
    assert all(line.endswith("(deleted)") for line in shared)


def test_stop_during_start_and_start_again(launch):
    worker = launch(worker_fakes.hangs_at_start)
    worker.client.stop(timeout_s=0.2)
    assert worker.client.state is WorkerState.STOPPED
    assert worker.client.deaths == 0
    worker.client._engine_factory = worker_fakes.good
    worker.client.start()
    worker.wait_for(WorkerReady)
    with pytest.raises(RuntimeError, match="stop it first"):
        worker.client.start()


def test_an_owner_that_raises_does_not_end_supervision(launch, observe):
    worker = launch(worker_fakes.good)
    worker.wait_for(WorkerReady)
    keep = worker.client._on_event

    def raise_once(_event):
        worker.client._on_event = keep
        raise ValueError("owner's mistake")

    worker.client._on_event = raise_once
    assert worker.submit(observe())
    while worker.client.state is WorkerState.BUSY:
        time.sleep(0.01)
    assert worker.submit(observe())
    worker.wait_for(WorkerResult)


_PARENT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # of tests in the background it is ignored
sys.path.insert(0, {tests!r})
import worker_fakes
from conftest import observe
from pathlib import Path
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.inference.client import WorkerClient
from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.inference.events import WorkerReady
from safe_pruner_node.inference.protocol import WorkerSettings

def tell(event):
    if isinstance(event, WorkerReady):  # inside a step, so that a closed socket tells it nothing
        client.submit(observe(load_robot_config(settings.robot_config), "hang"), 0)
        print(event.pid, flush=True)
    else:
        print(event, file=sys.stderr, flush=True)

if __name__ == "__main__":
    settings = WorkerSettings(
        EngineSettings(Path({folder!r})), Path({robot!r}), hang_timeout_s=1000.0
    )
    client = WorkerClient(settings, tell, engine_factory=worker_fakes.good)
    client.start()
    time.sleep(1000)
"""


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_worker_dies_with_its_parent(tmp_path, signal_number):
    script = tmp_path / "parent.py"
    script.write_text(
        _PARENT.format(
            tests=str(Path(__file__).parent),
            folder=str(tmp_path),
            robot=str(conftest.ROBOT_CONFIG),
        )
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(conftest.ROBOT_CONFIG.parents[1])},
        stdout=subprocess.PIPE,
    ) as parent:
        try:
            pid = int(parent.stdout.readline())
            assert is_running(pid)
            parent.send_signal(signal_number)
            parent.wait(conftest.PATIENCE_S)
        finally:
            parent.kill()
    wait_until_gone(pid)


def test_ctrl_c_is_left_to_the_parent(launch, observe):
    worker = launch(worker_fakes.good)
    pid = worker.wait_for(WorkerReady).pid
    os.kill(pid, signal.SIGINT)
    assert worker.submit(observe())
    worker.wait_for(WorkerResult)
    assert worker.client.pid == pid
