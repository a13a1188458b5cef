"""A full-token episode in the twin, recorded: attention at every query, events at every tick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import mujoco
import numpy as np

from safe_pruner_node.engine.build import load_policy
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.action_error import measure_actions
from safe_pruner_node.evaluation.gripper_events import gripper_events
from safe_pruner_node.evaluation.results import pruner_to_json
from safe_pruner_node.evaluation.rollout import Instant, RolloutSettings, roll_out
from safe_pruner_node.evaluation.saliency_record import SaliencyRecord
from safe_pruner_node.evaluation.saliency_recorder import QuerySaliency, RecordingEngine
from safe_pruner_node.evaluation.saliency_replay import Replay
from safe_pruner_node.inference.overlay import encode_jpeg
from safe_pruner_node.inference.policy_step import InputError, PolicyStep
from safe_pruner_node.pruning.settings import PrunerSettings
from safe_pruner_node.robot.config import RobotConfig
from safe_pruner_node.robot.layout import Layout
from safe_pruner_node.twin.sim import TwinSim
from safe_pruner_node.twin.tasks.registry import build_task
from safe_pruner_node.twin.tasks.seeds import Split, episode_seed
from safe_pruner_node.types import FloatArray, host_image


class SaliencyBench:
    """A recording engine and what its episodes share.

    Args:
        engine: Checkpoint, device, threads; its pruner is the SAFE that is recorded for.
        robot: The robot file, read.
        rollout: Rates and times.

    Raises:
        ConfigError: Checkpoint, tokenizer, device, pruner and robot do not fit.
    """

    def __init__(
        self, engine: EngineSettings, robot: RobotConfig, rollout: RolloutSettings
    ) -> None:
        checkpoint, tokenizer = load_policy(engine)
        self.safe = engine.pruner
        self.pruner = recording_settings(engine.pruner)
        self.rollout = rollout
        self.depth = checkpoint.config.vlm.depth
        recording = replace(engine, pruner=self.pruner)
        self.engine = RecordingEngine(checkpoint, tokenizer, recording)
        self.policy = PolicyStep(self.engine, robot)
        self.policy.rehearse()
        self.noise_shape = (checkpoint.config.horizon, checkpoint.config.action_dim)

    def record(
        self,
        task_name: str,
        split: Split,
        index: int,
        about: dict[str, Any],
        rhos: Sequence[float],
    ) -> SaliencyRecord:
        """Run and record one episode.

        Args:
            task_name: Name of the task.
            split: Whose seeds.
            index: Number within the split.
            about: Goes into the record as it is.
            rhos: At which the chunks of the selections are measured.

        Raises:
            ConfigError: The pruner or the inputs do not fit the model.
        """
        seed = episode_seed(split, index)
        task, layout = build_task(task_name, seed), self.policy.robot.layout
        witness = _Witness(layout, build_task(task_name, seed).build_sim())
        try:
            rollout = roll_out(
                self.policy,
                self.pruner,
                task,
                index,
                self.rollout,
                noise_shape=self.noise_shape,
                watch=witness.watch,
            )
        except InputError as error:
            expected = "inputs that fit"
            raise ConfigError("episode", f"{task_name} {index}", error, expected) from None
        queries = list(self.engine.queries)
        if not queries:
            raise ConfigError("episode", f"{task_name} {index}", "no policy query", "at least one")
        time_s = np.array([query.time_s for query in rollout.queries])
        tick_time_s, gripper = np.array(witness.time_s), np.array(witness.gripper, np.float32)
        moment = _moment(time_s, tick_time_s, gripper)
        tokens = rollout.queries[0].report.visual_tokens
        images = queries[0].inputs.images
        record = SaliencyRecord(
            about={
                "task": task.name,
                "prompt": task.prompt,
                "split": split,
                "index": index,
                "seed": seed,
                "success": rollout.success,
                "progress": rollout.progress,
                "seconds": rollout.seconds,
                "cameras": [[name, int(tokens[name])] for name in images],
                "resolution": {name: list(image.shape[:2]) for name, image in images.items()},
                "hands": witness.hands,
                "moment": moment,
                "layer": self.pruner.layer,
                "softmax_over": self.pruner.softmax_over,
                "denoise_steps": self.pruner.denoise_steps,
                "rollout": asdict(self.rollout),
                **about,
            },
            time_s=time_s,
            policy_state=np.stack([query.inputs.state for query in queries]),
            z_hat=np.stack([query.z_hat for query in queries]),
            early={
                name: np.stack([query.early[name] for query in queries])
                for name in queries[0].early
            },
            deep=np.stack([query.deep for query in queries]),
            images={
                name: [encode_jpeg(host_image(query.inputs.images[name])) for query in queries]
                for name in images
            },
            prefill=self._prefill_maps(queries[moment]),
            tick_time_s=tick_time_s,
            gripper=gripper,
            hand_speed_m_s=witness.speed_m_s().astype(np.float32),
            stages=np.array(witness.stages),
        )
        self.engine.set_pruner(self.pruner)
        actions = measure_actions(Replay(record, self.safe), self.engine, queries, layout, rhos)
        actions["pruner"] = pruner_to_json(self.safe)
        return replace(record, about={**record.about, "actions": actions})

    def _prefill_maps(self, query: QuerySaliency) -> Any:  # noqa: ANN401 - an array
        """Text-to-visual saliency of every VLM layer that has queries, at one query."""
        maps = []
        for layer in range(1, self.depth):
            self.engine.set_pruner(replace(self.pruner, layer=layer))
            self.engine.step(query.inputs, query.noise)
            maps.append(self.engine.queries[-1].early["text"])
        return np.stack(maps)


def recording_settings(pruner: PrunerSettings) -> PrunerSettings:
    """A preset as what is recorded for: its layer and softmax, at no pruning ratio."""
    return replace(pruner, rho=0.0, camera_floor=0)


def _moment(time_s: FloatArray, tick_time_s: FloatArray, gripper: Any) -> int:  # noqa: ANN401
    """The last query before a gripper first closes; the middle one when none does."""
    closing = [event.time_s for event in gripper_events(tick_time_s, gripper) if event.closes]
    if not closing:
        return len(time_s) // 2
    return max(0, int(np.searchsorted(time_s, min(closing), side="right")) - 1)


@dataclass
class _Witness:
    """Notes what was commanded in every control period, and where progress changed."""

    layout: Layout
    sim: TwinSim
    time_s: list[float] = field(default_factory=list)
    gripper: list[FloatArray] = field(default_factory=list)
    pinch: list[FloatArray] = field(default_factory=list)
    stages: list[tuple[float, float]] = field(default_factory=lambda: [(0.0, 0.0)])

    def __post_init__(self) -> None:
        segments, model = self.layout.segments, self.sim.model
        grippers = [segment.part for segment in segments if segment.gripper]
        self.hands = [part.rsplit("_", 1)[1] for part in grippers]
        self._grippers = [self.layout.slices[part] for part in grippers]
        self._sites = [model.site(f"{part}_pinch").id for part in grippers]
        arms = [segment.part for segment in segments if segment.commanded and not segment.gripper]
        self._moved = np.concatenate(
            [np.arange(self.layout.dof)[self.layout.slices[p]] for p in arms]
        )
        names = [self.layout.joint_names[i] for i in self._moved]
        self._qpos = np.array([model.joint(name).qposadr[0] for name in names])

    def watch(self, instant: Instant) -> None:
        """Called after every control period."""
        if instant.progress != self.stages[-1][1]:
            self.stages.append((instant.time_s, instant.progress))
        command = instant.output.position
        if command is None:
            return
        data = self.sim.data
        data.qpos[self._qpos] = command[self._moved]
        mujoco.mj_kinematics(self.sim.model, data)
        self.time_s.append(instant.time_s)
        self.gripper.append(np.array([command[span].mean() for span in self._grippers]))
        self.pinch.append(np.array([data.site_xpos[site] for site in self._sites]))

    def speed_m_s(self) -> FloatArray:
        """Speed of both pinch points as commanded, [T, 2]."""
        if len(self.time_s) < 2:
            return np.zeros((len(self.time_s), len(self.hands)))
        velocity = np.gradient(np.array(self.pinch), np.array(self.time_s), axis=0)
        return np.asarray(np.linalg.norm(velocity, axis=-1))
