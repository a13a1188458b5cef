"""The one description of which nodes run with which parameters.

``launch/astribot.launch.py`` turns it into launch actions and ``make demo`` into processes, so
the two cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.resources import resource

ParameterValue = bool | int | float | str

TWIN_STATE_RATE_HZ = 100.0
"""Joint-state rate of the twin; the robot's 250 Hz costs a software-rendered machine too much."""
ROBOT_DOMAIN_ID = "25"
"""ROS domain of the robot's own computers (vendor SDK)."""

TWIN_SEED = 1_000_000
"""An episode of the validation split: the shipped policy has not been trained on it."""

TWIN_CAMERA_RATE_HZ = 15.0
"""Camera rate of the twin: half the robot's, what two cores render beside the policy."""


def _argument(default: Any, text: str) -> Any:  # noqa: ANN401 - a dataclass field, any type
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class BringupOptions:
    """What a person chooses at start-up; each field is one launch argument."""

    checkpoint: str = _argument(
        "", "Checkpoint directory (openpi or LeRobot layout). On the twin, empty: checkpoints/nano."
    )
    prompt: str = _argument("", "The task in words. On the twin, empty: what `task` asks for.")
    task: str = _argument(
        "pick_and_place",
        "What is to be done on the twin: pick_and_place, throw_basketball or pack_doll; "
        "empty: a table with things, and nothing is asked.",
    )
    pruner: str = _argument("robot", "Preset of config/pruners.yaml: robot, paper, vanilla...")
    pruning_ratio: float = _argument(
        -1.0, "Share of the visual tokens to prune, 0 to 0.95; -1 takes the preset's."
    )
    pruners_config: str = _argument("", "Pruner presets. Empty: config/pruners.yaml.")
    control_rate_hz: float = _argument(
        0.0, "Rate of the joint commands; 0 takes the robot file's (250), on the twin 100."
    )
    query_rate_hz: float = _argument(
        0.0, "Policy queries per second at most; 0 takes the robot file's."
    )
    twin: bool = _argument(False, "Start the MuJoCo twin and drive it instead of the robot.")
    auto_start: bool = _argument(
        False, "Hand the arms to the policy without a person; the twin only."
    )
    auto_resume: bool = _argument(
        False, "Return to POLICY by itself after a worker death or stale input."
    )
    dry_run: bool = _argument(False, "Run everything but publish no command.")
    robot_config: str = _argument("", "Robot description. Empty: config/astribot_s1.yaml.")
    asset_id: str = _argument(
        "", "Which of an openpi checkpoint's assets holds the statistics. Empty: the only one."
    )
    tokenizer: str = _argument("", "SentencePiece model. Empty: the checkpoint's, else openpi's.")
    flow_steps: int = _argument(0, "Euler steps of the flow; 0 takes the checkpoint's.")
    device: str = _argument("auto", "auto, cpu or cuda.")
    dtype: str = _argument("auto", "auto, fp32, bf16, or fp8 for a checkpoint calibrated for it.")
    image_decoder: str = _argument("auto", "What decodes JPEG frames: auto, cpu or nvjpeg.")
    worker_threads: int = _argument(0, "CPU threads of the policy worker; 0: all cores but one.")
    twin_summary: str = _argument("", "Where the twin writes its counts when it ends (JSON).")
    seed: int = _argument(TWIN_SEED, "Seed of the flow noise and of the twin's episode or scene.")


@dataclass(frozen=True)
class NodeSpec:
    """One process to start.

    Attributes:
        executable: Entry point, also the module name below ``safe_pruner_node.nodes``.
        name: Node name.
        parameters: ROS parameters.
    """

    executable: str
    name: str
    parameters: Mapping[str, ParameterValue]

    @property
    def module(self) -> str:
        """Module that ``python -m`` runs."""
        return f"safe_pruner_node.nodes.{self.executable}"

    def ros_arguments(self) -> list[str]:
        """The command line that ``ros2 run`` would give this node."""
        arguments = ["--ros-args", "-r", f"__node:={self.name}"]
        for key, value in self.parameters.items():
            arguments += ["-p", f"{key}:={_ros_literal(value)}"]
        return arguments


