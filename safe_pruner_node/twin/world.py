"""What the twin node simulates: an episode of a task, or a scene in which nothing is asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from safe_pruner_node.robot.config import RobotConfig
from safe_pruner_node.twin.cameras import Resolution
from safe_pruner_node.twin.sim import TwinSim
from safe_pruner_node.twin.tasks.episode import Episode
from safe_pruner_node.twin.tasks.registry import build_task
from safe_pruner_node.types import FloatArray

MAX_ADVANCE_S = 0.01
"""Longest time between two looks of the judge: a control period at the twin's 100 Hz, s."""


@dataclass(frozen=True)
class TaskStatus:
    """An episode as its judge sees it.

    Attributes:
        task: Name of the task.
        seed: Decides the whole episode.
        prompt: What a policy is told.
        progress: Furthest stage so far, 0 to 100.
        success: The job has been done.
        success_s: When it was, simulated time since the episode began, s; None before.
        elapsed_s: Simulated time since the episode began, s.
        time_limit_s: What a policy has, from when it takes the arms, s.
    """

    task: str
    seed: int
    prompt: str
    progress: float
    success: bool
    success_s: float | None
    elapsed_s: float
    time_limit_s: float


class World:
    """The robot among things, commanded part by part.

    Args:
        robot: Layout, and the home pose of the driven parts.
        resolutions: Resolution of each camera's images.
        scene: What stands around the robot where there is no task.
        task: Name of a task, which brings its own scene; empty for none.
        seed: Of the scene, or of the task's episode.

    Raises:
        ConfigError: Unknown scene or task.
    """

    def __init__(
        self,
        robot: RobotConfig,
        resolutions: Mapping[str, Resolution],
        *,
        scene: str = "table",
        task: str = "",
        seed: int = 0,
    ) -> None:
        layout = robot.layout
        self._driven = tuple(s.part for s in layout.segments if s.commanded)
        home = {part: robot.all_parts[part].home for part in self._driven}
        self._episode: Episode | None = None
        if task:
            chosen = build_task(task, seed)
            self.sim = chosen.build_sim(home=home, resolutions=resolutions)
            self._episode = Episode(chosen, robot, self.sim)
        else:
            self.sim = TwinSim(scene, seed, home=home, resolutions=resolutions)
        self._slices = layout.slices
        self._command = layout.join(self.sim.home)
        self._success_s: float | None = None

    def set_command(self, part: str, positions: FloatArray) -> None:
        """Position targets of one part, from the next :meth:`advance` on.

        Args:
            part: ``astribot_arm_left``...
            positions: Robot units, [dof of the part], finite.
        """
        if self._episode is not None and part in self._driven:
            self._command[self._slices[part]] = positions
        else:
            self.sim.set_command(part, positions)

    def advance(self, dt_s: float) -> None:
        """Lets time pass; the judge looks at least every :data:`MAX_ADVANCE_S`."""
        episode = self._episode
        if episode is None:
            self.sim.step(dt_s)
            return
        looks = max(1, math.ceil(dt_s / MAX_ADVANCE_S - 1e-9))
        for _ in range(looks):
            episode.advance(self._command, dt_s / looks)
            if episode.success and self._success_s is None:
                self._success_s = episode.time_s

    @property
    def status(self) -> TaskStatus | None:
        """How the episode stands; None without a task."""
        episode = self._episode
        if episode is None:
            return None
        return TaskStatus(
            task=episode.task.name,
            seed=episode.task.seed,
            prompt=episode.task.prompt,
            progress=episode.progress,
            success=self._success_s is not None,
            success_s=self._success_s,
            elapsed_s=episode.time_s,
            time_limit_s=episode.task.time_limit_s,
        )
