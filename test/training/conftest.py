"""A synthetic S1 data set whose actions follow from what is seen: quick to learn."""

import numpy as np
import pytest

from safe_pruner_node.demonstrations.features import camera_feature
from safe_pruner_node.demonstrations.schema import DatasetSpec
from safe_pruner_node.demonstrations.writer import DatasetWriter
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import load_robot_config

LENGTHS = (24, 31, 24, 40)


@pytest.fixture(scope="session")
def robot():
    return load_robot_config(resource("config/astribot_s1.yaml"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, robot):
    """Four episodes: the arms sway about home, then the grippers close."""
    out = tmp_path_factory.mktemp("training") / "s1"
    spec = DatasetSpec(
        fps=robot.policy.action_rate_hz,
        robot_type="astribot_s1",
        joint_names=robot.layout.joint_names,
        cameras={camera_feature(c.name): (36, 64) for c in robot.cameras},
        environment_names=("x", "y", "z"),
    )
    rng = np.random.default_rng(0)
    phase = rng.uniform(0, 6, 16)
    with DatasetWriter(out, spec) as writer:
        for number, length in enumerate(LENGTHS):
            time = np.arange(length)[:, None]
            sway = 0.1 * np.sin(0.2 * time + phase)
            action = np.where(robot.layout.gripper, 100.0 * (time > 12), robot.home + sway)
            shade = (40 + 4 * np.arange(length)).astype(np.uint8)
            writer.add_episode(
                [{key: np.full((36, 64, 3), s, np.uint8) for key in spec.cameras} for s in shade],
                state=action + rng.normal(0, 0.003, action.shape),
                action=action,
                environment=np.tile([0.1 * number, 0.5, -0.2], (length, 1)),
                prompt="wave" if number % 2 else "wave the other way",
                details={},
            )
        writer.finish()
    return out
