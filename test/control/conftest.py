"""Joints small enough to think about, and a supervisor with the simulated robot's plumbing."""

import numpy as np
import pytest

from safe_pruner_node.control.limits import JointLimits
from safe_pruner_node.control.settings import ControlSettings
from safe_pruner_node.control.supervisor import ControlSupervisor
from safe_pruner_node.types import ActionChunk

DT = 0.01
ACTION_DT = 1.0 / 30.0


@pytest.fixture
def limits():
    """An arm joint, a narrow one, a gripper in its own units."""
    return JointLimits(
        min_position=np.array([-2.0, -0.1, 0.0]),
        max_position=np.array([2.0, 1.5, 100.0]),
        max_velocity=np.array([2.0, 4.0, 400.0]),
        max_acceleration=np.array([8.0, 20.0, 4000.0]),
        max_jerk=np.array([80.0, 1000.0, 80000.0]),
    )


class Rig:
    """A supervisor on a clock of its own, with joints measured where the test says."""

    def __init__(self, limits, **changes):
        self.limits = limits
        self.home = np.array([0.2, 0.5, 30.0])
        given = {
            "dt_s": DT,
            "first_action_tolerance": np.array([0.1, 0.1, 20.0]),
            "starvation_timeout_s": 0.5,
            "first_chunk_timeout_s": 1.0,
            **changes,
        }
        self.settings = ControlSettings(**given)
        self.supervisor = ControlSupervisor(self.settings, limits)
        self.now = 100.0
        self.measured = self.home
        self.outputs = []

    def tick(self, count=1, measure=True):
        """So many control periods; returns the last output."""
        for _ in range(count):
            self.now += DT
            if measure:
                self.supervisor.on_state(self.measured, self.now)
            self.outputs.append(self.supervisor.tick(self.now))
        return self.outputs[-1]

    def chunk(self, goal=None, horizon=30, time_s=None, epoch=None, begin=None):
        """A straight line from where the command is to a goal."""
        last = self.outputs[-1].position if self.outputs else self.home
        begin = last if begin is None else begin
        goal = begin if goal is None else goal
        share = np.linspace(0.0, 1.0, horizon)[:, None]
        actions = begin + share * (np.asarray(goal, dtype=float) - begin)
        time_s = self.now if time_s is None else time_s
        epoch = self.supervisor.epoch if epoch is None else epoch
        return ActionChunk(actions, time_s, ACTION_DT, epoch)

    def offer(self, *args, **kwargs):
        return self.supervisor.on_chunk(self.chunk(*args, **kwargs), self.now)

    def start(self):
        """To the moment before the first chunk."""
        self.supervisor.on_worker_ready(self.now)
        self.tick()
        outcome = self.supervisor.start(self.now)
        assert outcome.ok, outcome.message
        return self

    def run(self):
        """To POLICY."""
        self.start()
        assert self.offer().ok
        self.tick()
        return self

    @property
    def commands(self):
        return np.array([o.position for o in self.outputs if o.position is not None])


@pytest.fixture
def rig(limits):
    return lambda **changes: Rig(limits, **changes)
