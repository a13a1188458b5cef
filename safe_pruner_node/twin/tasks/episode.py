"""One episode in the twin through the policy's interface: state vector in, commands out."""

from __future__ import annotations

import numpy as np

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.config import RobotConfig
from safe_pruner_node.twin.sim import TwinSim
from safe_pruner_node.twin.tasks.base import Task
from safe_pruner_node.types import FloatArray


class Episode:
    """A task in its own twin, advanced one control period at a time.

    Neither limits nor interpolation: that is the caller's, who filters what an expert or a policy
    wants exactly as on the robot.

    Args:
        task: What is to be done.
        robot: Layout of the vectors.
        sim: The task's twin; by default a new one at the physics step of the twin.

    Attributes:
        progress: Furthest stage so far, 0 to 100.
        success: Whether the job is done.
    """

    def __init__(self, task: Task, robot: RobotConfig, sim: TwinSim | None = None) -> None:
        self.task = task
        self.robot = robot
        self.sim = task.build_sim() if sim is None else sim
        self.progress = 0.0
        self.success = False

    @property
    def time_s(self) -> float:
        """Simulated time since the start, s."""
        return self.sim.time_s

    @property
    def over(self) -> bool:
        """The job is done, or the time is up."""
        return self.success or self.time_s >= self.task.time_limit_s

    def state(self) -> FloatArray:
        """Measured positions in layout order, robot units, [dof]."""
        layout = self.robot.layout
        parts = (segment.part for segment in layout.segments)
        return layout.join({part: self.sim.joint_state(part).position for part in parts})

    def advance(self, command: FloatArray, dt_s: float) -> None:
        """Carries out one joint command and judges what came of it.

        Args:
            command: Absolute targets in layout order, robot units, [dof].
            dt_s: How long the command stays in force, s.

        Raises:
            ConfigError: Wrong size, or not finite.
        """
        layout = self.robot.layout
        if command.shape != (layout.dof,) or not np.isfinite(command).all():
            expected = f"{layout.dof} finite values"
            raise ConfigError("command", layout.name, command.tolist(), expected)
        for segment in layout.segments:
            if segment.commanded:
                self.sim.set_command(segment.part, command[layout.slices[segment.part]])
        self.sim.step(dt_s)
        self.task.watch(self.sim)
        self.progress = self.task.progress(self.sim)
        self.success = self.task.is_success(self.sim)
