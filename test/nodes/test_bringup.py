"""One description for launch and demo: its arguments, and what the nodes make of them."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
import yaml

from safe_pruner_node.bringup import BringupOptions, node_specs, options_from_text
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.nodes.parameters import PolicyNodeParameters
from safe_pruner_node.twin.settings import twin_settings
from safe_pruner_node.twin.tasks.registry import TASKS, build_task
from safe_pruner_node.twin.tasks.seeds import episode_seed

LAUNCH = Path(__file__).parents[2] / "launch" / "astribot.launch.py"


def by_name(options):
    return {spec.name: spec for spec in node_specs(options)}


def test_the_robot_gets_the_policy_node_alone_and_in_hold():
    specs = by_name(BringupOptions(checkpoint="c", prompt="x"))
    assert list(specs) == ["safe_pruner"]
    parameters = specs["safe_pruner"].parameters
    assert parameters["auto_start"] is False
    assert parameters["control_rate_hz"] == 0.0, "the robot file decides"


def test_auto_start_on_the_robot_is_refused():
    with pytest.raises(ConfigError, match="auto_start"):
        node_specs(BringupOptions(checkpoint="c", prompt="x", auto_start=True))


@pytest.mark.parametrize(("missing", "given"), [("checkpoint", "prompt"), ("prompt", "checkpoint")])
def test_nothing_runs_on_the_robot_by_default(missing, given):
    """`ros2 launch` passes over a misspelt argument, so a default would run instead."""
    with pytest.raises(ConfigError, match=missing):
        node_specs(BringupOptions(**{given: "x"}))


def test_the_twin_keeps_off_the_robots_domain(monkeypatch):
    monkeypatch.setenv("ROS_DOMAIN_ID", "25")
    with pytest.raises(ConfigError, match="ROS_DOMAIN_ID"):
        node_specs(BringupOptions(twin=True))


def test_the_twin_starts_with_a_task_and_the_policy_is_told_what_it_asks():
    specs = by_name(BringupOptions(twin=True, task="throw_basketball", seed=7))
    twin, policy = specs["astribot_twin"].parameters, specs["safe_pruner"].parameters
    assert (twin["task"], twin["seed"]) == ("throw_basketball", 7)
    assert policy["prompt"] == build_task("throw_basketball", 7).prompt
    default = by_name(BringupOptions(twin=True))
    assert default["astribot_twin"].parameters["task"] in TASKS
    assert default["astribot_twin"].parameters["seed"] == episode_seed("validation", 0)


def test_words_of_ones_own_win_over_the_tasks():
    specs = by_name(BringupOptions(twin=True, prompt="wave"))
    assert specs["safe_pruner"].parameters["prompt"] == "wave"


def test_a_table_without_a_task_needs_words():
    with pytest.raises(ConfigError, match="prompt"):
        node_specs(BringupOptions(twin=True, task=""))
    specs = by_name(BringupOptions(twin=True, task="", prompt="wave"))
    assert specs["astribot_twin"].parameters["task"] == ""


@pytest.mark.parametrize("prompt", ["", "wave"])
def test_an_unknown_task_is_refused_before_anything_starts(prompt):
    with pytest.raises(ConfigError, match="juggling"):
        node_specs(BringupOptions(twin=True, task="juggling", prompt=prompt))


@pytest.mark.parametrize("twin", [False, True])
def test_every_parameter_is_one_that_its_node_knows_and_accepts(twin):
    specs = by_name(BringupOptions(checkpoint="c", prompt="pick", twin=twin))
    policy = specs["safe_pruner"].parameters
    known = {item.name for item in dataclasses.fields(PolicyNodeParameters)}
    assert set(policy) <= known
    PolicyNodeParameters.from_values(policy)
    if twin:
        twin_settings(specs["astribot_twin"].parameters)


def test_command_line_carries_values_unharmed():
    prompt = "it's: a [tricky] #prompt, yes"
    (spec,) = node_specs(BringupOptions(checkpoint="c", prompt=prompt))
    arguments = spec.ros_arguments()
    given = dict(a.split(":=", 1) for a in arguments if ":=" in a)
    for name, value in spec.parameters.items():
        assert yaml.safe_load(given[name]) == value, name
    assert given["__node"] == "safe_pruner"


def test_launch_text_becomes_typed_options():
    options = options_from_text({"twin": "true", "control_rate_hz": "125", "seed": "3"})
    assert (options.twin, options.control_rate_hz, options.seed) == (True, 125.0, 3)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ({"twin": "yes"}, ["twin", "yes", "true or false"]),
        ({"seed": "1.5"}, ["seed", "1.5", "whole number"]),
        ({"control_rate_hz": "fast"}, ["control_rate_hz", "fast", "number"]),
        ({"chekpoint": "x"}, ["chekpoint", "checkpoint"]),
    ],
)
def test_wrong_launch_arguments_are_one_line(arguments, fragments):
    with pytest.raises(ConfigError) as caught:
        options_from_text(arguments)
    line = str(caught.value)
    assert "\n" not in line
    assert all(fragment in line for fragment in fragments)


def test_every_launch_argument_is_documented():
    for item in dataclasses.fields(BringupOptions):
        assert item.metadata["help"].endswith((".", "...")), item.name


def test_launch_file_uses_only_what_launch_knows():
    """Where `ros2 launch` is not installed: keywords and substitutions checked by their names."""
    tree = ast.parse(LAUNCH.read_text())
    calls = {
        call.func.id: {keyword.arg for keyword in call.keywords}
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    }
    assert calls["Node"] <= {
        "package",
        "executable",
        "name",
        "parameters",
        "output",
        "emulate_tty",
        "sigterm_timeout",
        "sigkill_timeout",
    }
    assert calls["DeclareLaunchArgument"] == {"default_value", "description"}
    assert {"LaunchDescription", "OpaqueFunction", "LaunchConfiguration"} <= calls.keys()
