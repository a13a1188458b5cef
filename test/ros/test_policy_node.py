"""The policy node beside the twin: real processes, real messages, rendered images."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from astribot_msgs.msg import RobotJointController
from diagnostic_msgs.msg import DiagnosticArray
from safe_pruner_msgs.msg import ControlState, PolicyStep
from safe_pruner_msgs.srv import SetPrompt
from sensor_msgs.msg import CompressedImage
from std_srvs.srv import SetBool, Trigger

from safe_pruner_node.bringup import BringupOptions, node_specs

sys.path.insert(0, str(Path(__file__).parent))
from conftest import wait_until

ARM = "/astribot_arm_left/joint_space_command"
COMMANDS = [
    f"/astribot_{part}/joint_space_command"
    for part in ("arm_left", "arm_right", "gripper_left", "gripper_right")
]
RATE_HZ = 50.0


class Stack:
    """Twin and policy node, started from the one description."""

    def __init__(self, bystander, start, checkpoint, **options):
        specs = node_specs(
            BringupOptions(
                checkpoint=str(checkpoint),
                twin=True,
                control_rate_hz=RATE_HZ,
                worker_threads=1,
                **options,
            )
        )
        self.bystander = bystander
        self.control = bystander.listen(ControlState, "/safe_pruner/control")
        self.steps = bystander.listen(PolicyStep, "/safe_pruner/step")
        self.commands = {t: bystander.listen(RobotJointController, t) for t in COMMANDS}
        self.twin, self.policy = (start(spec) for spec in specs)

    def wait_for_mode(self, name):
        return wait_until(lambda: self.control and self.control[-1].mode_name == name, name)

    def call(self, service, kind=Trigger, request=None):
        return self.bystander.call(kind, f"/safe_pruner/{service}", request)

    def worker_pid(self):
        """Of the worker that serves now, from the kernel: the policy node's only child."""
        children = Path(f"/proc/{self.policy.process.pid}/task").glob("*/children")
        pids = [int(pid) for file in children for pid in file.read_text().split()]
        # spawn also starts Python's resource tracker
        return [p for p in pids if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]


def stamps_s(messages):
    return np.array([m.header.stamp.sec + m.header.stamp.nanosec * 1e-9 for m in messages])


def test_a_run_from_start_to_the_last_hold(bystander, start, small_checkpoint):
    stack = Stack(bystander, start, small_checkpoint, prompt="pick up the red cube")
    stack.wait_for_mode("HOLD")
    wait_until(lambda: len(stack.commands[ARM]) > 20, "commands in HOLD")
    held = np.array([m.command for m in stack.commands[ARM][:20]])
    assert np.ptp(held, axis=0).max() == 0.0, "HOLD moves"
    assert not stack.steps, "the policy ran before anybody started it"

    answer = stack.call("start")
    assert answer.success, answer.message
    stack.wait_for_mode("POLICY")
    wait_until(lambda: len(stack.steps) >= 5, "policy steps")
    first, later = stack.steps[0], stack.steps[-1]
    assert (first.keyframe, first.keyframe_reason) == (True, "first")
    assert first.kept_tokens == first.visual_tokens == 3 * 64
    assert not later.keyframe
    assert later.kept_tokens == 48
    assert [c.name for c in later.cameras] == ["head", "left_wrist", "right_wrist"]
    assert later.end_to_end_ms > later.step_ms > 0.0
    assert later.dropped == ""
    assert {"decode", "vision", "prefill_early", "denoise"} <= {s.name for s in later.stages}

    answer = stack.call("stop")
    assert answer.success
    stack.wait_for_mode("HOLD")
    before = len(stack.commands[ARM])
    wait_until(lambda: len(stack.commands[ARM]) > before + 30, "commands after the stop")
    rest = np.array([m.command for m in stack.commands[ARM][-10:]])
    assert np.ptp(rest, axis=0).max() == 0.0

    assert stack.policy.end() == 0
    for topic, messages in stack.commands.items():
        tail = np.array([m.command for m in messages[-5:]])
        assert np.ptp(tail, axis=0).max() == 0.0, f"{topic} did not end in a hold"
        assert all(m.mode == 1 for m in messages)
        joint_steps = np.abs(np.diff(np.array([m.command for m in messages]), axis=0))
        if "arm" in topic:
            assert joint_steps.max() <= 2.0 / RATE_HZ + 1e-9, "faster than the velocity limit"


