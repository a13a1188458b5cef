"""Trains a small π0.5 on demonstrations: ``python -m safe_pruner_node.training.train --help``."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.checkpoint import load_checkpoint, mixed_dtype, save_openpi
from safe_pruner_node.pi05.config import NANO, Pi05Config
from safe_pruner_node.pi05.model import Pi05
from safe_pruner_node.pi05.nano import ASSET_ID, train_tokenizer
from safe_pruner_node.pi05.tokenizer import PromptTokenizer
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.training.augmentation import AugmentationKind
from safe_pruner_node.training.batches import BatchSource, Prefetcher
from safe_pruner_node.training.initial import fresh_model
from safe_pruner_node.training.learner import Learner
from safe_pruner_node.training.model_card import model_card
from safe_pruner_node.training.objective import best_tokens
from safe_pruner_node.training.progress import TrainingProgress
from safe_pruner_node.training.schedule import Budget
from safe_pruner_node.training.training_set import TrainingSet, load_training_set
from safe_pruner_node.training.validation import OpenLoopError, open_loop_error, predict

STATE = "state.pt"
LOG = "log.jsonl"


@dataclass(frozen=True)
class TrainOptions:
    """Flow-matching training of a small π0.5 on a LeRobot data set; resumes where it stopped."""

    dataset: tuple[Path, ...]
    """LeRobot v3 data sets: demonstrations of the twin, or your own teleoperation."""
    out: Path = Path("runs/train")
    """Where the state, the log and, at the end, the checkpoint go."""
    start: Path | None = None
    """Checkpoint to go on from: sizes, weights, tokenizer, statistics; none: a fresh nano."""
    robot_config: Path | None = None
    """Robot file: layout, action rate, absolute or delta; none takes config/astribot_s1.yaml."""
    steps: int = 0
    """Optimizer steps; 0 leaves it to --minutes."""
    minutes: float = 20.0
    """Training time over all resumed runs, without loading; 0 leaves it to --steps."""
    stop_after_minutes: float = 0.0
    """Stop this call early, resumable, after so many minutes of training; 0 never."""
    batch: int = 256
    """Samples per optimizer step."""
    micro_batches: int = 1
    """Parts of a batch, each of prompts of one length (lengths differ? more parts mix better)."""
    flow_repeats: int = 4
    """Draws of noise and flow time per sample; they share one pass over the images."""
    learning_rate: float = 1e-3
    """Peak; rises at first, then falls like a cosine."""
    ema: float = 0.999
    """Part of the weight average that stays at each step; the average is what is exported."""
    landmark_weight: float = 0.5
    """Weight of the auxiliary loss on the data set's environment_state; 0 switches it off."""
    keep_shares: tuple[float, ...] = (1.0,)
    """Shares of the visual tokens that the steps see from the pruning layer on, in turn. Below 1
    the policy's own late attention chooses them, so that it bears a pruner; costs a pass more."""
    augment: AugmentationKind = "openpi"
    """openpi: crop, rotation and colours; colour: colours only; none."""
    stride: int = 2
    """Every how many frames one becomes a sample."""
    validation_share: float = 0.02
    """Episodes held out for the open-loop error."""
    validation_samples: int = 384
    """Samples of the held-out episodes that the open-loop error is taken over."""
    validate_minutes: float = 2.0
    """Time between two open-loop errors (and saves of the state)."""
    workers: int = 2
    """Threads that decode the videos."""
    device: str = "auto"
    """auto, cpu or cuda."""
    seed: int = 0
    """Of the weights, the order and the noise."""


