"""The one description of which nodes run with which parameters.

``launch/astribot.launch.py`` turns it into launch actions and ``make demo`` into processes, so
the two cannot drift apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.resources import resource

ParameterValue = bool | int | float | str

TWIN_STATE_RATE_HZ = 100.0
"""Joint-state rate of the twin; the robot's 250 Hz costs a software-rendered machine too much."""
TWIN_CAMERA_RATE_HZ = 15.0
"""Camera rate of the twin: half the robot's, what two cores render beside the policy."""


def _argument(default: Any, text: str) -> Any:  # noqa: ANN401 - a dataclass field, any type
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class BringupOptions:
    """What a person chooses at start-up; each field is one launch argument."""

    checkpoint: str = _argument(
        "", "Checkpoint directory (openpi or LeRobot layout). Empty: checkpoints/nano."
    )
    prompt: str = _argument("pick up the red cube", "The task in words.")
    pruner: str = _argument("robot", "Preset of config/pruners.yaml: robot, paper, vanilla...")
    pruning_ratio: float = _argument(
        -1.0, "Share of the visual tokens to prune, 0 to 0.95; -1 takes the preset's."
    )
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
    device: str = _argument("auto", "auto, cpu or cuda.")
    worker_threads: int = _argument(0, "CPU threads of the policy worker; 0: all cores but one.")
    twin_summary: str = _argument("", "Where the twin writes its counts when it ends (JSON).")
    seed: int = _argument(0, "Seed of the flow noise and of the twin's scene.")


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
    """Where ``make nano`` puts the small policy, below the checkout or the working folder."""
    try:
        return resource("checkpoints/nano")
    except ConfigError:
        return Path.cwd() / "checkpoints" / "nano"


def node_specs(options: BringupOptions) -> list[NodeSpec]:
    """The nodes of a run, in start order.

    Raises:
        ConfigError: ``auto_start`` without the twin: on the robot a person starts the policy.
    """
    if options.auto_start and not options.twin:
        raise ConfigError(
            "launch arguments",
            "auto_start",
            "true with twin:=false",
            "auto_start only with twin:=true; on the robot call ~/start",
        )
    robot_config = options.robot_config or str(resource("config/astribot_s1.yaml"))
    control_rate_hz = options.control_rate_hz
    specs = []
    if options.twin:
        control_rate_hz = control_rate_hz or TWIN_STATE_RATE_HZ
        specs.append(
            NodeSpec(
                "twin_node",
                "astribot_twin",
                {
                    "robot_config": robot_config,
                    "camera_rate_hz": TWIN_CAMERA_RATE_HZ,
                    "state_rate_hz": TWIN_STATE_RATE_HZ,
                    "seed": options.seed,
                    "summary_path": options.twin_summary,
                },
            )
        )
    policy = {
        item.name: getattr(options, item.name)
        for item in dataclasses.fields(options)
        if item.name not in {"twin", "twin_summary"}
    }
    policy |= {
        "robot_config": robot_config,
        "checkpoint": options.checkpoint or str(default_checkpoint()),
        "control_rate_hz": control_rate_hz,
        "self_activate": True,
    }
    specs.append(NodeSpec("policy_node", "safe_pruner", policy))
    return specs


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
