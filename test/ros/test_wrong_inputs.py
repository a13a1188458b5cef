"""Wrong inputs at the node: one clear line, a failed configure, and a node that can do it again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import rclpy
import yaml
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from safetensors.numpy import load_file, save_file
from std_msgs.msg import String

from safe_pruner_node.bringup import BringupOptions, NodeSpec, node_specs

sys.path.insert(0, str(Path(__file__).parent))
from conftest import Bystander, NodeProcess, wait_until

CONFIG = Path(__file__).parents[2] / "config"
CALIBRATION = Path(__file__).parents[2] / "calibration"
HEAD_TOPIC = "/astribot_camera/head_rgbd/color_compress/compressed"


def policy_spec(checkpoint, **changed):
    (spec,) = node_specs(BringupOptions(checkpoint=str(checkpoint), prompt="x", worker_threads=1))
    return NodeSpec(
        spec.executable, spec.name, {**spec.parameters, "self_activate": False, **changed}
    )


@pytest.fixture(scope="module")
def desk(tmp_path_factory, small_checkpoint):
    """One policy node for the whole table, as a person at a desk would use it."""
    rclpy.init()
    bystander = Bystander()
    log = tmp_path_factory.mktemp("desk") / "safe_pruner.log"
    process = NodeProcess(policy_spec(small_checkpoint), log)
    yield bystander, process
    process.end()
    bystander.close()
    rclpy.try_shutdown()


def good(checkpoint):
    """Parameters that configure."""
    return {
        "checkpoint": str(checkpoint),
        "robot_config": "",
        "pruners_config": "",
        "pruner": "robot",
        "prompt": "x",
        "tokenizer": "",
        "asset_id": "",
    }


class Files:
    """Copies of the good files, each to be spoiled in one place."""

    def __init__(self, folder, checkpoint):
        self.checkpoint = folder / "checkpoint"
        shutil.copytree(checkpoint, self.checkpoint)
        shutil.copytree(CONFIG, folder / "config")
        shutil.copytree(CALIBRATION, folder / "calibration")
        self.robot_config = folder / "config" / "astribot_s1.yaml"
        self.pruners_config = folder / "config" / "pruners.yaml"
        self.calibration = folder / "calibration"

    def edit(self, file, *keys, value=None, remove=False):
        """Change or remove one key of a YAML or JSON file."""
        document = yaml.safe_load(file.read_text())
        target = document
        for key in keys[:-1]:
            target = target[key]
        if remove:
            del target[keys[-1]]
        else:
            target[keys[-1]] = value
        text = json.dumps(document) if file.suffix == ".json" else yaml.safe_dump(document)
        file.write_text(text)

    def edit_stats(self, change):
        (file,) = self.checkpoint.glob("assets/*/norm_stats.json")
        document = json.loads(file.read_text())
        change(document["norm_stats"])
        file.write_text(json.dumps(document))

    def edit_tensors(self, change):
        file = self.checkpoint / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)


def missing_checkpoint(files):
    shutil.rmtree(files.checkpoint)


def missing_weights(files):
    (files.checkpoint / "model.safetensors").unlink()


def truncated_weights(files):
    file = files.checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def missing_tensor(files):
    files.edit_tensors(lambda tensors: tensors.pop("action_in_proj.weight"))


def wrong_shape(files):
    def change(tensors):
        tensors["action_in_proj.weight"] = tensors["action_in_proj.weight"][:, :7].copy()

    files.edit_tensors(change)


def broken_config(files):
    (files.checkpoint / "config.json").write_text("{ not json")


def stats_of_the_wrong_size(files):
    def change(stats):
        stats["state"] = {key: values[:15] for key, values in stats["state"].items()}

    files.edit_stats(change)


def flat_quantiles(files):
    def change(stats):
        stats["actions"]["q01"][3] = stats["actions"]["q99"][3]

    files.edit_stats(change)


def no_stats(files):
    shutil.rmtree(files.checkpoint / "assets")


def no_tokenizer(files):
    (files.checkpoint / "tokenizer.model").unlink()


def another_layout(files):
    files.edit(files.robot_config, "layout", value="s1_25_parts")


def unknown_layout(files):
    files.edit(files.robot_config, "layout", value="s1_17")


def missing_robot_file(files):
    files.robot_config.unlink()


def unknown_key(files):
    files.edit(files.robot_config, "control", "rate_hertz", value=250)


def unknown_joint_part(files):
    files.edit(files.robot_config, "layouts", "s1_16", value=["astribot_arm_middle"])


def swapped_limits(files):
    files.edit(
        files.robot_config,
        "hardware",
        "astribot_arm_left",
        "part_urdf",
        "min_position",
        value=[3.1, 0.46, 3.1, 2.61, 2.56, 0.76, 1.53],
    )


def faster_than_the_hardware(files):
    files.edit(
        files.robot_config,
        "limits",
        "parts",
        "astribot_arm_left",
        "max_velocity",
        value=[9.0] * 7,
    )


def unknown_camera_type(files):
    files.edit(files.robot_config, "cameras", "head", "type", value="PointCloud2")


def missing_calibration(files):
    (files.calibration / "twin_head.yaml").unlink()


def calibration_of_another_resolution(files):
    files.edit(files.calibration / "twin_head.yaml", "image_width", value=1920)


def singular_calibration(files):
    files.edit(files.calibration / "twin_head.yaml", "camera_matrix", "data", value=[0.0] * 9)


def unknown_pruner_key(files):
    files.edit(files.pruners_config, "presets", "robot", "rhoo", value=0.5)


def pruning_layer_beyond_the_model(files):
    files.edit(files.pruners_config, "presets", "robot", "layer", value=40)


FILE_TABLE = [
    (missing_checkpoint, ["checkpoint"]),
    (missing_weights, ["model.safetensors"]),
    (truncated_weights, ["model.safetensors"]),
    (missing_tensor, ["model.safetensors", "action_in_proj.weight"]),
    (wrong_shape, ["model.safetensors", "action_in_proj.weight", "7"]),
    (broken_config, ["config.json"]),
    (stats_of_the_wrong_size, ["norm_stats.json", "15", "16"]),
    (flat_quantiles, ["norm_stats.json", "actions", "q99"]),
    (no_stats, ["norm_stats.json"]),
    (no_tokenizer, ["tokenizer"]),
    (another_layout, ["16", "25"]),
    (unknown_layout, ["astribot_s1.yaml", "layout", "s1_17", "s1_16"]),
    (missing_robot_file, ["astribot_s1.yaml"]),
    (unknown_key, ["astribot_s1.yaml", "control.rate_hertz", "rate_hz"]),
    (unknown_joint_part, ["astribot_s1.yaml", "astribot_arm_middle"]),
    (swapped_limits, ["astribot_s1.yaml", "min_position", "astribot_arm_left"]),
    (faster_than_the_hardware, ["astribot_s1.yaml", "max_velocity", "9", "8.4"]),
    (unknown_camera_type, ["astribot_s1.yaml", "cameras.head.type", "PointCloud2"]),
    (missing_calibration, ["twin_head.yaml"]),
    (calibration_of_another_resolution, ["twin_head.yaml", "1920", "1280"]),
    (singular_calibration, ["twin_head.yaml", "camera_matrix"]),
    (unknown_pruner_key, ["pruners.yaml", "rhoo", "rho"]),
    (pruning_layer_beyond_the_model, ["pruners.yaml", "layer", "40", "5"]),
]


def refused_line(bystander, process):
    """Configure, expect a failure, return its one line."""
    before = len(process.lines())
    assert not bystander.transition("safe_pruner", "configure")
    assert bystander.state("safe_pruner") == "unconfigured"
    new = process.lines()[before:]
    assert not any("Traceback" in line for line in new), new
    errors = [line for line in new if "[ERROR]" in line]
    assert len(errors) == 1, new
    assert "found" in errors[0]
    assert "expected" in errors[0]
    return errors[0]


@pytest.mark.parametrize(
    ("spoil", "fragments"), FILE_TABLE, ids=lambda x: getattr(x, "__name__", "")
)
def test_wrong_files(desk, tmp_path, small_checkpoint, spoil, fragments):
    bystander, process = desk
    files = Files(tmp_path, small_checkpoint)
    spoil(files)
    paths = {
        "checkpoint": str(files.checkpoint),
        "robot_config": str(files.robot_config),
        "pruners_config": str(files.pruners_config),
    }
    assert all(r.successful for r in bystander.set_parameters("safe_pruner", **paths))
    line = refused_line(bystander, process)
    for fragment in fragments:
        assert fragment in line, line


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"control_rate_hz": 5000.0}, ["control_rate_hz", "5000", "1000"]),
        ({"pruning_ratio": 0.99}, ["pruning_ratio", "0.99", "0.95"]),
        ({"device": "tpu"}, ["device", "tpu", "cuda"]),
        ({"prompt": 7}, ["prompt", "7", "text"]),
        ({"seed": -1}, ["seed", "-1"]),
    ],
)
def test_a_wrong_value_is_not_taken(desk, values, fragments):
    bystander, _ = desk
    (result,) = bystander.set_parameters("safe_pruner", **values)
    assert not result.successful
    for fragment in fragments:
        assert fragment in result.reason


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"pruner": "nonsense"}, ["pruners.yaml", "nonsense", "vanilla"]),
        ({"prompt": "  "}, ["prompt", "task in words"]),
        ({"checkpoint": ""}, ["checkpoint"]),
        ({"tokenizer": "/nowhere/tokenizer.model"}, ["/nowhere/tokenizer.model"]),
        ({"pruners_config": "/nowhere.yaml"}, ["/nowhere.yaml"]),
        ({"asset_id": "trossen"}, ["asset_id", "trossen/norm_stats.json"]),
    ],
)
def test_wrong_parameters_fail_configure(desk, small_checkpoint, values, fragments):
    bystander, process = desk
    bystander.set_parameters("safe_pruner", **{**good(small_checkpoint), **values})
    line = refused_line(bystander, process)
    for fragment in fragments:
        assert fragment in line, line
    told = bystander.listen(DiagnosticArray, "/diagnostics")
    before = len(told)
    status = wait_until(lambda: len(told) > before and told[-1].status[0], "diagnostics")
    assert status.name == "safe_pruner: node"
    assert status.message in line
    assert status.level == DiagnosticStatus.ERROR


def test_a_topic_of_another_type(desk, small_checkpoint):
    bystander, process = desk
    bystander.set_parameters("safe_pruner", **good(small_checkpoint))
    stranger = bystander.node.create_publisher(String, HEAD_TOPIC, 1)
    try:
        wait_until(
            lambda: dict(bystander.node.get_topic_names_and_types()).get(HEAD_TOPIC), "the topic"
        )
        line = refused_line(bystander, process)
    finally:
        bystander.node.destroy_publisher(stranger)
    for fragment in (HEAD_TOPIC, "std_msgs/msg/String", "sensor_msgs/msg/CompressedImage"):
        assert fragment in line


def test_after_all_that_the_node_can_be_configured(desk, small_checkpoint):
    bystander, _ = desk
    bystander.set_parameters("safe_pruner", **good(small_checkpoint))
    wait_until(
        lambda: HEAD_TOPIC not in dict(bystander.node.get_topic_names_and_types()),
        "the stranger gone",
    )
    assert bystander.transition("safe_pruner", "configure")
    assert bystander.state("safe_pruner") == "inactive"
    assert bystander.transition("safe_pruner", "cleanup")
    assert bystander.transition("safe_pruner", "configure"), "a second time"
    assert bystander.transition("safe_pruner", "activate")
    assert bystander.transition("safe_pruner", "deactivate")


def test_a_wrong_value_on_the_command_line_is_one_line_too(tmp_path, small_checkpoint):
    spec = policy_spec(small_checkpoint, control_rate_hz="fast", self_activate=True)
    process = NodeProcess(spec, tmp_path / "node.log")
    try:
        wait_until(lambda: any("[ERROR]" in line for line in process.lines()), "the error")
        (line,) = [line for line in process.lines() if "[ERROR]" in line]
        assert "control_rate_hz" in line
        assert "fast" in line
        assert process.process.poll() is None, "the node is gone: it cannot be configured again"
        assert not any("Traceback" in line for line in process.lines())
    finally:
        process.end()
