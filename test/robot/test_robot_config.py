"""The robot file: what is in force when it is good, and one clear line when it is not."""

import copy
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from safe_pruner_node.control.limits import JointLimits
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.config import load_robot_config

ROOT = Path(__file__).resolve().parents[2]
GOOD = ROOT / "config" / "astribot_s1.yaml"
SHIPPED = yaml.safe_load(GOOD.read_text(encoding="utf-8"))


@pytest.fixture
def write(tmp_path):
    """Writes changed data as tmp/config/robot.yaml beside a copy of calibration/."""
    shutil.copytree(ROOT / "calibration", tmp_path / "calibration")
    (tmp_path / "config").mkdir()

    def to_file(data):
        path = tmp_path / "config" / "robot.yaml"
        path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
        return path

    return to_file


def with_layout(name):
    data = copy.deepcopy(SHIPPED)
    data["layout"] = name
    return data


@pytest.fixture(scope="module")
def robot():
    return load_robot_config(GOOD)


def test_default_is_arms_then_grippers(robot):
    assert robot.layout.dof == 16
    assert robot.layout.slices["astribot_arm_right"] == slice(7, 14)
    assert robot.layout.slices["astribot_gripper_right"] == slice(15, 16)
    assert robot.layout.commanded.all()
    assert [camera.name for camera in robot.cameras] == ["head", "left_wrist", "right_wrist"]
    assert robot.control.rate_hz == 250
    assert robot.policy.action_rate_hz == 15


def test_position_limits_are_inside_every_source_by_the_margin(robot):
    arm = robot.layout.slices["astribot_arm_left"]
    # Joint 3 is bounded by the whole-body URDF above, joint 4 by its zero below.
    assert robot.limits.max_position[arm][2] == pytest.approx(1.4 - 0.02)
    assert robot.limits.min_position[arm][3] == pytest.approx(0.0 + 0.02)
    for part in robot.parts:
        place = robot.layout.slices[part]
        margin = 0.0 if "gripper" in part else 0.02
        for source in SHIPPED["hardware"][part].values():
            assert np.all(
                robot.limits.min_position[place] >= np.array(source["min_position"]) + margin
            )
            assert np.all(
                robot.limits.max_position[place] <= np.array(source["max_position"]) - margin
            )
    assert np.all(robot.limits.max_velocity <= robot.hardware_limits.max_velocity)


def test_first_action_tolerance_has_the_units_of_the_joint(robot):
    assert robot.first_action_tolerance[0] == robot.control.first_action_tolerance_rad
    assert robot.first_action_tolerance[14] == robot.control.first_action_tolerance_gripper


@pytest.mark.parametrize("name", ["s1_25_parts", "s1_25_lerobot"])
def test_25_d_layouts_observe_the_body_and_command_the_arms(write, name):
    robot = load_robot_config(write(with_layout(name)))
    assert robot.layout.dof == 25
    commanded = {s.part for s in robot.layout.segments if s.commanded}
    assert commanded == {
        "astribot_arm_left",
        "astribot_arm_right",
        "astribot_gripper_left",
        "astribot_gripper_right",
    }
    assert robot.layout.commanded.sum() == 16
    observed = ~robot.layout.commanded
    assert np.all(np.isposinf(robot.limits.max_position[observed]))
    assert np.all(np.isposinf(robot.first_action_tolerance[observed]))
    JointLimits(**vars(robot.limits))  # what the control room accepts


def test_25_d_orders_differ(write):
    parts = load_robot_config(write(with_layout("s1_25_parts"))).layout.slices
    lerobot = load_robot_config(write(with_layout("s1_25_lerobot"))).layout.slices
    assert parts["astribot_arm_left"] == slice(7, 14)
    assert parts["astribot_head"] == slice(23, 25)
    assert lerobot["astribot_arm_left"] == slice(0, 7)
    assert lerobot["astribot_chassis"] == slice(22, 25)


def test_offsets_shift_the_limits_so_that_raw_and_true_angles_stay_inside(write, tmp_path):
    path = write(SHIPPED)
    offsets = "joint_offsets_rad: {astribot_arm_left: [0.1, -0.1, 0, 0, 0, 0, 0]}"
    (tmp_path / "calibration" / "joint_offsets.yaml").write_text(offsets, encoding="utf-8")
    robot = load_robot_config(path)
    assert robot.parts["astribot_arm_left"].joint_offsets[1] == -0.1
    assert robot.limits.min_position[0] == pytest.approx(-3.0 + 0.1 + 0.02)
    assert robot.limits.max_position[0] == pytest.approx(3.0 - 0.02)
    assert robot.limits.min_position[1] == pytest.approx(-1.4 + 0.02)
    assert robot.limits.max_position[1] == pytest.approx(0.4 - 0.1 - 0.02)


