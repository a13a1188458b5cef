"""The twin as a real process, seen by a real subscriber: the robot's wire, in both time modes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict

import cv2
import numpy as np
import pytest
import rclpy
from astribot_msgs.msg import RobotJointController, RobotJointState
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage
from std_srvs.srv import SetBool

from safe_pruner_node.twin.joint_table import HOME, PART_DOF

DOMAIN_ID = 92
CAMERAS = {
    name: f"/astribot_camera/{name}_rgbd/color_compress/compressed"
    for name in ("head", "left_wrist", "right_wrist")
}
DRIVEN = (
    "astribot_arm_left",
    "astribot_arm_right",
    "astribot_gripper_left",
    "astribot_gripper_right",
)
BEST_EFFORT = QoSProfile(depth=50, reliability=ReliabilityPolicy.BEST_EFFORT)
RELIABLE = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)


def seconds(stamp):
    return stamp.sec + stamp.nanosec * 1e-9


class Peer:
    """A node of ours that listens to everything, one way or the other."""

    def __init__(self):
        self.context = Context()
        rclpy.init(context=self.context, domain_id=DOMAIN_ID)
        self.node = Node("peer", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.states = defaultdict(list)
        self.images = defaultdict(list)
        self.clocks = []
        self.publishers = {
            part: self.node.create_publisher(
                RobotJointController, f"/{part}/joint_space_command", RELIABLE
            )
            for part in PART_DOF
        }
        for i, part in enumerate(PART_DOF):
            self.node.create_subscription(
                RobotJointState,
                f"/{part}/joint_space_states",
                self.states[part].append,
                (BEST_EFFORT, RELIABLE)[i % 2],
            )
        for i, (camera, topic) in enumerate(CAMERAS.items()):
            self.node.create_subscription(
                CompressedImage, topic, self.images[camera].append, (RELIABLE, BEST_EFFORT)[i % 2]
            )
        self.node.create_subscription(Clock, "/clock", self._on_clock, RELIABLE)
        self.switch = self.node.create_client(SetBool, "/astribot_camera_control")

    def _on_clock(self, message):
        self.clocks.append(seconds(message.clock))

    def spin_until(self, done, timeout_s=60.0):
        end = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < end, "the twin did not answer in time"
            self.executor.spin_once(timeout_sec=0.05)

    def spin_for(self, duration_s):
        end = time.monotonic() + duration_s
        while (left := end - time.monotonic()) > 0:
            self.executor.spin_once(timeout_sec=left)

    def set_cameras(self, on):
        future = self.switch.call_async(SetBool.Request(data=on))
        self.spin_until(future.done)
        assert future.result().success

    def command(self, part, values, stamp_s=0.0, mode=1):
        message = RobotJointController(mode=mode, command=[float(v) for v in values])
        message.header.stamp.sec = int(stamp_s)
        message.header.stamp.nanosec = round((stamp_s - int(stamp_s)) * 1e9)
        self.publishers[part].publish(message)

    def clear(self):
        for received in (*self.states.values(), *self.images.values(), self.clocks):
            received.clear()

    def close(self):
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


@pytest.fixture
def peer():
    peer = Peer()
    yield peer
    peer.close()


def start(tmp_path, **parameters):
    parameters = {"summary_path": f"'{tmp_path / 'twin.json'}'", **parameters}
    command = [sys.executable, "-m", "safe_pruner_node.nodes.twin_node", "--ros-args"]
    for name, value in parameters.items():
        command += ["-p", f"{name}:={value}"]
    environment = {**os.environ, "ROS_DOMAIN_ID": str(DOMAIN_ID)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def stop(twin, number=signal.SIGINT):
    """Ends the twin; its exit code and what it wrote to stderr."""
    if twin.poll() is None:
        twin.send_signal(number)
    try:
        _, stderr = twin.communicate(timeout=20)
    finally:
        twin.kill()
    return twin.returncode, stderr


def check_states(peer):
    for part, dof in PART_DOF.items():
        states = peer.states[part]
        stamps = [seconds(state.header.stamp) for state in states]
        assert np.all(np.diff(stamps) > 0)
        assert np.median(np.diff(stamps)) > 0.9 / 100, part  # slower where the machine is shared
        assert abs(time.time() - stamps[-1]) < 2
        last = states[-1]
        fields = (last.name, last.position, last.velocity, last.acceleration, last.torque)
        assert [len(values) for values in fields] == [dof] * 5
    arm = peer.states["astribot_arm_left"][-1]
    assert list(arm.name) == [f"astribot_arm_left_joint_{i}" for i in range(1, 8)]
    np.testing.assert_allclose(arm.position, HOME["astribot_arm_left"], atol=5e-3)
    assert peer.states["astribot_gripper_left"][-1].position[0] == pytest.approx(0, abs=1)


def check_images(peer):
    known = {seconds(state.header.stamp) for state in peer.states["astribot_arm_left"]}
    for camera, size in (("head", (360, 640)), ("left_wrist", (180, 320))):
        images = peer.images[camera]
        assert images[-1].format == "jpeg"
        payload = np.frombuffer(bytes(images[-1].data), np.uint8)
        assert cv2.imdecode(payload, cv2.IMREAD_COLOR).shape[:2] == size
        stamps = [seconds(image.header.stamp) for image in images]
        assert np.median(np.diff(stamps)) > 0.9 / 10
        # The stamp is that of the state shown: exactly one of the joint states'.
        assert known.issuperset(stamps[1:-1])


def check_commands(peer):
    target = np.array(HOME["astribot_arm_left"]) + np.eye(7)[3] * 0.3
    peer.command("astribot_arm_left", target)
    peer.command("astribot_gripper_right", [100.0])
    for wrong in ([0.0] * 6, [float("nan")] * 7):
        peer.command("astribot_arm_right", wrong)
    peer.command("astribot_arm_right", [0.0] * 7, mode=2)  # velocity

    def now(part):
        return np.array(peer.states[part][-1].position)

    peer.spin_until(lambda: np.allclose(now("astribot_arm_left"), target, atol=1e-2))
    peer.spin_until(lambda: now("astribot_gripper_right")[0] > 98)
    np.testing.assert_allclose(now("astribot_arm_right"), HOME["astribot_arm_right"], atol=5e-3)


def check_camera_switch(peer):
    peer.set_cameras(False)
    peer.spin_for(1.0)
    peer.clear()
    peer.spin_until(lambda: len(peer.states["astribot_head"]) > 50)
    assert not any(peer.images.values())
    peer.set_cameras(True)
    peer.spin_until(lambda: all(peer.images[camera] for camera in CAMERAS))


def test_real_time_face(tmp_path, peer):
    """Topics, types, QoS, units, stamps, commands, camera switch and the summary in one run."""
    twin = start(tmp_path, state_rate_hz=100, camera_rate_hz=10)
    try:
        peer.spin_until(lambda: all(peer.states[part] for part in PART_DOF))
        peer.spin_until(lambda: all(peer.images[camera] for camera in CAMERAS))
        peer.clear()
        peer.spin_until(lambda: min(map(len, peer.images.values())) >= 8)
        check_states(peer)
        check_images(peer)
        check_commands(peer)
        check_camera_switch(peer)
    finally:
        code, stderr = stop(twin)
    assert code == 0, stderr
    assert stderr.count("command refused") == 1  # one line, not one per message
    assert "Traceback" not in stderr
    assert "twin stopped" in stderr
    summary = json.loads((tmp_path / "twin.json").read_text())
    assert summary["camera_frames"]["head"] >= 8
    assert summary["commands"]["astribot_arm_right"] == 3
    assert summary["commands"]["astribot_torso"] == 0
    assert 0.1 < summary["real_time_factor"] < 1.1


def test_lock_step(tmp_path, peer):
    """One control period per complete set of commands, images on simulated time."""
    period = 0.02
    twin = start(
        tmp_path,
        lock_step="true",
        control_period_s=period,
        lock_step_timeout_s=60.0,
        camera_rate_hz=10,
    )
    home = {part: np.array(HOME[part]) for part in DRIVEN}
    try:
        # Before anybody commands, time passes by itself.
        peer.spin_until(lambda: len(peer.clocks) > 3)
        peer.spin_until(lambda: all(p.get_subscription_count() for p in peer.publishers.values()))
        for part in DRIVEN:
            peer.command(part, home[part])
        peer.spin_for(0.5)

        # From the first command on it stands still without the others.
        peer.clear()
        peer.spin_for(0.5)
        assert peer.clocks == []
        peer.command("astribot_arm_left", home["astribot_arm_left"])
        peer.spin_for(0.3)
        assert peer.clocks == []

        def tick():
            before = len(peer.clocks)
            for part in DRIVEN:
                peer.command(part, home[part], stamp_s=0.0)
            peer.spin_until(lambda: len(peer.clocks) > before)

        tick()
        first = peer.clocks[-1]
        for _ in range(20):
            tick()
        np.testing.assert_allclose(np.diff(peer.clocks), period, atol=1e-9)
        assert peer.clocks[-1] == pytest.approx(first + 20 * period, abs=1e-9)
        peer.spin_until(lambda: len(peer.images["head"]) >= 4)
        stamps = [seconds(image.header.stamp) for image in peer.images["head"]]
        np.testing.assert_allclose(np.diff(stamps), 0.1, atol=1e-9)
        states = [seconds(state.header.stamp) for state in peer.states["astribot_arm_left"]]
        assert set(peer.clocks) <= set(states) | {peer.clocks[-1]}

        # A command that was meant for an earlier tick does not open this one.
        before = len(peer.clocks)
        for part in DRIVEN:
            peer.command(part, home[part], stamp_s=peer.clocks[-1] - period)
        peer.spin_for(0.3)
        assert len(peer.clocks) == before
    finally:
        code, stderr = stop(twin, signal.SIGTERM)
    assert code == 0, stderr
    summary = json.loads((tmp_path / "twin.json").read_text())
    assert summary["sim_time_s"] == pytest.approx(peer.clocks[-1], abs=1e-6)


def test_lock_step_goes_on_after_the_timeout(tmp_path, peer):
    twin = start(tmp_path, lock_step="true", control_period_s=0.05, lock_step_timeout_s=0.2)
    try:
        peer.spin_until(lambda: len(peer.clocks) > 3)
        peer.command("astribot_arm_left", HOME["astribot_arm_left"])
        peer.spin_for(0.3)
        peer.clear()
        peer.spin_until(lambda: len(peer.clocks) >= 3)
        np.testing.assert_allclose(np.diff(peer.clocks), 0.05, atol=1e-9)
    finally:
        code, stderr = stop(twin)
    assert code == 0, stderr


@pytest.mark.parametrize(
    ("parameter", "value", "line"),
    [
        ("camera_rate_hz", "0.0", "parameter: camera_rate_hz: found 0.0, expected greater than 0"),
        ("scene", "kitchen", "parameter: scene: found kitchen, expected one of empty, table"),
        ("robot_config", "/nowhere.yaml", "/nowhere.yaml: found No such file"),
        ("camera_rte_hz", "15.0", "expected 'camera_rate_hz' perhaps"),
    ],
)
def test_a_wrong_parameter_is_one_line_and_a_failure(tmp_path, parameter, value, line):
    code, stderr = stop_after_end(start(tmp_path, **{parameter: value}))
    assert code == 1
    assert line in stderr
    assert len(stderr.strip().splitlines()) == 1


def stop_after_end(twin):
    _, stderr = twin.communicate(timeout=30)
    return twin.returncode, stderr
