"""What every task is: a seeded scene, a sentence, a judge in code, and a time limit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import mujoco
import numpy as np

from safe_pruner_node.twin.sim import TwinSim
from safe_pruner_node.types import FloatArray

Point = tuple[float, float]

ROBOT_PREFIX = "astribot_"


class Task(ABC):
    """One episode of a task, all of it decided by the seed.

    Args:
        seed: Places, colours, lights and jitters cameras (:func:`seeds.episode_seed`).
    """

    name: ClassVar[str]
    time_limit_s: ClassVar[float]

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._best = 0.0

    @property
    @abstractmethod
    def prompt(self) -> str:
        """What the policy is told."""

    def watch(self, sim: TwinSim) -> None:  # noqa: B027 - most tasks have nothing to watch
        """Sees every joint command carried out, for tasks that are decided in passing."""

    @abstractmethod
    def is_success(self, sim: TwinSim) -> bool:
        """Whether the job is done; true for good, not only in passing."""

    @abstractmethod
    def landmarks(self, sim: TwinSim) -> FloatArray:
        """Where the thing to take is and where it goes, world, m, [2, 3]: privileged."""

    def progress(self, sim: TwinSim) -> float:
        """The furthest stage reached so far, 0 to 100; 100 is success. Call it every tick."""
        stage = 100.0 if self.is_success(sim) else self._stage(sim)
        self._best = max(self._best, stage)
        return self._best

    def build_sim(self, **options: object) -> TwinSim:
        """A twin with this episode's scene; options are :class:`TwinSim`'s."""
        return TwinSim(self.furnish, self.seed, **options)  # type: ignore[arg-type]

    def furnish(self, spec: mujoco.MjSpec, rng: np.random.Generator) -> tuple[str, ...]:
        """Adds the task's things and jitters light and cameras; returns the movable bodies."""
        objects = self._furnish(spec, rng)
        _jitter_light(spec, rng)
        _jitter_cameras(spec, rng)
        return objects

    @abstractmethod
    def _furnish(self, spec: mujoco.MjSpec, rng: np.random.Generator) -> tuple[str, ...]:
        """Adds the task's things; returns the movable bodies."""

    @abstractmethod
    def _stage(self, sim: TwinSim) -> float:
        """Present stage short of success, 0 to below 100."""


def position(sim: TwinSim, body: str) -> FloatArray:
    """Origin of a body in the world, m, [3]."""
    return np.array(sim.data.body(body).xpos)


def at_rest(sim: TwinSim, body: str, *, speed_m_s: float = 0.05) -> bool:
    """Whether a free body moves slower than ``speed_m_s``."""
    velocity = sim.data.joint(body).qvel[:3]
    return bool(np.linalg.norm(velocity) < speed_m_s)


def touched_by_robot(sim: TwinSim, body: str) -> bool:
    """Whether any part of the robot is in contact with a body."""
    model = sim.model
    wanted = model.body(body).id
    for contact in sim.data.contact:
        pair = [int(model.geom_bodyid[geom]) for geom in contact.geom]
        if wanted in pair:
            other = pair[1 - pair.index(wanted)]
            if model.body(other).name.startswith(ROBOT_PREFIX):
                return True
    return False


def jittered(rgba: tuple[float, ...], rng: np.random.Generator, amount: float = 0.06) -> tuple:
    """A colour off by at most ``amount`` per channel, still called by the same name."""
    colour = np.clip(np.array(rgba[:3]) + rng.uniform(-amount, amount, 3), 0, 1)
    return (*colour.tolist(), 1.0)


def _jitter_light(spec: mujoco.MjSpec, rng: np.random.Generator) -> None:
    tint = rng.uniform(0.95, 1.05, 3)
    for light in spec.lights:
        light.diffuse = np.asarray(light.diffuse) * rng.uniform(0.75, 1.2) * tint
        light.dir = np.asarray(light.dir) + rng.uniform(-0.15, 0.15, 3)
    headlight = spec.visual.headlight
    headlight.ambient = np.asarray(headlight.ambient) * rng.uniform(0.9, 1.08) * tint


def _jitter_cameras(spec: mujoco.MjSpec, rng: np.random.Generator) -> None:
    """A mount is never quite where the drawing says: 4 mm and half a degree."""
    for camera in spec.cameras:
        camera.pos = np.asarray(camera.pos) + rng.uniform(-0.004, 0.004, 3)
        turn, turned = np.zeros(4), np.zeros(4)
        mujoco.mju_axisAngle2Quat(turn, _unit(rng.normal(size=3)), np.radians(rng.uniform(0, 0.5)))
        mujoco.mju_mulQuat(turned, np.asarray(camera.quat), turn)
        camera.quat = turned


def _unit(vector: FloatArray) -> FloatArray:
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float64)
