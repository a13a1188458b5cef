"""The policy node's ROS parameters: declared, documented and validated in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safe_pruner_node.engine.settings import DEVICES, DTYPES
from safe_pruner_node.errors import ConfigError

_SOURCE = "parameter"


def _parameter(
    default: Any,  # noqa: ANN401 - a dataclass field, any type
    text: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:  # noqa: ANN401
    return field(
        default=default,
        metadata={"help": text, "low": low, "high": high, "choices": choices},
    )


@dataclass(frozen=True)
class PolicyNodeParameters:
    """Everything a run chooses; the robot itself is described in ``robot_config``."""

    checkpoint: str = _parameter("", "Checkpoint directory, openpi or LeRobot layout.")
    asset_id: str = _parameter(
        "", "Which of an openpi checkpoint's assets holds the statistics; empty: the only one."
    )
    tokenizer: str = _parameter("", "SentencePiece model; empty: the checkpoint's, else openpi's.")
    prompt: str = _parameter("", "The task in words.")
    pruner: str = _parameter("robot", "Preset of the pruner file. Changes between episodes.")
    pruners_config: str = _parameter("", "Pruner presets; empty: config/pruners.yaml.")
    pruning_ratio: float = _parameter(
        -1.0,
        "Share of visual tokens pruned; -1 takes the preset's. Changes between episodes.",
        -1.0,
        0.95,
    )
    robot_config: str = _parameter("", "Robot description; empty: config/astribot_s1.yaml.")
    control_rate_hz: float = _parameter(
        0.0, "Rate of the joint commands, Hz; 0 takes the robot file's.", 0.0, 1000.0
    )
    query_rate_hz: float = _parameter(
        0.0, "Policy queries per second at most; 0 takes the robot file's.", 0.0, 100.0
    )
    flow_steps: int = _parameter(0, "Euler steps of the flow; 0 takes the checkpoint's.", 0, 100)
    device: str = _parameter("auto", "Where the policy runs.", choices=DEVICES)
    dtype: str = _parameter(
        "auto",
        "Arithmetic; auto: bf16 on a GPU, fp32 on a CPU. fp8 needs a calibrated checkpoint.",
        choices=DTYPES,
    )
    image_decoder: str = _parameter(
        "auto",
        "What decodes JPEG camera frames; auto: the GPU where it can.",
        choices=("auto", "cpu", "nvjpeg"),
    )
    worker_threads: int = _parameter(0, "CPU threads of the policy; 0: all cores but one.", 0, 256)
    worker_niceness: int = _parameter(5, "Niceness of the policy process.", 0, 19)
    seed: int = _parameter(0, "Seed of the flow noise.", 0, 2**31 - 1)
    auto_start: bool = _parameter(False, "Start the policy without a person; the twin only.")
    auto_resume: bool = _parameter(False, "Return to POLICY by itself after a fault has passed.")
    dry_run: bool = _parameter(False, "Run everything but publish no command.")
    self_activate: bool = _parameter(
        False, "Configure and activate at start-up; false waits for a lifecycle manager."
    )

    @classmethod
    def from_values(cls, values: Mapping[str, object]) -> PolicyNodeParameters:
        """Check types, ranges and choices.

        Raises:
            ConfigError: A value of the wrong type or outside its range; names the parameter.
        """
        checked: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            checked[item.name] = check_value(item.name, values.get(item.name, item.default))
        ratio = checked["pruning_ratio"]
        if ratio < 0.0 and ratio != -1.0:
            raise ConfigError(_SOURCE, "pruning_ratio", ratio, "0 to 0.95, or -1 for the preset's")
        if not checked["prompt"].strip():
            raise ConfigError(_SOURCE, "prompt", repr(checked["prompt"]), "the task in words")
        if not checked["checkpoint"].strip():
            raise ConfigError(_SOURCE, "checkpoint", "''", "a checkpoint directory")
        return cls(**checked)


def check_value(name: str, value: object) -> object:
    """One parameter's value, checked against its field.

    Raises:
        ConfigError: Wrong type, out of range, or not one of the choices.
    """
    item = next(f for f in dataclasses.fields(PolicyNodeParameters) if f.name == name)
    kind = type(item.default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise ConfigError(_SOURCE, name, f"{value!r} ({type(value).__name__})", expected[kind])
    low, high = item.metadata["low"], item.metadata["high"]
    if low is not None and not low <= value <= high:
        raise ConfigError(_SOURCE, name, value, f"{low:g} to {high:g}")
    choices = item.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(_SOURCE, name, repr(value), f"one of {', '.join(choices)}")
    return value
