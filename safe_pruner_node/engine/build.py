"""From settings to an engine that is ready to be warmed."""

from __future__ import annotations

import torch

from safe_pruner_node.engine.base import Engine
from safe_pruner_node.engine.compiled import CompiledRunner
from safe_pruner_node.engine.fp8 import layer_groups, quantise
from safe_pruner_node.engine.fp8_calibration import read_calibration
from safe_pruner_node.engine.fused import FusedRunner, unsupported
from safe_pruner_node.engine.graphs import GraphRunner
from safe_pruner_node.engine.nvjpeg import NvJpeg, choose_decoder
from safe_pruner_node.engine.policy import PolicyEngine
from safe_pruner_node.engine.runner import EagerRunner, Runner
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.checkpoint import Checkpoint, load_checkpoint
from safe_pruner_node.pi05.model import Pi05
from safe_pruner_node.pi05.tokenizer import PromptTokenizer, find_tokenizer

FP8_CAPABILITY = (8, 9)
"""Of the first CUDA GPUs that multiply FP8: Ada, then Hopper."""


def build_engine(settings: EngineSettings) -> Engine:
    """Load the checkpoint and build the engine on the chosen device.

    Args:
        settings: Validated settings.

    Raises:
        ConfigError: Checkpoint, tokenizer, statistics, device, image decoder or pruner do not fit.
    """
    decoder = choose_decoder(settings.image_decoder, choose_device(settings.device))
    return policy_engine(*load_policy(settings), settings, decoder)


def load_policy(settings: EngineSettings) -> tuple[Checkpoint, PromptTokenizer]:
    """What several engines may share: the weights on their device, and the tokenizer.

    Raises:
        ConfigError: Checkpoint, tokenizer, statistics or device do not fit.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    check_path(settings.path, device)  # before a large checkpoint is read
    fp8 = settings.dtype == "fp8"
    if fp8:
        check_fp8(device)
    dtype = "bf16" if fp8 else settings.dtype
    checkpoint = load_checkpoint(
        settings.checkpoint, device=device, dtype=dtype, asset_id=settings.asset_id
    )
    if fp8:
        groups = layer_groups(checkpoint.model)
        quantise(checkpoint.model, read_calibration(settings.checkpoint, groups).largest)
    _check_sizes(checkpoint, settings)
    path = find_tokenizer(settings.checkpoint, settings.tokenizer)
    tokenizer = PromptTokenizer(path, checkpoint.config.max_prompt_tokens)
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise ConfigError(
            path,
            "tokenizer",
            f"{tokenizer.vocab_size} pieces",
            f"at most {checkpoint.config.vocab_size}, the rows of the checkpoint's embedding",
        )
    return checkpoint, tokenizer


def policy_engine(
    checkpoint: Checkpoint,
    tokenizer: PromptTokenizer,
    settings: EngineSettings,
    decoder: NvJpeg | None = None,
) -> PolicyEngine:
    """An engine with a session of its own on a loaded policy.

    Args:
        checkpoint: The policy.
        tokenizer: Its tokenizer.
        settings: Validated settings.
        decoder: Decodes its camera frames; None where they come decoded.

    Raises:
        ConfigError: The pruner does not fit the model, or the path the device.
    """
    return PolicyEngine(
        checkpoint,
        tokenizer,
        settings.pruner,
        flow_steps=settings.flow_steps,
        seed=settings.seed,
        state_in_prompt=settings.state_in_prompt,
        runner=choose_runner(settings.path, checkpoint.model),
        decoder=decoder,
    )


def choose_device(name: str) -> torch.device:
    """The torch device of ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: ``cuda`` where torch sees no CUDA device.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        found = "cuda, but torch sees no CUDA device"
        raise ConfigError("parameter", "device", found, "cpu, or a CUDA build of torch and a GPU")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def check_fp8(device: torch.device) -> None:
    """Refuse a device that does not multiply FP8.

    Raises:
        ConfigError: A CPU, or a GPU before Ada and Hopper.
    """
    if device.type != "cuda":
        found = f"fp8, on device {device.type}"
    elif (capability := torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        found = f"fp8, on {name} of compute capability {'.'.join(map(str, capability))}"
    else:
        return
    least = ".".join(map(str, FP8_CAPABILITY))
    expected = f"auto, fp32 or bf16: FP8 needs a CUDA GPU of compute capability {least}"
    raise ConfigError("parameter", "dtype", found, expected)


def check_path(path: str, device: torch.device) -> None:
    """Refuse what a device cannot run, whatever the model.

    Raises:
        ConfigError: ``graphs`` or ``fused`` on a CPU.
    """
    if path in ("graphs", "fused") and device.type != "cuda":
        found = f"{path}, on device {device.type}"
        raise ConfigError("parameter", "path", found, "auto, eager or compiled: a CPU has no such")


def choose_runner(path: str, model: Pi05) -> Runner:
    """A new runner for a model, of a path in `settings.PATHS`.

    Raises:
        ConfigError: The path does not fit the model or its device.
    """
    check_path(path, model.device)
    if path == "eager" or (path == "auto" and model.device.type != "cuda"):
        return EagerRunner()
    if path == "compiled":
        return CompiledRunner(model.device)
    if path == "graphs":
        return GraphRunner(model.device)
    if (reason := unsupported(model)) is None:
        return FusedRunner(model)
    if path == "fused":
        expected = f"auto, graphs or compiled: {reason}"
        raise ConfigError("parameter", "path", path, expected)
    return GraphRunner(model.device)


def _check_sizes(checkpoint: Checkpoint, settings: EngineSettings) -> None:
    stats = checkpoint.norm_stats
    if stats is None:
        raise ConfigError(checkpoint.stats_path, "", "no such file", "the policy's statistics")
    for key, wanted, found in (
        ("state", settings.state_dim, stats.state.dim),
        ("actions", settings.action_dim, stats.actions.dim),
    ):
        if wanted is not None and wanted != found:
            raise ConfigError(
                checkpoint.stats_path,
                key,
                f"{found} channels",
                f"{wanted}, as the robot's layout",
            )
