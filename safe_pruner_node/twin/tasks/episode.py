"""One episode in the twin through the policy's interface: state vector in, targets out."""

from __future__ import annotations

import numpy as np

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.config import RobotConfig
from safe_pruner_node.twin.sim import TwinSim
from safe_pruner_node.twin.tasks.base import Task
from safe_pruner_node.types import FloatArray

COMMANDS_PER_ACTION = 8
"""Joint commands between two actions: 240 Hz at 30 actions per second."""


class Episode:
    """A task in its own twin, advanced one action at a time.

    Between actions the targets are interpolated, as the control process does with a chunk.

    Args:
        task: What is to be done.
        robot: Layout, action rate and limits; the limits are enforced on the positions.
        sim: The task's twin; by default a new one at the physics step of the twin.
    """

    def __init__(self, task: Task, robot: RobotConfig, sim: TwinSim | None = None) -> None:
        self.task = task
        self.robot = robot
        self.sim = task.build_sim() if sim is None else sim
        self.dt_s = 1.0 / robot.policy.action_rate_hz
        self.progress = 0.0
        self.success = False
        self._target = self.state()

    @property
    def over(self) -> bool:
        """The job is done, or the time is up."""
        return self.success or self.sim.time_s >= self.task.time_limit_s

    def state(self) -> FloatArray:
        """Measured positions in layout order, robot units, [dof]."""
        layout = self.robot.layout
        parts = (segment.part for segment in layout.segments)
        return layout.join({part: self.sim.joint_state(part).position for part in parts})

    def step(self, action: FloatArray) -> None:
        """Goes to an action within one action period.

        Args:
            action: Absolute targets in layout order, robot units, [dof]; beyond a position
                limit is clamped to it.

        Raises:
            ConfigError: Wrong size, or not finite.
        """
        layout, limits = self.robot.layout, self.robot.limits
        if action.shape != (layout.dof,) or not np.isfinite(action).all():
            raise ConfigError("action", layout.name, action.tolist(), f"{layout.dof} finite values")
        start, end = self._target, np.clip(action, limits.min_position, limits.max_position)
        for k in range(1, COMMANDS_PER_ACTION + 1):
            target = start + (end - start) * (k / COMMANDS_PER_ACTION)
            for segment in layout.segments:
                if segment.commanded:
                    self.sim.set_command(segment.part, target[layout.slices[segment.part]])
            self.sim.step(self.dt_s / COMMANDS_PER_ACTION)
            self.task.watch(self.sim)
        self._target = end
        self.progress = self.task.progress(self.sim)
        self.success = self.task.is_success(self.sim)
