"""A worker client whose events can be waited for, and observations to feed it."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the spawned worker imports worker_fakes by name

from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.inference.client import WorkerClient
from safe_pruner_node.inference.protocol import WorkerSettings
from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.types import CameraFrame, Observation

ROBOT_CONFIG = Path(__file__).parents[2] / "config" / "astribot_s1.yaml"
PATIENCE_S = 60.0  # only ever reached by a failing test


class Watched:
    """A client with its events kept."""

    def __init__(self, settings, engine_factory):
        self.events = []
        self.submit_s = []
        self._changed = threading.Condition()
        self.client = WorkerClient(settings, self._on_event, engine_factory=engine_factory)

    def _on_event(self, event):
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait_for(self, kind, count=1):
        """The count-th event of a kind."""

        def found():
            return [event for event in self.events if isinstance(event, kind)]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= count, PATIENCE_S), self.events
        return found()[count - 1]

    def submit(self, observation, epoch=0, **kwargs):
        start_s = time.perf_counter()
        accepted = self.client.submit(observation, epoch, **kwargs)
        self.submit_s.append(time.perf_counter() - start_s)
        return accepted


@pytest.fixture(scope="session")
def robot():
    return load_robot_config(ROBOT_CONFIG)


@pytest.fixture
def settings(tmp_path):
    return WorkerSettings(
        engine=EngineSettings(checkpoint=tmp_path, device="cpu", threads=1),
        robot_config=ROBOT_CONFIG,
        heartbeat_s=0.1,
        hang_timeout_s=2.0,
        start_timeout_s=PATIENCE_S,
        max_respawns=2,
        respawn_backoff_s=0.05,
        frame_bytes_max=4 * 1024 * 1024,
    )


@pytest.fixture
def launch(settings):
    """Starts a watched client; everything started is stopped at the end."""
    with contextlib.ExitStack() as stack:

        def start(engine_factory, worker_settings=settings):
            watched = Watched(worker_settings, engine_factory)
            stack.callback(watched.client.stop)
            watched.client.start()
            return watched

        yield start


@pytest.fixture(scope="session", name="observe")
def observe_fixture(robot):
    """Makes observations of the robot at home."""
    return functools.partial(observe, robot)


def observe(robot, prompt="stand still", **changed):
    """An observation: grey gradients as JPEG, arms at home."""
    frames = {camera.name: jpeg_frame(camera.width, camera.height) for camera in robot.cameras}
    return Observation(
        frames={**frames, **changed},
        state=robot.home,
        prompt=prompt,
        time_s=12.5,
        camera_stamp_ns=777,
    )


@functools.cache
def jpeg_frame(width, height):
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    _, data = cv2.imencode(".jpg", np.tile(ramp, (height, 1)))
    return frame_of(data.tobytes())


def frame_of(data, encoding="jpeg"):
    return CameraFrame(data, encoding, 0, 0, 0, stamp_ns=777, received_ns=1)
