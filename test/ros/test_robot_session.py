"""The session's tick in this process: what the command stream does when its input breaks."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest
from astribot_msgs.msg import RobotJointController, RobotJointState
from rclpy.lifecycle import LifecycleNode

from safe_pruner_node.control.supervisor import Mode
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.inference.protocol import WorkerSettings
from safe_pruner_node.nodes.session import RobotSession, SessionSettings
from safe_pruner_node.robot.config import load_robot_config

sys.path.insert(0, str(Path(__file__).parent))
from conftest import wait_until

ROBOT = Path(__file__).parents[2] / "config" / "astribot_s1.yaml"
RATE_HZ = 100.0


@pytest.fixture
def session(bystander):  # noqa: ARG001 - its rclpy context
    node = LifecycleNode("session_owner")
    robot = load_robot_config(ROBOT)
    worker = WorkerSettings(EngineSettings(checkpoint=Path("none")), robot_config=ROBOT)
    settings = SessionSettings(robot, worker, RATE_HZ, 10.0, "x", False, False, False)
    session = RobotSession(node, settings, time.monotonic)
    yield session
    session.close()
    node.destroy_node()


def publish_home(bystander, session):
    """Publishers of every part, and a function that sends the home pose once."""
    parts = session.settings.robot.parts.values()
    publishers = [
        (bystander.node.create_publisher(RobotJointState, part.state_topic, 1), part)
        for part in parts
    ]
    wait_until(lambda: all(p.get_subscription_count() for p, _ in publishers), "a match")

    def send():
        for publisher, part in publishers:
            publisher.publish(RobotJointState(position=part.home.tolist(), name=[]))

    return send


def run(session, send, ticks):
    for _ in range(ticks):
        send()
        time.sleep(1.0 / RATE_HZ)
        session.tick(time.monotonic())


def test_a_bug_in_the_input_stops_hard_and_keeps_the_commands_coming(
    bystander, session, monkeypatch
):
    commands = bystander.listen(RobotJointController, "/astribot_arm_left/joint_space_command")
    send = publish_home(bystander, session)
    session.begin()
    run(session, send, 20)
    wait_until(lambda: len(commands) >= 10, "commands")
    np.testing.assert_allclose(
        commands[-1].command, session.settings.robot.parts["astribot_arm_left"].home
    )

    def broken():
        raise RuntimeError("surprise")

    monkeypatch.setattr(session.inputs, "poll_joints", broken)
    before = len(commands)
    run(session, send, 20)
    wait_until(lambda: len(commands) >= before + 15, "commands after the bug")
    assert session.output.mode is Mode.ESTOP
    assert "surprise" in session.output.hold_reason
    assert np.ptp(np.array([c.command for c in commands]), axis=0).max() == 0.0


def test_what_waited_before_activation_is_not_taken_for_new(bystander, session):
    send = publish_home(bystander, session)
    send()
    time.sleep(0.3)
    session.begin()
    session.tick(time.monotonic())
    assert session.output.position is None, "an old state became the command"
    run(session, send, 5)
    assert session.output.position is not None