def test_emergency_stop_is_latched(bystander, start, small_checkpoint):
    stack = Stack(bystander, start, small_checkpoint, prompt="x", auto_start=True)
    stack.wait_for_mode("POLICY")
    assert stack.call("emergency_stop").success
    stack.wait_for_mode("ESTOP")
    refused = stack.call("start")
    assert not refused.success
    assert "emergency stop" in refused.message
    assert stack.control[-1].mode_name == "ESTOP"
    assert stack.call("clear_emergency_stop").success
    stack.wait_for_mode("HOLD")
    assert not stack.call("clear_emergency_stop").success
    assert stack.call("start").success
    stack.wait_for_mode("POLICY")


@pytest.mark.parametrize("auto_resume", [True, False])
def test_two_worker_deaths(bystander, start, small_checkpoint, auto_resume):
    stack = Stack(
        bystander, start, small_checkpoint, prompt="x", auto_start=True, auto_resume=auto_resume
    )
    for deaths in (1, 2):
        stack.wait_for_mode("POLICY")
        wait_until(lambda: len(stack.steps) >= 3, "steps")
        stack.steps.clear()
        (pid,) = stack.worker_pid()
        os.kill(pid, signal.SIGKILL)
        wait_until(
            lambda deaths=deaths: (
                stack.control[-1].worker_deaths == deaths
                and stack.control[-1].worker in {"ready", "busy"}
            ),
            "a new worker",
        )
        if not auto_resume:
            seen = len(stack.control)
            wait_until(lambda seen=seen: len(stack.control) > seen + 10, "a second of HOLD")
            assert stack.control[-1].mode_name == "HOLD"
            assert "lost" in stack.control[-1].hold_reason
            assert stack.call("start").success
    stack.wait_for_mode("POLICY")
    wait_until(lambda: len(stack.steps) >= 2, "steps of the third worker")
    gaps_s = np.diff(stamps_s(stack.commands[ARM]))
    assert gaps_s.max() <= 2.0 / RATE_HZ, "the command stream paused"
    moves = np.abs(np.diff(np.array([m.command for m in stack.commands[ARM]]), axis=0))
    assert moves.max() <= 2.0 / RATE_HZ + 1e-9


def test_prompt_and_pruner_change(bystander, start, small_checkpoint):
    stack = Stack(bystander, start, small_checkpoint, prompt="pick up the cube", auto_start=True)
    wait_until(lambda: len(stack.steps) >= 3, "steps")
    empty = stack.call("set_prompt", SetPrompt, SetPrompt.Request(prompt="  "))
    assert not empty.success
    assert "prompt" in empty.message
    assert stack.call("set_prompt", SetPrompt, SetPrompt.Request(prompt="put it back")).success
    changed = wait_until(
        lambda: next((s for s in stack.steps if s.prompt == "put it back"), None), "the new prompt"
    )
    assert (changed.keyframe, changed.keyframe_reason) == (True, "prompt")

    for name, value in (("prompt", "another"), ("control_rate_hz", 20.0)):
        (idle,) = bystander.set_parameters("safe_pruner", **{name: value})
        assert not idle.successful, f"{name} was taken and does nothing"
        assert name in idle.reason

    (refused,) = bystander.set_parameters("safe_pruner", pruner="vanilla")
    assert not refused.successful
    assert "episode" in refused.reason
    assert stack.call("reset").success
    stack.wait_for_mode("HOLD")
    (unknown,) = bystander.set_parameters("safe_pruner", pruner="nonsense")
    assert not unknown.successful
    assert "nonsense" in unknown.reason
    (accepted,) = bystander.set_parameters("safe_pruner", pruner="vanilla")
    assert accepted.successful, accepted.reason
    stack.steps.clear()
    assert stack.call("start").success
    wait_until(lambda: len(stack.steps) >= 2, "vanilla steps")
    assert {s.pruner for s in stack.steps} == {"vanilla"}
    assert stack.steps[0].query == 0
    assert all(s.kept_tokens == s.visual_tokens for s in stack.steps)


