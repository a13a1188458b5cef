"""The file beside a checkpoint that says how its layers are quantised, and how well that does.

``fp8.safetensors``: per group of layers (`fp8.layer_groups`) the largest magnitude of its input;
in the header, what it was measured on and how far the actions then were from those of bf16. It is
no JSON file because a checkpoint's identity covers those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.checkpoint import checkpoint_id

FILE = "fp8.safetensors"
COMMAND = "python -m safe_pruner_node.evaluation.calibrate_fp8"

LEAST_COSINE = 0.999
"""Between the actions of FP8 and those of bf16, for every input that was tried. Below it the engine
refuses FP8."""


@dataclass(frozen=True)
class Calibration:
    """What is known of a checkpoint in FP8.

    Attributes:
        checkpoint: Its identity.
        largest: Group of layers to the largest magnitude of its input.
        inputs: How many observations that was measured on.
        tested: How many others bf16 and FP8 were compared on.
        cosine: The least of their cosines, of whole chunks of normalised actions.
    """

    checkpoint: str
    largest: Mapping[str, float]
    inputs: int
    tested: int
    cosine: float

    def write(self, directory: Path) -> Path:
        """Write it beside the checkpoint; gives the file."""
        path = directory / FILE
        tensors = {name: torch.tensor([value]) for name, value in self.largest.items()}
        header = {key: str(getattr(self, key)) for key in _HEADER}
        save_file(tensors, path, header)
        return path


_HEADER = ("checkpoint", "inputs", "tested", "cosine")


def read_calibration(directory: Path, groups: Iterable[str]) -> Calibration:
    """Read and check the file of a checkpoint.

    Args:
        directory: The checkpoint's.
        groups: Names that the file has to have.

    Raises:
        ConfigError: The file is missing, damaged, of another checkpoint or model, or says that
            FP8 is too far from bf16.
    """
    path = directory / FILE
    if not path.is_file():
        raise ConfigError(path, "", "no such file", f"what `{COMMAND}` writes, for dtype fp8")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(path, "", error, f"what `{COMMAND}` writes") from None
    identity = checkpoint_id(directory)
    if (found := header.get("checkpoint", "nothing")) != identity:
        expected = f"{identity}, of the checkpoint beside it: calibrate again"
        raise ConfigError(path, "checkpoint", found, expected)
    _check_names(path, tensors.keys(), set(groups))
    calibration = Calibration(
        checkpoint=identity,
        largest={name: _magnitude(path, name, tensor) for name, tensor in tensors.items()},
        inputs=int(_number(path, header, "inputs")),
        tested=int(_number(path, header, "tested")),
        cosine=_number(path, header, "cosine"),
    )
    if not calibration.cosine >= LEAST_COSINE:
        expected = f"at least {LEAST_COSINE}: this checkpoint stays with dtype bf16"
        raise ConfigError(path, "cosine", calibration.cosine, expected)
    return calibration


def _number(path: Path, header: Mapping[str, str], key: str) -> float:
    try:
        return float(header[key])
    except (KeyError, ValueError):
        raise ConfigError(path, key, header.get(key, "nothing"), "a number") from None


def _check_names(path: Path, found: Iterable[str], wanted: set[str]) -> None:
    odd = sorted(wanted.symmetric_difference(found))
    if odd:
        known = "missing" if odd[0] in wanted else "unexpected"
        expected = f"the {len(wanted)} groups of layers of the checkpoint's model"
        raise ConfigError(path, odd[0], f"{known}, one of {len(odd)}", expected)


def _magnitude(path: Path, name: str, tensor: torch.Tensor) -> float:
    value = float(tensor) if tensor.numel() == 1 else math.nan
    if not (math.isfinite(value) and value > 0.0):
        found = value if tensor.numel() == 1 else list(tensor.shape)
        raise ConfigError(path, name, found, "one finite number above 0")
    return value
