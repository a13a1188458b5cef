"""Real node processes on a ROS domain of their own, and a node to talk to them with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict

import pytest
import rclpy
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import SetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile

PATIENCE_S = 90.0  # only ever reached by a failing test


class NodeProcess:
    """One node as its own process, its output kept in a file."""

    def __init__(self, spec, log):
        self.spec = spec
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", spec.module, *spec.ros_arguments()],
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )

    def lines(self):
        return self.log.read_text(errors="replace").splitlines()

    def end(self):
        """SIGINT, as Ctrl-C; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise


class Bystander:
    """A node of the test: keeps what it hears, calls services."""

    def __init__(self):
        self.node = rclpy.create_node("bystander")
        self.heard = defaultdict(list)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self._ending = False
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self):
        while not self._ending:
            self._executor.spin_once(timeout_sec=0.05)

    def listen(self, kind, topic):
        self.node.create_subscription(kind, topic, self.heard[topic].append, QoSProfile(depth=500))
        return self.heard[topic]

    def call(self, kind, name, request=None):
        client = self.node.create_client(kind, name)
        assert client.wait_for_service(PATIENCE_S), name
        future = client.call_async(request or kind.Request())
        wait_until(future.done, f"answer of {name}")
        self.node.destroy_client(client)
        return future.result()

    def set_parameters(self, node, **values):
        request = SetParameters.Request(
            parameters=[Parameter(k, value=v).to_parameter_msg() for k, v in values.items()]
        )
        return self.call(SetParameters, f"/{node}/set_parameters", request).results

    def transition(self, node, label):
        request = ChangeState.Request()
        request.transition.label = label
        return self.call(ChangeState, f"/{node}/change_state", request).success

    def state(self, node):
        return self.call(GetState, f"/{node}/get_state").current_state.label

    def close(self):
        self._ending = True
        self._thread.join()
        self._executor.shutdown()
        self.node.destroy_node()


def wait_until(condition, what, patience_s=PATIENCE_S):
    """Returns what the condition returned; fails when it stays false."""
    deadline_s = time.monotonic() + patience_s
    while time.monotonic() < deadline_s:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    pytest.fail(f"waited {patience_s:g} s for {what}")


@pytest.fixture
def bystander():
    rclpy.init()
    bystander = Bystander()
    yield bystander
    bystander.close()
    rclpy.try_shutdown()


@pytest.fixture
def start(tmp_path):
    """Starts NodeSpecs as processes; whatever still runs is ended, last started first."""
    running = []

    def start_node(spec):
        running.append(NodeProcess(spec, tmp_path / f"{spec.name}.log"))
        return running[-1]

    yield start_node
    for process in reversed(running):
        process.end()
