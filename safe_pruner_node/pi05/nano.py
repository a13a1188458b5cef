"""Builds the `nano` checkpoint: random weights, real layout, to run the whole system without 7 GB.

    python -m safe_pruner_node.pi05.nano DIR [--seed N]

The transformers are random. The action projections are not quite: they are arranged so that the
flow contracts from any noise to one smooth, bounded chunk that depends on images and prompt, as a
trained policy's does: a slow drift of the arms from where they are, safe to play.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import nn
from torch.nn.functional import interpolate

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.checkpoint import WEIGHTS, checkpoint_id, mixed_dtype, save_openpi
from safe_pruner_node.pi05.config import NANO, Pi05Config
from safe_pruner_node.pi05.model import Pi05
from safe_pruner_node.pi05.tokenizer import PromptTokenizer
from safe_pruner_node.pi05.transforms import FeatureStats, NormStats
from safe_pruner_node.types import FloatArray

ASSET_ID = "astribot_s1"
ARM_HOME = np.array([0.159, -0.022, -1.42, 1.66, -0.345, 0.115, 0.125])
"""Left arm at home, rad (vendor SDK); the right arm mirrors joints 1, 3, 5 and 7."""
MIRROR = np.array([-1, 1, -1, 1, -1, 1, -1])
ARM_SPAN = 0.15
"""The normalised range [-1, 1] covers ± this many rad, of the state about home, of a delta about
the observed state."""

CONTRACTION = 6.0
"""dv/dx of the flow: ten Euler steps shrink the noise by (1 - 0.6)^10 = 1e-4."""
WANDER = 0.15
"""Residual gate of the random layers: how far their say moves the chunk."""
SHARPNESS = 5.0
"""Scale of the expert's queries: attention picks something instead of averaging everything."""
SLOW_ROPE = 8
"""Rotary pairs below this turn fast (1 to 0.1 rad per action) and would make actions jitter."""


def build_nano(directory: str | Path, seed: int = 0) -> Path:
    """Write a nano checkpoint in openpi's layout; the same seed gives the same files.

    Args:
        directory: Created if absent; an existing checkpoint there is overwritten.
        seed: Of the random weights.

    Returns:
        The directory.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "parameter", "DIR", f"{directory}: {error.strerror}", "a folder"
        ) from None
    tokenizer = directory / "tokenizer.model"
    tokenizer.write_bytes(train_tokenizer(NANO.vocab_size))
    with _one_thread():
        model = random_model(NANO, seed)
        centre(model, PromptTokenizer(tokenizer, NANO.max_prompt_tokens), seed)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(mixed_dtype(name))
    (directory / "README.md").write_text(_model_card(model, seed), encoding="utf-8")
    save_openpi(directory, model, s1_norm_stats(), ASSET_ID, tokenizer)
    return directory


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are taken in an order that depends on the threads; the files must not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def s1_norm_stats() -> NormStats:
    """Statistics of the 16-D S1 layout: left arm 7, right arm 7, left and right gripper."""
    home = np.concatenate([ARM_HOME, ARM_HOME * MIRROR, [50.0, 50.0]])  # grippers 0..100
    span = np.concatenate([np.full(14, ARM_SPAN), [50.0, 50.0]])
    rest = np.where(np.arange(16) < 14, 0.0, home)  # arms: deltas; grippers: absolute
    return NormStats(state=_about(home, span), actions=_about(rest, span))


def _about(middle: FloatArray, span: FloatArray) -> FeatureStats:
    return FeatureStats(mean=middle, std=span / 2, q01=middle - span, q99=middle + span)


def random_model(config: Pi05Config, seed: int) -> Pi05:
    """A model with random weights and a contracting flow."""
    random = torch.Generator().manual_seed(seed)
    model = Pi05(config).requires_grad_(requires_grad=False).eval()
    for module in model.modules():
        _randomize(module, random)
    model.vlm.embed_tokens.weight /= math.sqrt(config.vlm.width)  # scaled up again on use
    _contract(model, random)
    _calm(model)
    return model


def _randomize(module: nn.Module, random: torch.Generator) -> None:
    """Fan-in scaled normal weights, zero biases; norms stay at identity."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        fan_in = module.weight[0].numel()
        module.weight.normal_(0.0, fan_in**-0.5, generator=random)
        if module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, nn.Embedding):
        module.weight.normal_(0.0, 1.0, generator=random)


def _contract(model: Pi05, random: torch.Generator) -> None:
    """Arrange the action path so that v = CONTRACTION * x_t + a bounded random function.

    Actions enter the residual stream through orthonormal columns next to a much larger constant,
    so that the final norm divides by nearly a constant, and leave through the same columns.
    """
    config = model.config
    width, actions = config.expert.width, config.action_dim
    basis, _ = torch.linalg.qr(torch.randn(width, actions + 1, generator=random))  # [D, A + 1]
    columns, constant = basis[:, :actions], basis[:, actions]
    loudness = 4.0 * math.sqrt(actions)  # four times the norm of unit noise
    model.action_in_proj.weight.copy_(columns)
    model.action_in_proj.bias.copy_(constant * loudness)
    model.action_out_proj.weight.copy_(columns.T * CONTRACTION * loudness / math.sqrt(width))
    model.expert.norm.dense.weight.zero_()