def main() -> int:
    """Entry point."""
    options = tyro.cli(TrainOptions)
    console = Console()
    try:
        line = train(options, console)
    except ConfigError as error:
        console.print(f"[red]training failed:[/red] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print(f"stopped by hand; the same command goes on from {options.out / STATE}")
        return 130
    console.print(line, highlight=False)
    return 0


def train(options: TrainOptions, console: Console) -> str:
    """Run one call of the trainer.

    Returns:
        The summary line.

    Raises:
        ConfigError: The data set, the checkpoint or the options do not fit.
    """
    _check(options)
    torch.manual_seed(options.seed)
    device = _device(options.device)
    robot = load_robot_config(options.robot_config or resource("config/astribot_s1.yaml"))
    options.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer, stats = _beginning(options)
    training_set = load_training_set(
        options.dataset,
        robot,
        model.config,
        tokenizer,
        stats=stats,
        stride=options.stride,
        validation_share=options.validation_share,
        workers=options.workers,
        console=console,
    )
    coordinates = training_set.landmark_coordinates if options.landmark_weight else 0
    learner = Learner(model, coordinates, device, options.ema)
    elapsed_s = _resume(options, learner, console)
    run = _Run(options, training_set, learner, device, elapsed_s, console)
    errors = run.loop()
    if errors is None:
        return f"stopped at step {learner.step}, resumable: the same command goes on"
    directory = options.out / "checkpoint"
    _export(directory, learner, training_set, tokenizer, options, errors, run.elapsed_s)
    return (
        f"{directory}: {learner.step} steps in {run.elapsed_s / 60:.1f} min on {device.type}, "
        f"open-loop error, normalised: {'; '.join(map(str, errors))}"
    )


class _Run:
    """The loop of one call."""

    def __init__(
        self,
        options: TrainOptions,
        training_set: TrainingSet,
        learner: Learner,
        device: torch.device,
        elapsed_s: float,
        console: Console,
    ) -> None:
        self._options = options
        self._set = training_set
        self._learner = learner
        self._device = device
        self._console = console
        self._before_s = self.elapsed_s = elapsed_s
        # These compile kernels, and the learning rate follows the clock: it starts after them.
        self._untimed_steps = 1 + len(options.keep_shares)
        self._budget = Budget(options.steps, options.minutes)
        self._random = torch.Generator(device).manual_seed(options.seed + 7919 * learner.step)

    def loop(self) -> list[OpenLoopError] | None:
        """Train until the budget is spent; returns the last errors, None when it is not spent."""
        options, learner = self._options, self._learner
        micro = options.batch // options.micro_batches
        source = BatchSource(self._set, self._device, options.augment, options.seed)
        begun_s = time.monotonic()
        next_validation_s = 60.0 * options.validate_minutes
        steps_here = 0
        progress = TrainingProgress(self._console, options.out / LOG)
        with progress, Prefetcher(source, micro, learner.step * options.micro_batches) as batches:
            while True:
                here_s = time.monotonic() - begun_s if steps_here >= self._untimed_steps else 0.0
                self.elapsed_s = self._before_s + here_s
                done = self._budget.progress(learner.step, self.elapsed_s)
                if done >= 1.0:
                    break
                rate = self._budget.learning_rate(done, options.learning_rate)
                keep_share = options.keep_shares[learner.step % len(options.keep_shares)]
                found = [
                    learner.accumulate(
                        next(batches),
                        options.flow_repeats,
                        1.0 / options.micro_batches,
                        options.landmark_weight,
                        keep_share,
                        self._random,
                    )
                    for _ in range(options.micro_batches)
                ]
                norm = learner.update(rate)
                steps_here += 1
                if steps_here == self._untimed_steps:
                    if self._device.type == "cuda":
                        torch.cuda.synchronize()
                    begun_s = time.monotonic()
                progress.step(learner.step, done, self.elapsed_s, found, norm, rate, options.batch)
                if here_s > next_validation_s:
                    next_validation_s = here_s + 60.0 * options.validate_minutes
                    progress.validated(learner.step, self._validate())
                    self._save()
                if options.stop_after_minutes and here_s > 60.0 * options.stop_after_minutes:
                    self._save()
                    return None
        errors = self._validate()
        progress.validated(learner.step, errors)
        self._save()
        return errors

    def _save(self) -> None:
        self._learner.save(
            self._options.out / STATE, elapsed_s=self.elapsed_s, options=_fixed(self._options)
        )

    def _validate(self) -> list[OpenLoopError]:
        """Open-loop errors of the averaged weights on held-out episodes, for every share."""
        shares = sorted({1.0, *self._options.keep_shares}, reverse=True)
        return [self._error(share) for share in shares]

    def _error(self, share: float) -> OpenLoopError:
        source = BatchSource(self._set, self._device, "none", 0)
        random = torch.Generator(self._device).manual_seed(0)
        model, predicted, wanted = self._learner.average, [], []
        for batch in source.held_out(self._options.validation_samples, self._options.batch):
            noise = torch.randn(batch.actions.shape, generator=random, device=self._device)
            kept = best_tokens(model, batch, self._learner.pruner, share, random)
            predicted.append(predict(model, batch, noise, kept))
            wanted.append(batch.actions)
        return open_loop_error(predicted, wanted, share)


def _check(options: TrainOptions) -> None:
    if not options.dataset:
        raise ConfigError("--dataset", "", "none", "a LeRobot data set, or several")
    for key, value, least in (
        ("--batch", options.batch, 1),
        ("--micro-batches", options.micro_batches, 1),
        ("--flow-repeats", options.flow_repeats, 1),
        ("--stride", options.stride, 1),
        ("--workers", options.workers, 1),
    ):
        if value < least:
            raise ConfigError(key, "", value, f"at least {least}")
    if not options.keep_shares or not all(0.0 < share <= 1.0 for share in options.keep_shares):
        expected = "numbers above 0, at most 1"
        raise ConfigError("--keep-shares", "", list(options.keep_shares), expected)
    if options.batch % options.micro_batches:
        expected = f"a multiple of --micro-batches, {options.micro_batches}"
        raise ConfigError("--batch", "", options.batch, expected)
    if not options.steps and not options.minutes:
        raise ConfigError("--steps", "", "0, and --minutes 0", "a bound")


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("--device", "", "cuda, but torch sees no CUDA device", "cpu")
    device = torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return device


def _beginning(options: TrainOptions) -> tuple[Pi05, PromptTokenizer, Any]:
    """Model, tokenizer and, from a checkpoint, its statistics."""
    if options.start is None:
        path = options.out / "tokenizer.model"
        if not path.exists():
            path.write_bytes(train_tokenizer(NANO.vocab_size))
        tokenizer = PromptTokenizer(path, NANO.max_prompt_tokens)
        return fresh_model(NANO, tokenizer, options.seed), tokenizer, None
    checkpoint = load_checkpoint(options.start, dtype="fp32")
    if checkpoint.tokenizer_path is None:
        expected = "the checkpoint's tokenizer"
        raise ConfigError(options.start / "tokenizer.model", "", "no such file", expected)
    model = checkpoint.model.requires_grad_(requires_grad=True).train()
    config: Pi05Config = checkpoint.config
    tokenizer = PromptTokenizer(checkpoint.tokenizer_path, config.max_prompt_tokens)
    return model, tokenizer, checkpoint.norm_stats


def _fixed(options: TrainOptions) -> dict[str, str]:
    """Options that a resumed run may not change."""
    free = {"out", "stop_after_minutes", "workers", "device", "validate_minutes"}
    free |= {"validation_samples"}
    return {k: str(v) for k, v in dataclasses.asdict(options).items() if k not in free}


def _resume(options: TrainOptions, learner: Learner, console: Console) -> float:
    """Take up an interrupted run; returns its training time so far, s."""
    path = options.out / STATE
    if not path.exists():
        return 0.0
    state = torch.load(path, map_location=learner.device, weights_only=True)
    for key, value in _fixed(options).items():
        if state["options"].get(key) != value:
            raise ConfigError(
                path,
                key,
                f"a run with {state['options'].get(key)}, asked for {value}",
                "the same options, or another --out",
            )
    learner.load(state)
    console.print(f"resumed at step {learner.step}", highlight=False)
    return float(state["elapsed_s"])


def _export(
    directory: Path,
    learner: Learner,
    training_set: TrainingSet,
    tokenizer: PromptTokenizer,
    options: TrainOptions,
    errors: Sequence[OpenLoopError],
    elapsed_s: float,
) -> None:
    """The averaged weights as a checkpoint in openpi's layout, with a model card."""
    model = learner.average
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(mixed_dtype(name))
    save_openpi(directory, model.cpu(), training_set.stats, ASSET_ID, tokenizer.model_path)
    command = " ".join(sys.argv[1:])
    card = model_card(model, training_set, options, command, learner.step, elapsed_s, errors)
    (directory / "README.md").write_text(card, encoding="utf-8")
    record = {"steps": learner.step, "minutes": elapsed_s / 60, "command": command}
    (options.out / "summary.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