def _ros_literal(value: ParameterValue) -> str:
    """A value as ``-p name:=value`` wants it: YAML, with strings quoted."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return repr(value)


def default_checkpoint() -> Path:
    """Where the small policy is, below the checkout or the working folder."""
    try:
        return resource("checkpoints/nano")
    except ConfigError:
        return Path.cwd() / "checkpoints" / "nano"


def node_specs(options: BringupOptions) -> list[NodeSpec]:
    """The nodes of a run, in start order.

    Raises:
        ConfigError: On the robot, no checkpoint or prompt was chosen, or ``auto_start`` was; for
            the twin, the robot's ROS domain is set, the task is unknown, or nothing gives a prompt.
    """
    if options.twin:
        check_twin_domain()
        options = _on_the_twin(options)
    else:
        _check_chosen(options)
    robot_config = options.robot_config or str(resource("config/astribot_s1.yaml"))
    policy = {
        item.name: getattr(options, item.name)
        for item in dataclasses.fields(options)
        if item.name not in {"twin", "twin_summary", "task"}
    }
    policy |= {"robot_config": robot_config, "self_activate": True}
    specs = [NodeSpec("policy_node", "safe_pruner", policy)]
    if options.twin:
        twin: dict[str, ParameterValue] = {
            "robot_config": robot_config,
            "camera_rate_hz": TWIN_CAMERA_RATE_HZ,
            "state_rate_hz": TWIN_STATE_RATE_HZ,
            "task": options.task,
            "seed": options.seed,
            "summary_path": options.twin_summary,
        }
        specs.insert(0, NodeSpec("twin_node", "astribot_twin", twin))
    return specs


def check_twin_domain() -> None:
    """Keep the twin, which speaks on the robot's topic names, off the robot's ROS domain.

    Raises:
        ConfigError: ``ROS_DOMAIN_ID`` is the robot's.
    """
    if os.environ.get("ROS_DOMAIN_ID") == ROBOT_DOMAIN_ID:
        raise ConfigError(
            "environment",
            "ROS_DOMAIN_ID",
            f"{ROBOT_DOMAIN_ID}, the robot's",
            "another domain for the twin, such as 77",
        )


def _on_the_twin(options: BringupOptions) -> BringupOptions:
    """What the twin takes where nothing was chosen."""
    asked = _task_prompt(options) if options.task else ""
    if not (options.prompt or asked).strip():
        expected = "the task in words, or a task of the twin"
        raise ConfigError("launch arguments", "prompt", "nothing", expected)
    return dataclasses.replace(
        options,
        checkpoint=options.checkpoint or str(default_checkpoint()),
        prompt=options.prompt or asked,
        control_rate_hz=options.control_rate_hz or TWIN_STATE_RATE_HZ,
    )


def _task_prompt(options: BringupOptions) -> str:
    """What the twin's task asks for, in words."""
    # Brings MuJoCo, which a robot's computer need not have.
    from safe_pruner_node.twin.tasks.registry import build_task  # noqa: PLC0415

    return build_task(options.task, options.seed).prompt


def _check_chosen(options: BringupOptions) -> None:
    """Nothing on a robot runs by default: `ros2 launch` does not refuse a misspelt argument."""
    for key, expected in (
        ("checkpoint", "a checkpoint directory: there is no default on the robot"),
        ("prompt", "the task in words: there is no default on the robot"),
    ):
        if not getattr(options, key).strip():
            raise ConfigError("launch arguments", key, "nothing", expected)
    if options.auto_start:
        raise ConfigError(
            "launch arguments",
            "auto_start",
            "true with twin:=false",
            "auto_start only with twin:=true; on the robot call ~/start",
        )


def options_from_text(arguments: Mapping[str, str]) -> BringupOptions:
    """Launch arguments (all text) as options.

    Raises:
        ConfigError: A value that is not of the argument's type, or an unknown argument.
    """
    defaults = BringupOptions()
    values: dict[str, Any] = {}
    for key, text in arguments.items():
        if not hasattr(defaults, key):
            known = ", ".join(item.name for item in dataclasses.fields(defaults))
            raise ConfigError("launch arguments", key, repr(text), f"one of {known}")
        values[key] = _parse(key, text, type(getattr(defaults, key)))
    return dataclasses.replace(defaults, **values)


def _parse(key: str, text: str, kind: type) -> ParameterValue:
    if kind is bool:
        if text.lower() not in {"true", "false"}:
            raise ConfigError("launch arguments", key, repr(text), "true or false")
        return text.lower() == "true"
    try:
        value: ParameterValue = kind(text)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[kind]
        raise ConfigError("launch arguments", key, repr(text), expected) from None
    return value
