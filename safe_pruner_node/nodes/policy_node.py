"""The lifecycle node ``safe_pruner``: parameters, services and transitions around a session."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rcl_interfaces.msg import ParameterDescriptor, SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile
from rclpy.signals import SignalHandlerOptions
from rclpy.timer import Timer
from safe_pruner_msgs.msg import ControlState, PolicyStep
from safe_pruner_msgs.srv import SetPrompt
from sensor_msgs.msg import CompressedImage
from std_srvs.srv import Trigger

from safe_pruner_node.control.loop import ClockDrivenLoop, ControlLoop, RealTimeLoop
from safe_pruner_node.control.supervisor import Mode, Outcome
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.inference.client import WorkerState
from safe_pruner_node.inference.protocol import WorkerSettings
from safe_pruner_node.nodes.inputs import check_topic_types
from safe_pruner_node.nodes.messages import require_robot_messages
from safe_pruner_node.nodes.parameters import PolicyNodeParameters, check_value
from safe_pruner_node.nodes.reporting import (
    ControlSnapshot,
    Health,
    control_state_message,
    diagnostics_message,
    policy_step_message,
)
from safe_pruner_node.nodes.session import RobotSession, SessionSettings
from safe_pruner_node.pruning.settings import PrunerSettings, load_preset
from safe_pruner_node.realtime import SERVICE_PRIORITY, request_realtime
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import RobotConfig, load_robot_config

NODE_NAME = "safe_pruner"

_TELEMETRY_QOS = QoSProfile(depth=20)
_QUERY_PERIOD_S = 0.01
_CONTROL_STATE_PERIOD_S = 0.1
_DIAGNOSTICS_PERIOD_S = 1.0
_OVERLAY_CHECK_PERIOD_S = 0.5
_SWITCH_INTERVAL_S = 1e-3
"""How long another thread may run Python while the control thread waits; Python's own is 5 ms."""
_BRAKE_TIMEOUT_S = 3.0
_HOLD_AFTER_BRAKE_S = 0.2
"""How long the final hold is repeated, so that a lost message cannot be the last word."""


