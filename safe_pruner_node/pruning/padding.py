"""Which keys of an attention are text or padding, where a prompt fills only some of its slots."""

from __future__ import annotations

import torch
from torch import Tensor


def valid_keys(n_keys: int, first_text: int, slots: int, n_text: Tensor) -> Tensor:
    """Mark the keys that are no padding: those before the text, the text, those after its slots.

    Args:
        n_keys: Keys, M.
        first_text: Index of the first text key.
        slots: Keys of the text and its padding.
        n_text: How many of the slots are text, [] int64 on the device of the keys.

    Returns:
        True where valid, [M] bool.
    """
    index = torch.arange(n_keys, device=n_text.device)  # [M]
    return (index < first_text + n_text) | (index >= first_text + slots)
