"""``make bench``: what each stage of a policy step costs, full and pruned, in one run.

    python -m safe_pruner_node.evaluation.bench [--steps 40] [--rho 0.75] [--threads 1] ...

The three ways to run a step take turns on the same frames with the same noise, so that whatever
else the machine does hits all three:

- vanilla: every token in every layer, trimmed (no empty camera, no text padding), no mask;
- SAFE keyframe: every token, plus matching, kappa and the deep saliency for the steps to come;
- SAFE pruned: what a step between keyframes costs.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track

from safe_pruner_node.engine.base import Engine
from safe_pruner_node.engine.build import load_policy, policy_engine
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.bench_report import Bench, Sample, draw, print_report, summarise
from safe_pruner_node.evaluation.run_record import git_revision
from safe_pruner_node.pi05.checkpoint import Checkpoint
from safe_pruner_node.pruning.settings import load_preset
from safe_pruner_node.types import FloatArray, PolicyInput, RgbImage

CAMERAS = ("head", "left_wrist", "right_wrist")
FRAME_HEIGHT, FRAME_WIDTH = 360, 640


@dataclass(frozen=True)
class BenchOptions:
    """Times one policy step: vanilla, SAFE keyframe and SAFE pruned, taking turns."""

    checkpoint: Path = Path("checkpoints/nano")
    """Policy to time; the small random-weight one is built when it is not there."""
    out: Path = Path("runs/bench")
    """Where bench.json and bench.png go."""
    preset: str = "robot"
    """Preset of config/pruners.yaml; its method must be `safe`."""
    rho: float = 0.75
    """Share of the valid visual tokens that is dropped."""
    query_rows: str | None = None
    """text or action_probe instead of the preset's early query rows."""
    steps: int = 40
    """Timed steps of each mode."""
    warm_up: int = 3
    """Steps of each mode before the timing begins."""
    cameras: int = 3
    """Cameras, 1 to 3."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, fp32, bf16, or fp8 for a checkpoint calibrated for it."""
    threads: int = 1
    """CPU threads; 0 leaves torch's choice (all cores)."""
    prompt: str = "pick up the red cube and place it in the bowl"
    """The task in words."""
    seed: int = 0
    """Seed of the frames and of the noise."""

    def __post_init__(self) -> None:
        for key, low, high in (("steps", 1, 100_000), ("warm_up", 1, 1000), ("cameras", 1, 3)):
            value = getattr(self, key)
            if not low <= value <= high:
                raise ConfigError("parameter", key, value, f"{low}..{high}")


class MovingScene:
    """Endless frames that change a little: smooth texture, panned and brightened, plus noise.

    Args:
        cameras: How many.
        seed: Of the texture and the noise.
    """

    def __init__(self, cameras: int, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._textures = [
            np.asarray(
                cv2.resize(
                    self._random.uniform(0, 255, (18, 40, 3)),
                    (2 * FRAME_WIDTH, FRAME_HEIGHT),
                    interpolation=cv2.INTER_CUBIC,
                ),
                dtype=np.float64,
            )
            for _ in range(cameras)
        ]

    def frames(self, t: int) -> dict[str, RgbImage]:
        """Camera to frame number t, [360, 640, 3]."""
        shift = round(FRAME_WIDTH / 2 * (1 + np.sin(t / 160)))  # up to 2 pixels a frame
        return {
            name: self._frame(texture[:, shift : shift + FRAME_WIDTH])
            for name, texture in zip(CAMERAS, self._textures, strict=False)
        }

    def _frame(self, view: FloatArray) -> RgbImage:
        noise = self._random.normal(0.0, 4.0, view.shape)
        return np.clip(view + noise, 0, 255).astype(np.uint8)


def main() -> int:
    """Entry point of ``make bench``; returns the exit status."""
    console = Console()
    try:
        bench = run(tyro.cli(BenchOptions))
    except ConfigError as error:
        console.print(f"[red]bench failed:[/red] {error}")
        return 1
    print_report(bench, console)
    return 0


def run(options: BenchOptions) -> Bench:
    """Time the modes, write bench.json and bench.png.

    Args:
        options: What to time.

    Raises:
        ConfigError: Options, checkpoint and preset do not fit.
    """
    preset = load_preset(None, options.preset, options.rho)
    if preset.method != "safe":
        raise ConfigError("parameter", "preset", options.preset, "a preset of method safe")
    if options.query_rows is not None:
        preset = replace(preset, query_rows=options.query_rows)
    pruners = {
        "vanilla": load_preset(None, "vanilla"),
        "SAFE keyframe": replace(preset, gamma=1.01),  # kappa is at most 1: always one
        "SAFE pruned": replace(preset, gamma=-1.0),  # never one after the first
    }
    settings = EngineSettings(
        options.checkpoint,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        seed=options.seed,
    )
    checkpoint, tokenizer = load_policy(settings)  # one set of weights for all
    engines = {
        mode: policy_engine(checkpoint, tokenizer, replace(settings, pruner=pruner))
        for mode, pruner in pruners.items()
    }
    bench = _measure(engines, checkpoint, options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench.json").write_text(json.dumps(summarise(bench), indent=2) + "\n")
    draw(bench, options.out / "bench.png")
    return bench


def _measure(engines: Mapping[str, Engine], checkpoint: Checkpoint, options: BenchOptions) -> Bench:
    scene = MovingScene(options.cameras, options.seed)
    samples: dict[str, list[Sample]] = {mode: [] for mode in engines}
    total = options.warm_up + options.steps
    for t in track(range(total), "timing", console=Console(stderr=True)):
        inputs = PolicyInput(scene.frames(t), _state(checkpoint, t), options.prompt)
        modes = list(engines)
        for mode in modes[t % 3 :] + modes[: t % 3]:  # each goes first as often as the others
            started = time.perf_counter()
            _, report = engines[mode].step(inputs)
            step_ms = (time.perf_counter() - started) * 1e3
            if t >= options.warm_up:
                samples[mode].append(Sample(step_ms, report))
    return Bench(
        samples=samples,
        about={
            "checkpoint": str(options.checkpoint),
            "checkpoint_id": checkpoint.identity,
            "model": checkpoint.config.name,
            "engine": engines["vanilla"].describe(),
            "processor": _processor(),
            "preset": options.preset,
            "rho": options.rho,
            "query_rows": options.query_rows or load_preset(None, options.preset).query_rows,
            "cameras": options.cameras,
            "steps": options.steps,
            "warm_up": options.warm_up,
            "seed": options.seed,
            "torch": torch.__version__,
            "numpy": version("numpy"),
            "python": platform.python_version(),
            "git": git_revision(Path(__file__).parent),
        },
    )


def _state(checkpoint: Checkpoint, t: int) -> FloatArray:
    """A state that moves inside the range of the statistics."""
    stats = checkpoint.norm_stats
    assert stats is not None  # noqa: S101 - load_policy has checked
    low, high = stats.state.q01, stats.state.q99
    if low is None or high is None:
        return np.zeros(stats.state.dim)
    phase = np.arange(stats.state.dim)
    return np.asarray(low + (high - low) * (0.5 + 0.4 * np.sin(t / 20 + phase)))


def _processor() -> str:
    """Name of the processor (and of the GPU in use)."""
    names = [platform.processor() or platform.machine()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join([f"{len(names)} x {names[0]}" if names else platform.machine(), *gpu])


if __name__ == "__main__":
    sys.exit(main())
