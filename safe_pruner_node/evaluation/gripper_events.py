"""When hands close and open, from what was commanded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CLOSED, OPEN = 60.0, 40.0
"""Command above which a hand counts as closed, and below which as open again (0..100)."""


@dataclass(frozen=True)
class GripperEvent:
    """A hand closes or opens.

    Attributes:
        time_s: When.
        hand: Column of the command.
        closes: True when it closes.
    """

    time_s: float
    hand: int
    closes: bool


def gripper_events(
    time_s: NDArray[np.floating], gripper: NDArray[np.floating]
) -> list[GripperEvent]:
    """Every closing and opening, in order of time.

    Args:
        time_s: Times of the commands, s, [T].
        gripper: Commands, 0 open to 100 closed, [T, hands].
    """
    events = []
    for hand in range(gripper.shape[1] if gripper.ndim == 2 else 0):
        closed = bool(len(gripper)) and bool(gripper[0, hand] > CLOSED)
        for now_s, command in zip(time_s, gripper[:, hand], strict=True):
            if command < OPEN if closed else command > CLOSED:
                closed = not closed
                events.append(GripperEvent(float(now_s), hand, closed))
    return sorted(events, key=lambda event: event.time_s)
