"""A tokenised prompt, possibly padded so that prompts of many lengths share one static shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """Text tokens of one policy query.

    Attributes:
        tokens: Text, then padding if `n_valid` says so, [1, T] int64.
        n_valid: How many of them are text, [] int64, on the device of `tokens`; None: all are,
            and nothing needs a mask.
    """

    tokens: Tensor
    n_valid: Tensor | None = None

    @property
    def slots(self) -> int:
        """T: text tokens and padding."""
        return self.tokens.shape[1]

    def padded(self, multiple: int) -> Prompt:
        """The same text padded to the next multiple, with the number of text tokens beside it.

        Args:
            multiple: Tokens per bucket, at least 1.
        """
        if self.n_valid is not None:
            raise ValueError("a padded prompt is padded once")
        text = self.slots
        slots = -(-text // multiple) * multiple
        tokens = self.tokens.new_zeros(1, slots)
        tokens[:, :text] = self.tokens
        return Prompt(tokens, torch.full((), text, dtype=torch.int64, device=tokens.device))

    def to(self, device: torch.device) -> Prompt:
        """The same on another device."""
        if self.n_valid is None:
            return Prompt(self.tokens.to(device, non_blocking=True))
        n_valid = self.n_valid.to(device, non_blocking=True)
        return Prompt(self.tokens.to(device, non_blocking=True), n_valid)
