"""What an engine is built from: validated, picklable, free of torch.

The control process builds these and hands them to the worker, so this module may import
neither torch nor anything that does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pruning.settings import PrunerSettings

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "fp32", "bf16", "fp8")
PATHS = ("auto", "eager", "graphs", "compiled", "fused")
IMAGE_DECODERS = ("auto", "cpu", "nvjpeg")


@dataclass(frozen=True)
class EngineSettings:
    """Everything `build_engine` needs. Every construction validates.

    Attributes:
        checkpoint: openpi or lerobot checkpoint directory.
        asset_id: Which of an openpi checkpoint's assets holds the statistics; None takes the only
            one.
        tokenizer: SentencePiece file; None takes the checkpoint's own or openpi's cache.
        device: ``auto`` takes CUDA where there is one.
        dtype: ``fp32``, ``bf16`` (openpi's mixed precision), ``fp8`` (the same with the language
            model's MLPs in FP8, for a checkpoint that was calibrated for it), or ``auto``: bf16 on
            CUDA, fp32 on CPU.
        path: ``eager`` runs the model one kernel after the other, ``graphs`` as CUDA graphs,
            ``compiled`` as CUDA graphs of what torch.compile makes of it, ``fused`` as CUDA graphs
            of this project's kernels; ``auto`` takes the fastest that runs on the device without
            a compilation.
        image_decoder: ``cpu`` decodes camera frames there, ``nvjpeg`` JPEGs on the GPU, with
            torchvision; ``auto`` takes the latter where it works.
        pruner: The pruning method of the first session.
        flow_steps: Euler steps of the action expert; None takes the checkpoint's (10).
        threads: torch threads on the CPU; 0 leaves torch's own choice.
        seed: Seed of the denoise noise when a step brings none.
        state_in_prompt: True writes the discretised state into the prompt (π0.5's own way).
        state_dim: State size of the layout, checked against the checkpoint's statistics;
            None accepts theirs.
        action_dim: Action size of the layout, likewise.
    """

    checkpoint: Path
    asset_id: str | None = None
    tokenizer: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    path: str = "auto"
    image_decoder: str = "auto"
    pruner: PrunerSettings = field(default_factory=PrunerSettings)
    flow_steps: int | None = None
    threads: int = 0
    seed: int = 0
    state_in_prompt: bool = True
    state_dim: int | None = None
    action_dim: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("device", DEVICES),
            ("dtype", DTYPES),
            ("path", PATHS),
            ("image_decoder", IMAGE_DECODERS),
        ):
            if (choice := getattr(self, name)) not in choices:
                raise ConfigError("parameter", name, choice, "one of " + ", ".join(choices))
        for key, minimum in (("flow_steps", 1), ("state_dim", 1), ("action_dim", 1)):
            value = getattr(self, key)
            if value is not None:
                _require_int(key, value, minimum)
        for key in ("threads", "seed"):
            _require_int(key, getattr(self, key), 0)


def _require_int(key: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError("parameter", key, value, f"an integer of at least {minimum}")