def test_operator_may_narrow_the_workspace(write):
    data = copy.deepcopy(SHIPPED)
    data["limits"]["parts"]["astribot_arm_left"]["min_position"] = [-1, -1, -2, 0.5, -1, -0.5, -1]
    data["limits"]["parts"]["astribot_arm_left"]["max_position"] = [1, 0.2, 1, 2, 1, 0.5, 1]
    limits = load_robot_config(write(data)).limits
    assert limits.min_position[3] == 0.5
    assert limits.max_position[1] == 0.2


def test_a_config_can_go_to_the_worker_process(robot):
    assert pickle.loads(pickle.dumps(robot)).layout == robot.layout  # noqa: S301 - our own


def put(*keys_and_value):
    """An edit: the value at the end goes to the place the keys before it name."""
    *keys, last, value = keys_and_value

    def edit(data):
        for key in keys:
            data = data[key]
        data[last] = value

    return edit


def drop(*keys):
    def edit(data):
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return edit


ARM = "astribot_arm_left"
SWAPPED = [3.1, -1.53, -3.1, -0.06, -2.56, -0.76, -1.53]
SEVEN = [2.0] * 7

# What is wrong, the edit, then what the line must say: key, found, expected.
WRONG = {
    "unknown key": (put("control", "rate", 250), "control.rate", "unknown key", "'rate_hz'"),
    "misspelt key": (
        lambda d: (put("control", "blend", 0.1)(d), drop("control", "blend_s")(d)),
        "control.blend",
        "unknown key",
        "'blend_s'",
    ),
    "unknown section": (put("camera", {}), "camera", "unknown key", "'cameras'"),
    "unknown camera key": (
        put("cameras", "head", "topics", "/x"),
        "cameras.head.topics",
        "unknown key",
        "'topic'",
    ),
    "missing key": (drop("control", "blend_s"), "control.blend_s", "nothing", "required"),
    "missing section": (drop("qos"), "qos", "nothing", "required"),
    "text for a number": (
        put("control", "rate_hz", "fast"),
        "control.rate_hz",
        "'fast'",
        "a valid number",
    ),
    "yes for a number": (put("control", "blend_s", True), "control.blend_s", "True", "number"),
    "number for a flag": (
        put("policy", "state_in_prompt", 1),
        "policy.state_in_prompt",
        "1",
        "a valid boolean",
    ),
    "zero rate": (
        put("policy", "action_rate_hz", 0),
        "policy.action_rate_hz",
        "0",
        "greater than 0",
    ),
    "negative age": (
        put("control", "max_state_age_s", -0.1),
        "control.max_state_age_s",
        "-0.1",
        "than 0",
    ),
    "not finite": (
        put("control", "max_camera_age_s", float("nan")),
        "control.max_camera_age_s",
        "nan",
        "a finite number",
    ),
    "rate too high": (put("control", "rate_hz", 5000), "control.rate_hz", "5000", "1000"),
    "unknown layout": (put("layout", "s1_61"), "layout", "'s1_61'", "'s1_16'"),
    "layout names an unknown part": (
        put("layouts", "s1_16", 0, "astribot_arm_lift"),
        "layouts.s1_16",
        "'astribot_arm_lift'",
        "'astribot_arm_left'",
    ),
    "part twice in a layout": (
        put("layouts", "s1_16", 1, ARM),
        "layouts.s1_16",
        f"'{ARM}' 2 times",
        "each part once",
    ),
    "layout without anything to command": (
        put("layouts", "s1_16", ["astribot_torso"]),
        "layouts.s1_16",
        "no part",
        "at least one",
    ),
    "joint in two parts": (
        put("parts", "astribot_arm_right", "joint_names", 0, "astribot_arm_left_joint_1"),
        "parts.astribot_arm_",
        "'astribot_arm_left_joint_1', already",
        "each joint once",
    ),
    "gripper of two joints": (
        put("parts", "astribot_gripper_left", "joint_names", ["a", "b"]),
        "parts.astribot_gripper_left.joint_names",
        "2 joints",
        "1 for a gripper",
    ),
    "unknown kind": (put("parts", ARM, "kind", "leg"), f"parts.{ARM}.kind", "'leg'", "'arm'"),
    "home of another length": (
        put("parts", ARM, "home", [0.0] * 6),
        f"parts.{ARM}.home",
        "6 values",
        "7",
    ),
    "home outside the limits": (
        put("parts", ARM, "home", 3, 2.5),
        f"parts.{ARM}.home[3]",
        "2.5",
        "0.02 to 2.38",
    ),
    "topic that is none": (
        put("parts", ARM, "state_topic", "arm left"),
        f"parts.{ARM}.state_topic",
        "'arm left'",
        "a topic name with a leading slash",
    ),
    "command topic used twice": (
        put("parts", ARM, "command_topic", "/astribot_arm_right/joint_space_command"),
        "command_topic",
        "/astribot_arm_right/joint_space_command, already",
        "a topic of its own",
    ),
    "state topic used for commands": (
        put("parts", ARM, "command_topic", f"/{ARM}/joint_space_states"),
        f"parts.{ARM}.command_topic",
        f"already the topic of parts.{ARM}.state_topic",
        "a topic of its own",
    ),
    "swapped hardware limits": (
        put("hardware", ARM, "part_urdf", "min_position", [4.0, *SWAPPED[1:]]),
        f"hardware.{ARM}.part_urdf.min_position[0]",
        "4",
        "below max_position[0] = 3.1",
    ),
    "sources that leave no room": (
        lambda d: d["hardware"][ARM]["whole_body_urdf"]["max_position"].__setitem__(0, -2.97),
        f"hardware.{ARM}[0]",
        "-2.98 to -2.99",
        "room to move",
    ),
    "list for a section": (put("control", []), "control", "[]", "a mapping"),
    "camera name with a dash": (
        put("cameras", "left-wrist", SHIPPED["cameras"]["left_wrist"]),
        "cameras.left-wrist",
        "'left-wrist'",
        "lower-case letters",
    ),
    "hardware limits of another length": (
        put("hardware", ARM, "part_urdf", "max_velocity", [8.4] * 6),
        f"hardware.{ARM}.part_urdf.max_velocity",
        "6 values",
        "7",
    ),
    "commanded part without hardware limits": (
        drop("hardware", ARM),
        f"hardware.{ARM}",
        "nothing",
        "commanded",
    ),
    "commanded part without operator's limits": (
        drop("limits", "parts", ARM),
        f"limits.parts.{ARM}",
        "nothing",
        "commanded",
    ),
    "torso commanded without operator's limits": (
        lambda d: (
            put("parts", "astribot_torso", "command_topic", "/astribot_torso/command")(d),
            put("layout", "s1_25_parts")(d),
        ),
        "limits.parts.astribot_torso",
        "nothing",
        "commanded",
    ),
    "faster than the hardware": (
        put("limits", "parts", ARM, "max_velocity", [20.0] * 7),
        f"limits.parts.{ARM}.max_velocity[0]",
        "20",
        "at most 8.4",
    ),
    "wider than the hardware": (
        lambda d: d["limits"]["parts"][ARM].update(
            min_position=[-3.1, -1, -1, 0.1, -1, -0.5, -1], max_position=[1, 0.3, 1, 2, 1, 0.5, 1]
        ),
        f"limits.parts.{ARM}.min_position[0]",
        "-3.1",
        "at least -3",
    ),
    "zero acceleration": (
        put("limits", "parts", ARM, "max_acceleration", 2, 0),
        f"limits.parts.{ARM}.max_acceleration[2]",
        "0",
        "greater than 0",
    ),
    "one limit for seven joints": (
        put("limits", "parts", ARM, "max_jerk", 80.0),
        f"{ARM}.max_jerk",
        "80.0",
        "a list",
    ),
    "limits of an unknown part": (
        put(
            "limits",
            "parts",
            "astribot_arm_lefd",
            dict.fromkeys(("max_velocity", "max_acceleration", "max_jerk"), SEVEN),
        ),
        "limits.parts.astribot_arm_lefd",
        "an unknown part",
        f"'{ARM}'",
    ),
    "margin in degrees": (
        put("limits", "position_margin_rad", 1.0),
        "limits.position_margin_rad",
        "1.0",
        "0.2",
    ),
    "camera missing from the order": (
        put("policy", "camera_order", ["head", "left_wrist"]),
        "policy.camera_order",
        "head, left_wrist",
        "each of head, left_wrist, right_wrist once",
    ),
    "unknown camera in the order": (
        put("policy", "camera_order", 0, "hed"),
        "policy.camera_order",
        "'hed'",
        "'head'",
    ),
    "camera topic used twice": (
        put("cameras", "left_wrist", "topic", SHIPPED["cameras"]["head"]["topic"]),
        "cameras.head.topic",
        "head_rgbd",
        "a topic of its own",
    ),
    "image type": (
        put("cameras", "head", "type", "PointCloud2"),
        "cameras.head.type",
        "'PointCloud2'",
        "'CompressedImage' or 'Image'",
    ),
    "calibration missing": (
        put("cameras", "head", "calibration", "../calibration/robot_head.yaml"),
        "robot_head.yaml",
        "No such file",
        "a readable YAML file",
    ),
    "calibration of another resolution": (
        put("cameras", "head", "calibration", "../calibration/twin_left_wrist.yaml"),
        "twin_left_wrist.yaml: image_width",
        "640",
        "1280",
    ),
    "calibration template left as it is": (
        put("cameras", "head", "calibration", "../calibration/robot_camera.template.yaml"),
        "robot_camera.template.yaml: camera_matrix",
        "fx 0",
        "invertible",
    ),
    "offsets file missing": (
        put("joint_offsets", "none.yaml"),
        "none.yaml",
        "No such file",
        "a readable YAML file",
    ),
    "gripper scale without extent": (
        put("policy", "gripper_closed", 0.0),
        "policy.gripper_closed",
        "0",
        "another number",
    ),
    "action convention": (
        put("policy", "actions", "relative"),
        "policy.actions",
        "'relative'",
        "'absolute' or 'delta'",
    ),
    "reliability": (
        put("qos", "state", "reliability", "sure"),
        "qos.state.reliability",
        "'sure'",
        "'reliable' or 'best_effort'",
    ),
}


