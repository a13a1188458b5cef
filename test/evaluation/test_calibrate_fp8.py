"""Calibration for FP8: what it measures and compares on, and that the engine takes its file."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from safe_pruner_node.demonstrations.dataset import open_dataset
from safe_pruner_node.demonstrations.features import camera_feature
from safe_pruner_node.demonstrations.schema import DatasetSpec
from safe_pruner_node.demonstrations.writer import DatasetWriter
from safe_pruner_node.engine.build import load_policy
from safe_pruner_node.engine.fp8 import is_fp8, layer_groups
from safe_pruner_node.engine.fp8_calibration import read_calibration
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.calibrate_fp8 import CalibrateFp8Options, calibrate, halves, run
from safe_pruner_node.pruning.settings import load_preset
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import load_robot_config

LENGTHS = (4, 6, 5)


@pytest.fixture(scope="module")
def robot():
    return load_robot_config(resource("config/astribot_s1.yaml"))


@pytest.fixture(scope="module")
def record(tmp_path_factory, robot):
    """Writes so many episodes; the frame's number is its shade, the episode's its prompt."""

    def write(lengths):
        out = tmp_path_factory.mktemp("fp8") / "dataset"
        spec = DatasetSpec(
            fps=robot.policy.action_rate_hz,
            robot_type="astribot_s1",
            joint_names=robot.layout.joint_names,
            cameras={camera_feature(c.name): (36, 64) for c in robot.cameras},
            environment_names=("x",),
        )
        with DatasetWriter(out, spec) as writer:
            for number, length in enumerate(lengths):
                shades = (40 + 30 * np.arange(length)).astype(np.uint8)
                writer.add_episode(
                    [{k: np.full((36, 64, 3), s, np.uint8) for k in spec.cameras} for s in shades],
                    state=robot.home + 0.01 * np.arange(length)[:, None],
                    action=np.tile(robot.home, (length, 1)),
                    environment=np.zeros((length, 1)),
                    prompt=f"task {number}",
                    details={},
                )
            writer.finish()
        return out

    return write


@pytest.fixture(scope="module")
def dataset(record):
    return record(LENGTHS)


@pytest.fixture
def policy(small_checkpoint):
    settings = EngineSettings(
        small_checkpoint, device="cpu", dtype="bf16", pruner=load_preset(None, "vanilla")
    )
    return *load_policy(settings), settings


def test_measured_and_compared_are_of_different_episodes(dataset, robot):
    measured, tested = halves(open_dataset(dataset), robot, 3, 50)
    assert [inputs.prompt for inputs in measured] == ["task 0", "task 2", "task 2"]
    assert [inputs.prompt for inputs in tested] == ["task 1"] * 6
    for k, inputs in enumerate(tested):
        assert list(inputs.images) == [camera.name for camera in robot.cameras]
        for image in inputs.images.values():
            assert abs(int(image[18, 32, 0]) - (40 + 30 * k)) <= 3
        state = robot.layout.to_policy_state(robot.home + 0.01 * k)
        np.testing.assert_allclose(inputs.state, state, atol=1e-5)


def test_one_episode_is_not_enough(record, robot):
    with pytest.raises(ConfigError, match="episodes: found 1, expected at least 2"):
        halves(open_dataset(record((5,))), robot, 3, 3)


def test_what_it_finds_is_what_the_engine_reads(dataset, robot, policy, tmp_path):
    checkpoint, tokenizer, settings = policy
    measured, tested = halves(open_dataset(dataset), robot, 4, 3)
    found = calibrate(checkpoint, tokenizer, settings, measured, tested)
    assert is_fp8(checkpoint.model)
    assert (found.inputs, found.tested) == (4, 3)
    assert found.largest.keys() == layer_groups(checkpoint.model).keys()
    assert 0.9 < found.cosine < 1 - 1e-7
    copy = shutil.copytree(checkpoint.directory, tmp_path / "copy")
    accepted = replace(found, cosine=0.9995)  # a random policy's own is its own matter
    accepted.write(copy)
    assert read_calibration(copy, layer_groups(checkpoint.model)) == accepted


def test_a_policy_that_gives_nan_is_not_let_through(dataset, robot, policy):
    checkpoint, tokenizer, settings = policy
    measured, tested = halves(open_dataset(dataset), robot, 2, 2)
    checkpoint.model.action_out_proj.bias.data[0] = torch.nan
    assert not calibrate(checkpoint, tokenizer, settings, measured, tested).cosine >= 0.0


def test_without_a_gpu_it_is_one_line(dataset, small_checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="dtype: found fp8, on device cpu"):
        run(CalibrateFp8Options(small_checkpoint, dataset, inputs=1, tested=1))