class PolicyNode(LifecycleNode):
    """π0.5 with SAFE-Pruner as a managed node; see README for its topics and services."""

    def __init__(self) -> None:
        super().__init__(NODE_NAME)
        self._stopping = False
        self._simulated = False
        self._session: RobotSession | None = None
        self._failure = ""
        self._loop: ControlLoop | None = None
        self._active_timers: list[Timer] = []
        self._ticks_published = 0
        self._overlay_publishers: dict[str, Publisher] = {}
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        for item in dataclasses.fields(PolicyNodeParameters):
            descriptor = ParameterDescriptor(
                description=item.metadata["help"],
                # A value of another type is taken here and refused by configure, in one line:
                # rclpy itself would end the process with a traceback.
                dynamic_typing=True,
            )
            self.declare_parameter(item.name, item.default, descriptor)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        # Telemetry outlives every lifecycle state, so these are plain publishers.
        self._step_publisher = self.create_publisher(PolicyStep, "~/step", _TELEMETRY_QOS)
        self._control_publisher = self.create_publisher(ControlState, "~/control", _TELEMETRY_QOS)
        self._diagnostics_publisher = self.create_publisher(
            DiagnosticArray, "/diagnostics", QoSProfile(depth=10)
        )
        self.create_timer(_DIAGNOSTICS_PERIOD_S, self._publish_diagnostics, clock=self._steady)
        self._create_services()

    # --- parameters ---------------------------------------------------------------------------

    def parameters(self) -> PolicyNodeParameters:
        """The parameters as they stand, validated.

        Raises:
            ConfigError: Names the first wrong one.
        """
        return PolicyNodeParameters.from_values(
            {
                item.name: self.get_parameter(item.name).value
                for item in dataclasses.fields(PolicyNodeParameters)
            }
        )

    def _on_set_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        """Validate; a change of the pruner reaches the worker at once, between episodes only."""
        values = {change.name: change.value for change in changes}
        try:
            for name, value in values.items():
                if name in PolicyNodeParameters.__dataclass_fields__:
                    self._check_change(name, check_value(name, value))
            if self._session is not None and values.keys() & {"pruner", "pruning_ratio"}:
                current = dataclasses.asdict(self.parameters())
                wanted = PolicyNodeParameters.from_values(current | values)
                self._session.set_pruner(_pruner_settings(wanted))
        except ConfigError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _check_change(self, name: str, value: object) -> None:
        """A configured node takes no change that would do nothing until the next configure."""
        changes_live = name in {"pruner", "pruning_ratio"}
        if self._session is None or changes_live or value == self.get_parameter(name).value:
            return
        way = "~/set_prompt" if name == "prompt" else "deactivate and cleanup first"
        raise ConfigError("parameter", name, "a change of a configured node", way)

    # --- lifecycle ----------------------------------------------------------------------------

    def on_configure(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Validate everything, load and warm the model. One line and FAILURE when wrong."""
        started_s = time.monotonic()
        self._failure = ""
        try:
            self._configure()
        except ConfigError as error:
            self._failure = str(error)
            self.get_logger().error(f"configure failed: {error}")
            self._close_session()
            return TransitionCallbackReturn.FAILURE
        assert self._session is not None  # noqa: S101 - _configure made it
        self.get_logger().info(
            f"configured in {time.monotonic() - started_s:.1f} s: {self._session.engine}, "
            f"control at {self._session.settings.control_rate_hz:g} Hz"
        )
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start the control loop in HOLD."""
        session = self._require_session()
        rate_hz = session.settings.control_rate_hz
        loop_type = ClockDrivenLoop if self._simulated else RealTimeLoop
        self._loop = loop_type(rate_hz, session.tick, on_error=self._on_tick_error)
        self._ticks_published = 0
        session.begin()
        self._loop.start()
        self._start_timers()
        self.get_logger().info(
            "active in HOLD"
            + ("" if session.settings.auto_start else "; hand over the arms with ~/start")
            + (" (dry run: no command goes out)" if session.settings.dry_run else "")
        )
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Brake, hold, then end the loop."""
        self._brake_and_stop_loop("deactivated")
        return super().on_deactivate(state)

    def on_cleanup(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """End the worker; the node can be configured again."""
        self._close_session()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Brake and hold when active, then end everything."""
        self._brake_and_stop_loop("shut down")
        self._close_session()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """An exception in a transition: hold, close, and be configurable again."""
        self._brake_and_stop_loop("error in a transition")
        self._close_session()
        return TransitionCallbackReturn.SUCCESS

    @property
    def active(self) -> bool:
        """True while the control loop runs."""
        return self._loop is not None

    def request_stop(self) -> None:
        """Told by the signal handler: a configure that waits gives up."""
        self._stopping = True

    def _configure(self) -> None:
        parameters = self.parameters()
        self._simulated = bool(self.get_parameter("use_sim_time").value)
        require_robot_messages()
        robot = load_robot_config(parameters.robot_config or resource("config/astribot_s1.yaml"))
        check_topic_types(self, robot)
        settings = SessionSettings(
            robot=robot,
            worker=worker_settings(parameters, robot),
            control_rate_hz=parameters.control_rate_hz or robot.control.rate_hz,
            query_rate_hz=parameters.query_rate_hz or robot.control.query_rate_hz,
            prompt=parameters.prompt,
            auto_start=parameters.auto_start,
            auto_resume=parameters.auto_resume,
            dry_run=parameters.dry_run,
        )
        self._session = RobotSession(self, settings, self._now_s)
        self._overlay_publishers = {
            camera.name: self.create_publisher(
                CompressedImage,
                f"~/saliency/{camera.name}/compressed",
                QoSProfile(depth=2),
            )
            for camera in robot.cameras
        }
        self._session.load(lambda: rclpy.ok() and not self._stopping)

    def _require_session(self) -> RobotSession:
        if self._session is None:
            raise RuntimeError("no session: configure first")
        return self._session

    def _close_session(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
        for publisher in self._overlay_publishers.values():
            self.destroy_publisher(publisher)
        self._overlay_publishers = {}

    def _brake_and_stop_loop(self, reason: str) -> None:
        """The stream ends in a hold: brake to rest, repeat the hold, then stop publishing."""
        loop, session = self._loop, self._session
        if loop is None or session is None:
            return
        session.stop(reason)
        if not self._simulated:  # simulated time stands still while this thread is in here
            deadline_s = time.monotonic() + _BRAKE_TIMEOUT_S
            while not session.at_rest and time.monotonic() < deadline_s:
                time.sleep(0.01)
            time.sleep(_HOLD_AFTER_BRAKE_S)
        for timer in self._active_timers:
            self.destroy_timer(timer)
        self._active_timers.clear()
        loop.stop()
        self._publish_control_state()
        self._loop = None
        counters = session.supervisor.counters
        self.get_logger().info(
            f"{reason}, in a hold: {loop.statistics().ticks} ticks, {counters.holds} holds, "
            f"{counters.starved_ticks} starved, {counters.clamped_ticks} clamped"
        )

    def _on_tick_error(self, error: BaseException) -> None:
        session = self._session
        if session is not None:
            session.supervisor.emergency_stop(f"control tick failed: {error}")
        self.get_logger().error(f"control tick failed: {type(error).__name__}: {error}")

    # --- clocks and timers --------------------------------------------------------------------

    def _now_s(self) -> float:
        """The control clock: steady, or the simulation's where ``use_sim_time`` says so."""
        if self._simulated:
            return float(self.get_clock().now().nanoseconds) * 1e-9
        return time.monotonic()

    def _start_timers(self) -> None:
        periods: list[tuple[float, Callable[[], None]]] = [
            (_QUERY_PERIOD_S, self._query),
            (_CONTROL_STATE_PERIOD_S, self._publish_control_state),
            (_OVERLAY_CHECK_PERIOD_S, self._check_overlay_listeners),
        ]
        self._active_timers = [
            self.create_timer(period, callback, clock=self._steady) for period, callback in periods
        ]
        if self._simulated:
            loop = self._loop
            assert isinstance(loop, ClockDrivenLoop)  # noqa: S101 - chosen in on_activate
            self._active_timers.append(
                self.create_timer(
                    1.0 / self._require_session().settings.control_rate_hz,
                    lambda: loop.step_to(self._now_s()),
                    clock=self.get_clock(),
                )
            )

    def _query(self) -> None:
        session = self._session
        if session is None:
            return
        session.query()
        while session.finished:
            self._step_publisher.publish(policy_step_message(session.finished.popleft()))
        while session.overlays:
            self._publish_overlays(session.overlays.popleft())

    def _check_overlay_listeners(self) -> None:
        if self._session is not None:
            self._session.want_overlay = any(
                publisher.get_subscription_count() > 0
                for publisher in self._overlay_publishers.values()
            )

    def _publish_overlays(self, overlays: dict[str, bytes]) -> None:
        stamp = self.get_clock().now().to_msg()
        for camera, jpeg in overlays.items():
            message = CompressedImage(format="jpeg")
            message.header.stamp = stamp
            message.header.frame_id = camera
            message.data = jpeg
            self._overlay_publishers[camera].publish(message)

    def _publish_control_state(self) -> None:
        session, loop = self._session, self._loop
        if session is None or loop is None or session.output is None:
            return
        statistics = loop.statistics()
        periods_s = loop.periods(after=self._ticks_published)
        self._ticks_published = statistics.ticks
        layout = session.settings.robot.layout
        snapshot = ControlSnapshot(
            output=session.output,
            loop=statistics,
            periods_ms=tuple(1e3 * periods_s),
            commanding=session.commands is not None,
            worker=session.worker.state.value,
            rate_hz=session.settings.control_rate_hz,
            worker_deaths=session.worker.deaths,
            joint_names=layout.joint_names,
            grippers=layout.gripper,
            waiting_for=session.waiting_for,
        )
        self._control_publisher.publish(
            control_state_message(snapshot, self.get_clock().now().to_msg())
        )

    def _publish_diagnostics(self) -> None:
        session = self._session
        if session is None:
            level = DiagnosticStatus.ERROR if self._failure else DiagnosticStatus.WARN
            health = [Health("node", level, self._failure or "not configured", {})]
        else:
            health = [_control_health(session), _worker_health(session), _camera_health(session)]
        stamp = self.get_clock().now().to_msg()
        self._diagnostics_publisher.publish(diagnostics_message(NODE_NAME, health, stamp))

    # --- services -----------------------------------------------------------------------------

    def _create_services(self) -> None:
        handlers: dict[str, Callable[[RobotSession], Outcome]] = {
            "start": _start,
            "stop": _stop,
            "reset": _reset,
            "emergency_stop": _emergency_stop,
            "clear_emergency_stop": _clear_emergency_stop,
        }
        for name, handler in handlers.items():
            self.create_service(Trigger, f"~/{name}", self._answer(name, handler))
        self.create_service(SetPrompt, "~/set_prompt", self._answer_set_prompt)

    def _answer(
        self, name: str, handler: Callable[[RobotSession], Outcome]
    ) -> Callable[[Trigger.Request, Trigger.Response], Trigger.Response]:
        def answer(_request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
            try:
                outcome = handler(self._active_session(name))
            except ConfigError as error:
                outcome = Outcome(ok=False, message=str(error))
            response.success, response.message = outcome.ok, outcome.message
            self.get_logger().info(f"~/{name}: {outcome.message}")
            return response

        return answer

    def _answer_set_prompt(
        self, request: SetPrompt.Request, response: SetPrompt.Response
    ) -> SetPrompt.Response:
        try:
            self._active_session("set_prompt").set_prompt(request.prompt)
            response.success, response.message = True, f"prompt is now {request.prompt!r}"
        except ConfigError as error:
            response.success, response.message = False, str(error)
        self.get_logger().info(f"~/set_prompt: {response.message}")
        return response

    def _active_session(self, service: str) -> RobotSession:
        if self._session is None or self._loop is None:
            raise ConfigError(f"~/{service}", "", "a node that is not active", "it activated")
        return self._session


def worker_settings(parameters: PolicyNodeParameters, robot: RobotConfig) -> WorkerSettings:
    """The worker that a node of these parameters runs.

    Raises:
        ConfigError: A value does not fit, or the pruner's preset is not there.
    """
    threads = parameters.worker_threads or default_worker_threads()
    engine = EngineSettings(
        checkpoint=Path(parameters.checkpoint).expanduser(),
        asset_id=parameters.asset_id or None,
        tokenizer=Path(parameters.tokenizer).expanduser() if parameters.tokenizer else None,
        device=parameters.device,
        dtype=parameters.dtype,
        image_decoder=parameters.image_decoder,
        pruner=_pruner_settings(parameters),
        flow_steps=parameters.flow_steps or None,
        threads=threads,
        seed=parameters.seed,
        state_in_prompt=robot.policy.state_in_prompt,
        state_dim=robot.layout.dof,
        action_dim=robot.layout.dof,
    )
    return WorkerSettings(
        engine=engine,
        robot_config=robot.path,
        prompt=parameters.prompt,
        threads=min(threads, len(robot.cameras)),  # one per image
        niceness=parameters.worker_niceness,
    )


def default_worker_threads() -> int:
    """All cores but the one that control and the subscriptions need, eight at most."""
    return max(1, min(8, (os.cpu_count() or 2) - 1))


def _pruner_settings(parameters: PolicyNodeParameters) -> PrunerSettings:
    ratio = None if parameters.pruning_ratio < 0.0 else parameters.pruning_ratio
    file = parameters.pruners_config or resource("config/pruners.yaml")
    return load_preset(Path(file), parameters.pruner, rho=ratio)


def _start(session: RobotSession) -> Outcome:
    return session.start()


def _stop(session: RobotSession) -> Outcome:
    session.stop("stopped by ~/stop")
    return Outcome(ok=True, message="holding")


def _reset(session: RobotSession) -> Outcome:
    session.reset()
    return Outcome(ok=True, message="holding; the next query is a keyframe")


def _emergency_stop(session: RobotSession) -> Outcome:
    session.supervisor.emergency_stop("~/emergency_stop")
    return Outcome(ok=True, message="emergency stop latched; ~/clear_emergency_stop leaves it")


def _clear_emergency_stop(session: RobotSession) -> Outcome:
    return session.supervisor.clear_emergency_stop()


def _control_health(session: RobotSession) -> Health:
    output = session.output
    if output is None:
        return Health("control", DiagnosticStatus.STALE, "no tick yet", {})
    level = DiagnosticStatus.OK if output.mode is Mode.POLICY else DiagnosticStatus.WARN
    if output.mode is Mode.ESTOP:
        level = DiagnosticStatus.ERROR
    counters = output.counters
    return Health(
        "control",
        level,
        output.mode.name + (f": {output.hold_reason}" if output.hold_reason else ""),
        {
            "remaining_actions": output.remaining_actions,
            "starved_ticks": counters.starved_ticks,
            "clamped_ticks": counters.clamped_ticks,
            "holds": counters.holds,
        },
    )


def _worker_health(session: RobotSession) -> Health:
    state = session.worker.state
    level = {
        WorkerState.READY: DiagnosticStatus.OK,
        WorkerState.BUSY: DiagnosticStatus.OK,
        WorkerState.STARTING: DiagnosticStatus.WARN,
        WorkerState.LOST: DiagnosticStatus.WARN,
    }.get(state, DiagnosticStatus.ERROR)
    return Health(
        "worker",
        level,
        session.worker.failure or state.value,
        {
            "engine": session.engine,
            "image decoder": session.image_decoder,
            "checkpoint": session.checkpoint_id,
            "deaths": session.worker.deaths,
            "pid": session.worker.pid,
        },
    )


def _camera_health(session: RobotSession) -> Health:
    counts = session.inputs.cameras.counts()
    silent = [name for name, count in counts.items() if count.received == 0]
    message = session.waiting_for or "images arrive"
    if silent:
        message = f"no image yet from {', '.join(silent)}"
    level = DiagnosticStatus.WARN if silent or session.waiting_for else DiagnosticStatus.OK
    values = {
        f"{name} {key}": value
        for name, count in counts.items()
        for key, value in dataclasses.asdict(count).items()
    }
    return Health("cameras", level, message, values)


def main() -> int:
    """Run the node until SIGINT or SIGTERM; it brakes to a hold before it ends."""
    # rclpy's own handlers would shut the context down at once, and the last hold with it.
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    node = PolicyNode()
    signals: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        signals.append(number)
        node.request_stop()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    request_realtime(SERVICE_PRIORITY)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        if node.get_parameter("self_activate").value:
            _self_activate(node)
        while rclpy.ok() and not signals:
            executor.spin_once(timeout_sec=0.1)
    except ExternalShutdownException:
        pass
    finally:
        if node.active:
            node.trigger_deactivate()
        node.trigger_shutdown()
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


def _self_activate(node: PolicyNode) -> None:
    """Configure and activate; the node stays, unconfigured, when that fails."""
    if node.trigger_configure() is TransitionCallbackReturn.SUCCESS:
        node.trigger_activate()


if __name__ == "__main__":
    sys.exit(main())
