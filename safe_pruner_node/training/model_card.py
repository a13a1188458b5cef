"""README.md of a trained checkpoint: what it is, what it is not, how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from safe_pruner_node.pi05.model import Pi05
from safe_pruner_node.training.validation import OpenLoopError

if TYPE_CHECKING:
    from safe_pruner_node.training.train import TrainOptions
    from safe_pruner_node.training.training_set import TrainingSet


def model_card(
    model: Pi05,
    training_set: TrainingSet,
    options: TrainOptions,
    command: str,
    steps: int,
    elapsed_s: float,
    errors: Sequence[OpenLoopError],
) -> str:
    """The card as Markdown."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    config = model.config
    episodes = sum(training_set.tasks.values())
    names = ", ".join(f"`{path.name}`" for path in training_set.paths)
    prompts = "\n".join(f"- {task} ({n})" for task, n in sorted(training_set.tasks.items()))
    return f"""# π0.5 {config.name}: small, trained on scripted demonstrations in the twin

A π0.5 of {parameters:.1f} M parameters (the published model has 3353), trained \
{_beginning(options)} on
{episodes} demonstrations. It knows its prompts and its robot, nothing else: no pretraining, no
other scenes, objects or wordings. **It is not for a real robot.**

## Data

{names}, LeRobot format, {training_set.fps:g} frames per second,
{len(training_set.samples.rows)} samples (every {options.stride}. frame), \
{int(training_set.held_out.sum())} of them held out.

Prompts and demonstrations of each:

{prompts}

## Training

- `python -m safe_pruner_node.training.train {command}`
- {steps} steps of {options.batch} samples, {options.flow_repeats} flow draws each, \
{elapsed_s / 60:.1f} minutes; seed {options.seed}
- flow matching as openpi's; AdamW, peak learning rate {options.learning_rate:g}; exported is the
  moving average ({options.ema:g}); augmentation: {options.augment}
- auxiliary loss ({options.landmark_weight:g}) on the privileged positions of the data set, in
  training only
{_shares(options.keep_shares)}\
- open-loop error on held-out episodes, normalised, over the first third of a chunk and all of it:
  {"; ".join(map(str, errors))}

## Interface

- openpi layout; {config.horizon} actions per chunk, {config.flow_steps} flow steps,
  {config.vision.tokens} tokens per camera
- conventions (rate, delta or absolute, cameras): section `policy` of `config/astribot_s1.yaml`
- `tokenizer.model` is a small SentencePiece model made for it, not PaliGemma's

## Licence

Apache-2.0, as the code.
"""


def _beginning(options: TrainOptions) -> str:
    return "from scratch" if options.start is None else f"further, from `{options.start}`,"


def _shares(shares: Sequence[float]) -> str:
    """What the card says of tokens left out; nothing when none were."""
    if all(share == 1.0 for share in shares):
        return ""
    listed = ", ".join(f"{share:g}" for share in shares)
    return f"""- **visual tokens were left out in training**, as a pruner leaves them out: the steps
  saw, in turn, {listed} of them from the pruning layer on, chosen by the policy's own late
  attention, blurred
"""
