"""The S1 twin as a ROS 2 node: the robot's topics, types, QoS and units, from MuJoCo.

    python -m safe_pruner_node.nodes.twin_node --ros-args -p task:=pick_and_place -p seed:=7

The main thread serves commands, one thread runs the physics and publishes joint states, one
renders and publishes images. With a task the episode is judged where it happens, by the code
that judges every other rollout; ``~/task`` says how it stands, ``~/new_episode`` begins another.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from array import array
from collections import Counter
from pathlib import Path

import cv2
import rclpy
import rclpy.utilities
from astribot_msgs.msg import RobotJointController, RobotJointState
from builtin_interfaces.msg import Time
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.signals import SignalHandlerOptions
from rosgraph_msgs.msg import Clock
from safe_pruner_msgs.msg import TaskState
from safe_pruner_msgs.srv import NewEpisode
from sensor_msgs.msg import CompressedImage, Image
from std_srvs.srv import SetBool

from safe_pruner_node.bringup import check_twin_domain
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.nodes.messages import camera_message_type, qos_profile
from safe_pruner_node.resources import resource
from safe_pruner_node.robot import config as robot
from safe_pruner_node.twin.camera_thread import CameraThread
from safe_pruner_node.twin.cameras import drawn_resolutions
from safe_pruner_node.twin.commands import POSITION_MODE, command_positions
from safe_pruner_node.twin.joint_table import PART_DOF
from safe_pruner_node.twin.lockstep import CommandBarrier
from safe_pruner_node.twin.settings import TwinSettings, twin_settings
from safe_pruner_node.twin.tasks.registry import TASKS
from safe_pruner_node.twin.world import TaskStatus, World
from safe_pruner_node.types import RgbImage

CAMERA_CONTROL = "/astribot_camera_control"
NS = 1_000_000_000

MAX_CATCH_UP_S = 0.1
"""Real time that the physics makes up for after a stall; what is beyond it is lost, s."""

QUIET_S = 0.3
"""No command for so long: nobody drives the joints, and an episode may move them, s."""

WORLD_TIMEOUT_S = 5.0
"""Wall time for the physics to take over another world: it ends a tick and a set of images, s."""

TASK_STATE_PERIOD_S = 0.2
"""Wall time between two messages about an episode in which nothing changes, s."""

ROS_OWN_PARAMETERS = ("use_sim_time", "start_type_description_service", "qos_overrides")


class TwinNode:
    """Node ``astribot_twin``: the robot's end of the wire around a :class:`World`."""

    def __init__(self) -> None:
        self._node = Node("astribot_twin", automatically_declare_parameters_from_overrides=True)
        self._logger = self._node.get_logger()
        self.settings = self._read_settings()
        os.nice(self.settings.niceness)  # before the threads start: they inherit it
        path = self.settings.robot_config or resource("config/astribot_s1.yaml")
        self._robot = robot.load_robot_config(path)
        resolutions = drawn_resolutions(self._robot, self.settings.camera_scale)
        self._resolutions = resolutions
        self._parts = _parts(self._robot)
        driven = [s.part for s in self._robot.layout.segments if s.commanded]
        self._world = World(
            self._robot,
            resolutions,
            scene=self.settings.scene,
            task=self.settings.task,
            seed=self.settings.seed,
        )
        self._sim_lock = threading.Lock()  # of the world's
        self._next_world: World | None = None
        self._begun = threading.Event()
        self._episodes_before: list[TaskStatus] = []
        self._time_before_s = 0.0
        self._last_command_s = -math.inf
        self._published: tuple[World, float, bool] | None = None
        self._publish_task_s = -math.inf
        self._barrier = CommandBarrier(driven)
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._cameras_on = self.settings.cameras_on
        self._camera_frames = Counter(dict.fromkeys(resolutions, 0))
        self._camera_stamps_ns: dict[str, list[int]] = {camera: [] for camera in resolutions}
        self._commands = Counter(dict.fromkeys(self._parts, 0))
        self._advertise()
        self._cameras = CameraThread(self._world.sim.model, resolutions, self._publish_image)

    # --- set-up -------------------------------------------------------------------------------

    def _read_settings(self) -> TwinSettings:
        given = {
            name: parameter.value
            for name, parameter in self._node.get_parameters_by_prefix("").items()
            if isinstance(parameter, Parameter) and not name.startswith(ROS_OWN_PARAMETERS)
        }
        settings = twin_settings(given)
        for name, value in vars(settings).items():
            if name in given:
                self._node.undeclare_parameter(name)
            descriptor = ParameterDescriptor(read_only=True, dynamic_typing=True)
            self._node.declare_parameter(name, value, descriptor)
        return settings

    def _advertise(self) -> None:
        offered = qos_profile(self._robot.qos.robot_publisher)
        asked = qos_profile(self._robot.qos.robot_subscriber)
        self._state_publishers = {
            name: self._node.create_publisher(RobotJointState, part.state_topic, offered)
            for name, part in self._parts.items()
        }
        for name, part in self._parts.items():
            topic = part.command_topic or f"/{name}/joint_space_command"

            def take(message: RobotJointController, name: str = name, topic: str = topic) -> None:
                self._take_command(message, name, topic)

            self._node.create_subscription(RobotJointController, topic, take, asked)
        self._image_publishers: dict[str, Publisher] = {}
        for camera in self._robot.cameras:
            self._image_publishers[camera.name] = self._node.create_publisher(
                camera_message_type(camera), camera.topic, offered
            )
        self._node.create_service(SetBool, CAMERA_CONTROL, self._switch_cameras)
        self._node.create_service(NewEpisode, "~/new_episode", self._new_episode)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._task_publisher = self._node.create_publisher(TaskState, "~/task", latched)
        if self.settings.lock_step:
            self._clock_publisher = self._node.create_publisher(Clock, "/clock", 10)

    # --- callbacks (main thread) --------------------------------------------------------------

    def _take_command(self, message: RobotJointController, part: str, topic: str) -> None:
        self._commands[part] += 1
        self._last_command_s = time.monotonic()
        try:
            positions = command_positions(
                topic,
                self._parts[part].joint_names,
                mode=message.mode,
                names=message.name,
                values=message.command,
            )
        except ConfigError as error:
            self._logger.warning(f"command refused: {error}", throttle_duration_sec=1.0)
            return
        with self._sim_lock:
            self._world.set_command(part, positions)
        stamp = message.header.stamp
        self._barrier.offer(part, stamp.sec * NS + stamp.nanosec)

    def _switch_cameras(
        self, request: SetBool.Request, response: SetBool.Response
    ) -> SetBool.Response:
        self._cameras_on = request.data
        response.success = True
        response.message = f"cameras {'on' if request.data else 'off'}"
        self._logger.info(response.message)
        return response

    def _new_episode(
        self, request: NewEpisode.Request, response: NewEpisode.Response
    ) -> NewEpisode.Response:
        try:
            world = self._checked_world(request.task, request.seed)
        except ConfigError as error:
            response.success, response.message = False, str(error)
        else:
            self._begun.clear()
            self._next_world = world
            self._barrier.restart()
            response.success = self._begun.wait(WORLD_TIMEOUT_S)
            response.message = _episode_line(world) if response.success else "no physics"
        self._logger.info(f"~/new_episode: {response.message}")
        return response

    def _checked_world(self, task: str, seed: int) -> World:
        if time.monotonic() - self._last_command_s < QUIET_S:
            found, expected = "commands that still arrive", "the policy node deactivated"
            raise ConfigError("~/new_episode", "", found, expected)
        if not task:
            expected = f"one of {', '.join(sorted(TASKS))}"
            raise ConfigError("~/new_episode", "task", "nothing", expected)
        return World(self._robot, self._resolutions, task=task, seed=seed)

    # --- publishing ---------------------------------------------------------------------------

    def _publish_task(self, stamp_ns: int) -> None:
        """At every change, and every :data:`TASK_STATE_PERIOD_S`."""
        status = self._world.status
        if status is None:
            return
        now_s = time.monotonic()
        said = (self._world, status.progress, status.success)
        if said == self._published and now_s < self._publish_task_s:
            return
        self._published, self._publish_task_s = said, now_s + TASK_STATE_PERIOD_S
        message = TaskState(
            task=status.task,
            seed=status.seed,
            prompt=status.prompt,
            progress=status.progress,
            success=status.success,
            success_s=math.nan if status.success_s is None else status.success_s,
            elapsed_s=status.elapsed_s,
            time_limit_s=status.time_limit_s,
        )
        message.header.stamp = _time(stamp_ns)
        self._task_publisher.publish(message)

    def _publish_states(self, stamp_ns: int) -> None:
        stamp = _time(stamp_ns)
        for name, part in self._parts.items():
            with self._sim_lock:
                state = self._world.sim.joint_state(name)
            message = RobotJointState()
            message.header.stamp = stamp
            message.mode = POSITION_MODE
            message.name = list(part.joint_names)
            message.position = array("d", state.position)
            message.velocity = array("d", state.velocity)
            message.acceleration = array("d", state.acceleration)
            message.torque = array("d", state.torque)
            self._state_publishers[name].publish(message)

    def _publish_image(self, camera: str, rgb: RgbImage, stamp_ns: int) -> None:
        publisher = self._image_publishers[camera]
        kind = publisher.msg_type
        message = CompressedImage() if kind is CompressedImage else Image()
        message.header.stamp = _time(stamp_ns)
        message.header.frame_id = f"{camera}_camera_optical_frame"
        if isinstance(message, CompressedImage):
            quality = [cv2.IMWRITE_JPEG_QUALITY, self.settings.jpeg_quality]
            _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), quality)
            message.format = "jpeg"
            message.data = array("B", jpeg.tobytes())
        else:
            message.height, message.width = rgb.shape[:2]
            message.encoding, message.step = "rgb8", 3 * rgb.shape[1]
            message.data = array("B", rgb.tobytes())
        publisher.publish(message)
        self._camera_frames[camera] += 1
        if self.settings.summary_path:
            self._camera_stamps_ns[camera].append(stamp_ns)

    # --- the two ways of time (physics thread) ------------------------------------------------

    def _change_world(self) -> bool:
        """Takes over the world that the service has put ready; True when there was one."""
        world, self._next_world = self._next_world, None
        if world is None:
            return False
        self._cameras.load(world.sim.model)
        self._end_episode()
        with self._sim_lock:
            self._world = world
        self._begun.set()
        return True

    def _end_episode(self) -> None:
        """Keeps what the report will say of the present world."""
        self._time_before_s += self._world.sim.time_s
        if self._world.status is not None:
            self._episodes_before.append(self._world.status)

    def _run_real_time(self) -> None:
        """Follows the wall clock; a set of images that is late is left out, not queued."""
        period_s = 1 / self.settings.state_rate_hz
        camera_period_s = 1 / self.settings.camera_rate_hz
        now_s = simulated_to_s = next_camera_s = time.monotonic()
        deadline_s = now_s + period_s
        while not self._stop.wait(max(0.0, deadline_s - time.monotonic())):
            now_s = time.monotonic()
            if self._change_world():  # its time begins now
                now_s = simulated_to_s = time.monotonic()
            simulated_to_s = max(simulated_to_s, now_s - MAX_CATCH_UP_S)
            with self._sim_lock:
                self._world.advance(now_s - simulated_to_s)
            simulated_to_s = now_s
            stamp_ns = self._node.get_clock().now().nanoseconds
            if self._cameras_on and now_s >= next_camera_s:
                self._cameras.submit(self._world.sim.snapshot(), stamp_ns)
                next_camera_s = max(next_camera_s, now_s - camera_period_s) + camera_period_s
            self._publish_states(stamp_ns)
            self._publish_task(stamp_ns)
            self._check_cameras()
            deadline_s = max(deadline_s + period_s, now_s)

    def _run_lock_step(self) -> None:
        """One control period per complete set of commands; images before states before clock."""
        period_ns = round(self.settings.control_period_s * NS)
        camera_period_ns = round(NS / self.settings.camera_rate_hz)
        stamp_ns = next_camera_ns = 0
        while not self._stop.is_set():
            # Nobody commands yet: time passes at its own pace and the robot holds its home pose.
            held = self.settings.lock_step_timeout_s
            timeout_s = held if self._barrier.commanded else period_ns / NS
            if stamp_ns:
                self._barrier.wait(timeout_s)
            if self._stop.is_set():
                return
            self._change_world()
            stamp_ns += period_ns
            with self._sim_lock:
                self._world.advance(period_ns / NS)
            self._barrier.open_tick(stamp_ns)
            if self._cameras_on and stamp_ns >= next_camera_ns:
                self._cameras.submit(self._world.sim.snapshot(), stamp_ns)
                self._cameras.wait_drawn()
                # After a pause, such as cameras switched off, no burst to make up for it.
                next_camera_ns = max(next_camera_ns, stamp_ns - camera_period_ns)
                next_camera_ns += camera_period_ns
            self._publish_states(stamp_ns)
            self._publish_task(stamp_ns)
            self._clock_publisher.publish(Clock(clock=_time(stamp_ns)))
            self._check_cameras()

    def _check_cameras(self) -> None:
        if self._cameras.error is not None:
            raise ConfigError(
                "MuJoCo rendering",
                f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}",
                self._cameras.error,
                "a renderer that works: MUJOCO_GL=osmesa (libosmesa6) or egl (libegl1)",
            )

    def _run_physics(self) -> None:
        try:
            if self.settings.lock_step:
                self._run_lock_step()
            else:
                self._run_real_time()
        except Exception as error:  # noqa: BLE001 - handed over to the main thread, which raises it
            self._failure = error
        finally:
            self._stop.set()

    # --- life ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until :meth:`request_stop`, then reports.

        Raises:
            ConfigError: The cameras cannot be rendered here.
        """
        executor = SingleThreadedExecutor()
        executor.add_node(self._node)
        self._started_s = time.monotonic()
        physics = threading.Thread(target=self._run_physics, name="physics")
        physics.start()
        place = _episode_line(self._world) or f"scene {self.settings.scene}"
        pace = "lock-step" if self.settings.lock_step else "real time"
        self._logger.info(f"twin of the S1, {place}, {pace}")
        try:
            while not self._stop.is_set():
                executor.spin_once(timeout_sec=0.1)
        finally:
            self._stop.set()
            self._barrier.close()
            physics.join()
            self._cameras.stop()
            self._end_episode()
            executor.shutdown()
            self._node.destroy_node()
        if self._failure is not None:
            raise self._failure
        self._report()

    def request_stop(self) -> None:
        """Ends :meth:`run`; callable from a signal handler."""
        self._stop.set()

    def _report(self) -> None:
        sim_time_s = self._time_before_s
        real_time_factor = sim_time_s / (time.monotonic() - self._started_s)
        frames = ", ".join(f"{camera} {n}" for camera, n in self._camera_frames.items())
        self._logger.info(
            f"twin stopped: images {frames}; {self._commands.total()} commands; "
            f"{sim_time_s:.1f} s simulated at {real_time_factor:.2f} x real time"
        )
        for episode in self._episodes_before:
            self._logger.info(_outcome_line(episode))
        if self.settings.summary_path:
            summary = {
                "camera_frames": dict(self._camera_frames),
                "camera_stamps_ns": self._camera_stamps_ns,
                "camera_sets_skipped": self._cameras.skipped,
                "commands": dict(self._commands),
                "real_time_factor": real_time_factor,
                "sim_time_s": sim_time_s,
                "episodes": [dataclasses.asdict(episode) for episode in self._episodes_before],
            }
            path = Path(self.settings.summary_path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _parts(config: robot.RobotConfig) -> dict[str, robot.PartConfig]:
    """The robot's seven parts out of the robot file, in the robot's order."""
    for name, dof in PART_DOF.items():
        part = config.all_parts.get(name)
        if part is None or part.dof != dof:
            found = "nothing" if part is None else f"{part.dof} joints"
            raise ConfigError(config.path, f"parts.{name}", found, f"{dof} joints, as the S1 has")
    return {name: config.all_parts[name] for name in PART_DOF}


def _episode_line(world: World) -> str:
    """What an episode asks; empty without a task."""
    status = world.status
    if status is None:
        return ""
    return f"{status.task}, seed {status.seed}: {status.prompt!r}, {status.time_limit_s:g} s"


def _outcome_line(status: TaskStatus) -> str:
    outcome = f"progress {status.progress:.0f} in {status.elapsed_s:.1f} s"
    if status.success_s is not None:
        outcome = f"done after {status.success_s:.1f} s"
    return f"{status.task}, seed {status.seed}: {outcome}"


def _time(stamp_ns: int) -> Time:
    return Time(sec=stamp_ns // NS, nanosec=stamp_ns % NS)


def main() -> int:
    """Entry point of ``twin_node``; returns the exit code."""
    # Own handlers: the node still has to count and report after Ctrl-C or SIGTERM.
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    try:
        check_twin_domain()
        node = TwinNode()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: node.request_stop())
        node.run()
    except ConfigError as error:
        print(f"twin_node: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # Ctrl-C while starting up
        return 130
    finally:
        rclpy.utilities.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
