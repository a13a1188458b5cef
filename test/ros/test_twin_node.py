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
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from safe_pruner_msgs.msg import TaskState
from safe_pruner_msgs.srv import NewEpisode
from sensor_msgs.msg import CompressedImage
from std_srvs.srv import SetBool

from safe_pruner_node.demonstrations.rollout import demonstrate
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.twin.joint_table import HOME, PART_DOF
from safe_pruner_node.twin.tasks.episode import Episode
from safe_pruner_node.twin.tasks.registry import build_task

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
LATCHED = QoSProfile(depth=50, durability=DurabilityPolicy.TRANSIENT_LOCAL)


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
        self.renew = self.node.create_client(NewEpisode, "/astribot_twin/new_episode")
        self.tasks = self.listen_to_task()

    def _on_clock(self, message):
        self.clocks.append(seconds(message.clock))

    def listen_to_task(self):
        heard = []
        self.node.create_subscription(TaskState, "/astribot_twin/task", heard.append, LATCHED)
        return heard

    def new_episode(self, task, seed):
        future = self.renew.call_async(NewEpisode.Request(task=task, seed=seed))
        self.spin_until(future.done)
        return future.result()

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


CONTROL_S = 0.01


class RecordingEpisode(Episode):
    """Remembers the command of every control period."""

    def __init__(self, task, robot):
        super().__init__(task, robot)
        self.commands = []
        self._part_s = 0.0

    def advance(self, command, dt_s):
        super().advance(command, dt_s)
        self._part_s += dt_s
        if self._part_s > CONTROL_S - 1e-9:  # frames in between cut a period in two
            self.commands.append(command.copy())
            self._part_s = 0.0


@pytest.fixture(scope="module")
def expert_commands():
    """What solves an episode, as joint commands at 100 Hz: by the expert, in a twin of ours."""
    robot = load_robot_config(resource("config/astribot_s1.yaml"))
    for seed in range(5):  # the expert is good, not perfect
        episode = RecordingEpisode(build_task("pick_and_place", seed), robot)
        demonstration = demonstrate(episode, noise_rad=0.0, mistake_chance=0.0)
        if demonstration.success:
            return robot.layout, demonstration, episode.commands
    pytest.fail("the expert solves none of five episodes")


def test_an_expert_through_the_topics_is_judged_in_the_twin(tmp_path, peer, expert_commands):
    """Same commands, same physics, same judge; then another episode, once nobody commands."""
    layout, demonstration, commands = expert_commands
    twin = start(
        tmp_path,
        task="pick_and_place",
        seed=demonstration.seed,
        lock_step="true",
        control_period_s=CONTROL_S,
        lock_step_timeout_s=60.0,
        cameras_on="false",
    )
    try:
        peer.spin_until(lambda: peer.tasks and len(peer.clocks) > 3)
        peer.spin_until(lambda: all(p.get_subscription_count() for p in peer.publishers.values()))
        assert peer.tasks[0].task == "pick_and_place"
        assert peer.tasks[0].seed == demonstration.seed
        assert peer.tasks[0].prompt == demonstration.prompt
        assert (peer.tasks[0].progress, peer.tasks[0].success) == (0.0, False)
        begun_s = peer.tasks[-1].elapsed_s
        for command in commands:
            before = len(peer.clocks)
            for part in DRIVEN:
                peer.command(part, command[layout.slices[part]])
            peer.spin_until(lambda before=before: len(peer.clocks) > before)
        peer.spin_until(lambda: peer.tasks[-1].success)
        done = peer.tasks[-1]
        assert done.progress == 100.0
        stages = [message.progress for message in peer.tasks]
        assert stages == sorted(stages)
        assert any(0.0 < stage < 100.0 for stage in stages), "it went by stages"
        assert demonstration.seconds - 1.0 < done.success_s - begun_s < demonstration.seconds + 1.0

        late = peer.listen_to_task()
        peer.spin_until(lambda: late)
        assert late[0].success

        peer.command("astribot_arm_left", HOME["astribot_arm_left"])
        peer.spin_for(0.1)
        refused = peer.new_episode("pack_doll", 7)
        assert not refused.success
        assert "commands that still arrive" in refused.message
        peer.spin_for(0.4)
        assert "juggling" in peer.new_episode("juggling", 7).message
        before_s = peer.clocks[-1]
        assert peer.new_episode("pack_doll", 7).success
        peer.spin_until(lambda: peer.tasks[-1].task == "pack_doll")
        assert peer.tasks[-1].seed == 7
        assert peer.tasks[-1].elapsed_s < 1.0
        assert not peer.tasks[-1].success
        # Nobody commands: time goes on by itself again, and never back.
        peer.spin_until(lambda: peer.clocks[-1] > before_s + 0.2)
        assert np.all(np.diff(peer.clocks) > 0)
    finally:
        code, stderr = stop(twin)
    assert code == 0, stderr
    first, second = json.loads((tmp_path / "twin.json").read_text())["episodes"]
    assert (first["task"], first["success"], first["progress"]) == ("pick_and_place", True, 100.0)
    assert first["success_s"] == pytest.approx(done.success_s, abs=1e-3)
    assert (second["task"], second["success"], second["success_s"]) == ("pack_doll", False, None)


@pytest.mark.parametrize(
    ("parameter", "value", "line"),
    [
        ("camera_rate_hz", "0.0", "parameter: camera_rate_hz: found 0.0, expected greater than 0"),
        ("scene", "kitchen", "parameter: scene: found kitchen, expected one of empty, table"),
        ("task", "juggling", "parameter: task: found juggling, expected one of pack_doll, pick"),
        ("robot_config", "/nowhere.yaml", "/nowhere.yaml: found No such file"),
        ("camera_rte_hz", "15.0", "expected 'camera_rate_hz' perhaps"),
    ],
)
def test_a_wrong_parameter_is_one_line_and_a_failure(tmp_path, parameter, value, line):
    code, stderr = stop_after_end(start(tmp_path, **{parameter: value}))
    assert code == 1
    assert line in stderr
    assert len(stderr.strip().splitlines()) == 1


def test_a_scene_beside_a_task_is_refused(tmp_path):
    code, stderr = stop_after_end(start(tmp_path, task="pack_doll", scene="empty"))
    assert code == 1
    assert "parameter: scene: found empty, expected no scene beside task pack_doll" in stderr


def stop_after_end(twin):
    _, stderr = twin.communicate(timeout=30)
    return twin.returncode, stderr