def assert_one_line(error, *fragments):
    line = str(error)
    assert "\n" not in line
    assert len(line) < 500
    for fragment in fragments:
        assert fragment in line, f"{fragment!r} not in {line!r}"
    assert "found" in line
    assert "expected" in line


@pytest.mark.parametrize("name", WRONG)
def test_wrong_file_is_one_clear_line(write, name):
    edit, key, found, expected = WRONG[name]
    data = copy.deepcopy(SHIPPED)
    edit(data)
    with pytest.raises(ConfigError) as caught:
        load_robot_config(write(data))
    assert_one_line(caught.value, ".yaml", key, found, expected)
    where = caught.value.source + caught.value.key
    assert key in where or key in f"{caught.value.source}: {caught.value.key}"
    assert found in caught.value.found
    assert expected in caught.value.expected


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ("nothing", "a mapping")),
        ("- a\n- b\n", ("['a', 'b']", "a mapping")),
        ("layout: [s1_16\n", ("line 2", "valid YAML")),
        ("layout: s1_16\nlayout: s1_25_parts\n", ("line 2", "'layout' a second time")),
        ("layout: \x00\n", ("valid YAML",)),
        ("layout: {? [1, 2] : 3}\n", ("line 1", "a key that is not text")),
        ("layout: {1: 3}\n", ("line 1", "a key that is not text")),
        ("layout: &a [*a]\n", ("Circular", "without an alias to itself")),
    ],
)
def test_what_is_not_a_mapping_in_yaml_is_one_clear_line(write, text, fragments):
    with pytest.raises(ConfigError) as caught:
        load_robot_config(write(text))
    assert_one_line(caught.value, "robot.yaml", *fragments)


def test_missing_file_and_folder_are_one_clear_line(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError) as caught:
            load_robot_config(path)
        assert_one_line(caught.value, str(path), "a readable YAML file")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("joint_offsets_rad: {astribot_arm_left: [0, 0]}", ("2 values", "7")),
        ("joint_offsets_rad: {astribot_arm_left: [5, 0, 0, 0, 0, 0, 0]}", ("[0]", "5", "0.35")),
        ("joint_offsets_rad: {astribot_gripper_left: [0]}", ("without angles", "astribot_head")),
        ("joint_offsets: {}", ("unknown key", "'joint_offsets_rad'")),
    ],
)
def test_wrong_offsets_are_one_clear_line(write, tmp_path, text, fragments):
    path = write(SHIPPED)
    (tmp_path / "calibration" / "joint_offsets.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_robot_config(path)
    assert_one_line(caught.value, "joint_offsets.yaml", *fragments)