def _calm(model: Pi05) -> None:
    """Let the expert's layers speak softly, choose clearly, and vary slowly along the chunk."""
    config = model.config.expert
    pair = torch.arange(config.head_dim) % (config.head_dim // 2)
    scale = torch.where(pair < SLOW_ROPE, 0.0, SHARPNESS).repeat(config.heads)  # [h*d]
    for layer in model.expert.blocks():
        layer.self_attn.q_proj.weight *= scale[:, None]
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.dense.weight *= 0.2  # how much the flow time matters
            norm.dense.bias[2 * config.width :] = WANDER


def centre(model: Pi05, tokenizer: PromptTokenizer, seed: int) -> None:
    """Move the chunk, averaged over a few scenes and states, to the middle of its range."""
    config = model.config
    random = torch.Generator().manual_seed(seed)
    side, noise = config.vision.image, torch.zeros(1, config.horizon, config.action_dim)
    chunks = []
    for prompt in ("pick up the red cube", "open the drawer", "hand over the cup", "push the box"):
        blobs = torch.rand(3, 3, 8, 8, generator=random) * 2 - 1
        images = interpolate(blobs, size=(side, side), mode="bilinear")  # [cameras, 3, S, S]
        state = torch.rand(16, generator=random) - 0.5  # normalised, about the middle
        tokens = torch.from_numpy(tokenizer.encode(prompt, state.double().numpy()))[None]
        chunks.append(model.sample_actions(images.split(1), tokens, noise))
    rest = torch.cat(chunks).mean((0, 1)).round(decimals=1)  # [A]; the same on any machine
    model.action_out_proj.bias.add_(CONTRACTION * rest)


def train_tokenizer(vocab_size: int) -> bytes:
    """A SentencePiece model with PaliGemma's special ids; the state's bins are whole pieces."""
    bins = [f"▁{i}" for i in range(-1, 256)]  # ▁ is SentencePiece's space
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_sentences()),
        model_writer=proto,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,  # any prompt can be written
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["\n", *bins],
        num_threads=1,
        minloglevel=2,
    )
    return proto.getvalue()


def _sentences() -> list[str]:
    """Task sentences whose words become pieces: those of the twin's tasks among them."""
    verbs = ["pick up", "grasp", "lift", "push", "move", "place", "hand over", "open", "close"]
    colours = ["red", "green", "blue", "yellow", "white", "black", "orange", "pink", "purple"]
    colours += ["cyan", "small", "large"]
    things = ["cube", "block", "bottle", "cup", "bowl", "box", "towel", "drawer", "ball", "tray"]
    things += ["brick", "can", "hexagon", "cross", "egg", "arch", "puck", "doll", "lid", "plate"]
    places = [
        "and place it in the bowl",
        "and place it on the plate",
        "with the left arm",
        "with both arms",
        "onto the table",
        "to the other hand",
        "into the box",
        "and close the lid",
    ]
    tasks = itertools.product(verbs, colours, things, places)
    sentences = [f"{v} the {c} {t} {p}" for v, c, t, p in tasks]
    sentences += ["pick up the orange basketball and throw it through the hoop"] * 400
    sentences += ["put the pink doll in the box and close the lid"] * 400
    return [f"Task: {sentence}, State: 0;\nAction: " for sentence in sentences]


def _model_card(model: Pi05, seed: int) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    return f"""# π0.5 nano, RANDOM weights

Not a trained policy: it knows no task. {parameters / 1e6:.1f} M parameters drawn at random with
seed {seed}, in the layout of an openpi checkpoint, to run and time the whole system.

- Every mechanism of π0.5 at a small size: SigLIP-style tower with {model.config.vision.tokens}
  tokens per camera, one key/value head, adaRMS expert, flow matching, horizon
  {model.config.horizon}.
- The action projections are arranged so that the flow contracts to one smooth chunk that depends
  a little on images and prompt.
- Actions: 16-D Astribot S1 layout (left arm 7, right arm 7, grippers); arms relative to the
  observed state, normalised range ± {ARM_SPAN} rad, grippers absolute 0..100.
- `tokenizer.model` was trained on the spot on a few hundred made-up task sentences; it is not
  PaliGemma's.
"""


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Build the random-weight nano checkpoint.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        directory = build_nano(options.directory, options.seed)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    megabytes = (directory / WEIGHTS).stat().st_size / 1e6
    sys.stdout.write(
        f"{directory}: nano with RANDOM weights, seed {options.seed}, {megabytes:.1f} MB, "
        f"id {checkpoint_id(directory)}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