def test_dark_cameras_end_in_a_hold_that_says_so(bystander, start, small_checkpoint):
    stack = Stack(bystander, start, small_checkpoint, prompt="x", auto_start=True, auto_resume=True)
    diagnostics = bystander.listen(DiagnosticArray, "/diagnostics")
    stack.wait_for_mode("POLICY")
    bystander.call(SetBool, "/astribot_camera_control", SetBool.Request(data=False))
    stack.wait_for_mode("HOLD")
    wait_until(lambda: "silent" in stack.control[-1].hold_reason, "the reason")
    assert stack.control[-1].hold_reason.count("camera") >= 1

    def camera_status():
        statuses = [s for m in diagnostics[-2:] for s in m.status]
        return [
            s.message for s in statuses if s.name == "safe_pruner: cameras" and s.level != b"\0"
        ]

    wait_until(camera_status, "a diagnostics warning")
    bystander.call(SetBool, "/astribot_camera_control", SetBool.Request(data=True))
    stack.wait_for_mode("POLICY")


def test_dry_run_commands_nothing(bystander, start, small_checkpoint):
    stack = Stack(bystander, start, small_checkpoint, prompt="x", auto_start=True, dry_run=True)
    wait_until(lambda: len(stack.steps) >= 5, "steps")
    assert not stack.control[-1].commanding
    assert not any(stack.commands.values())
    assert not any(
        info for t in COMMANDS for info in bystander.node.get_publishers_info_by_topic(t)
    )


def test_overlays_only_while_somebody_looks(bystander, start, small_checkpoint):
    stack = Stack(bystander, start, small_checkpoint, prompt="x", auto_start=True)
    wait_until(lambda: len(stack.steps) >= 3, "steps")
    assert all("overlay" not in {s.name for s in step.stages} for step in stack.steps)
    pictures = bystander.listen(CompressedImage, "/safe_pruner/saliency/head/compressed")
    picture = wait_until(lambda: pictures and pictures[0], "an overlay")
    assert bytes(picture.data[:2]) == b"\xff\xd8"


def test_lock_step_follows_the_simulation_clock(bystander, start, small_checkpoint):
    twin, policy = node_specs(
        BringupOptions(
            checkpoint=str(small_checkpoint),
            twin=True,
            prompt="x",
            auto_start=True,
            control_rate_hz=RATE_HZ,
            worker_threads=1,
        )
    )
    control = bystander.listen(ControlState, "/safe_pruner/control")
    arm = bystander.listen(RobotJointController, ARM)
    lock_step = {"lock_step": True, "control_period_s": 1.0 / RATE_HZ}
    start(dataclasses.replace(twin, parameters={**twin.parameters, **lock_step}))
    start(dataclasses.replace(policy, parameters={**policy.parameters, "use_sim_time": True}))
    wait_until(lambda: control and control[-1].mode_name == "POLICY", "POLICY")
    wait_until(lambda: len(arm) > 150, "commands")
    periods_s = np.diff(stamps_s(arm[-100:]))
    # Every command belongs to one tick of the simulation, however fast or slow it runs.
    np.testing.assert_allclose(periods_s, 1.0 / RATE_HZ, atol=1e-6)
