"""What the recorder makes of messages: time zero, the policy's time, and what belongs where."""

from __future__ import annotations

import math

import pytest
import rclpy
from safe_pruner_msgs.msg import CameraStatus, ControlState, PolicyStep, TaskState

from safe_pruner_node.nodes.recorder import RunRecorder


@pytest.fixture
def recorder():
    context = rclpy.Context()
    context.init(domain_id=93)
    recorder = RunRecorder("policy", "twin", {}, context=context)
    yield recorder
    recorder.destroy_node()
    context.try_shutdown()


def task(elapsed_s, *, progress=0.0, success_s=math.nan):
    return TaskState(
        task="pack_doll",
        seed=3,
        prompt="do it",
        elapsed_s=elapsed_s,
        progress=progress,
        success=math.isfinite(success_s),
        success_s=success_s,
    )


def step(query, *, dropped="", received=0, epoch=5):
    camera = CameraStatus(name="head", received=received)
    camera.stamp.sec = received
    return PolicyStep(query=query, dropped=dropped, cameras=[camera], prompt="do it", epoch=epoch)


def control(mode=ControlState.POLICY, ticks=0, epoch=5):
    return ControlState(
        mode=mode, mode_name="HOLD", ticks=ticks, periods_ms=[10.0, 11.0], epoch=epoch
    )


def test_an_episode_begins_when_the_policy_takes_the_arms(recorder):
    recorder._on_control(control(ControlState.HOLD, epoch=3))
    recorder.begin()
    recorder._on_task(task(5.0))
    recorder._on_control(control(ControlState.HOLD, epoch=4))
    recorder._on_step(step(9, dropped="HOLD: stopped", epoch=2))  # of the episode before
    recorder._on_step(step(0, dropped="chunk ended", received=10))  # the first came too late
    assert not recorder.taken_over
    recorder._on_step(step(1, received=12))
    assert recorder.taken_over
    recorder._on_control(control(ticks=7))
    recorder._on_step(step(2, dropped="chunk ended", received=14))
    recorder._on_task(task(8.0, progress=55.0))
    recorder._on_task(task(9.0, progress=100.0, success_s=9.0))
    assert recorder.done_s == pytest.approx(4.0, abs=0.1)
    recorder.stop()
    recorder._on_step(step(3, dropped="HOLD: stopped"))
    recorder._on_control(control(ControlState.HOLD, ticks=9))

    episode = recorder.end(time_limit_s=35.0)
    assert [s.query for s in episode.steps] == [0, 1, 2]
    assert episode.steps[0].time_s == 0.0
    assert (episode.task, episode.seed, episode.success) == ("pack_doll", 3, True)
    assert episode.seconds == pytest.approx(4.0, abs=0.1)
    assert [progress for _, progress in episode.stages] == [0.0, 55.0, 100.0]
    assert (episode.control.ticks, len(episode.control.periods_ms)) == (9, 6)
    window = episode.cameras["head"]
    assert (window.received, window.first_stamp_ns, window.last_stamp_ns) == (4, 10**10, 14 * 10**9)


def test_a_success_after_the_time_is_none(recorder):
    recorder._on_task(task(5.0))
    recorder._on_control(control())
    recorder._on_step(step(0))
    recorder._on_task(task(9.0, progress=100.0, success_s=9.0))
    recorder.stop()
    assert not recorder.end(time_limit_s=3.0).success


def test_the_next_episode_knows_nothing_of_the_last(recorder):
    recorder._on_task(task(5.0))
    recorder._on_control(control())
    recorder._on_step(step(0))
    recorder.stop()
    recorder.begin()
    assert not recorder.taken_over
    assert recorder.control is None
    with pytest.raises(ValueError, match="no step"):
        recorder.end(time_limit_s=1.0)
