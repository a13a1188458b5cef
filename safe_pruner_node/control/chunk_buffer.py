"""Action chunks indexed by time: latency is compensated by construction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from safe_pruner_node.control.interpolation import hermite, monotone_tangents, smoothstep
from safe_pruner_node.types import ActionChunk, FloatArray

_ABSURD = 1e6  # no joint of any unit goes there, and arithmetic on it could overflow


@dataclass(frozen=True)
class Sample:
    """The plan at one moment.

    Attributes:
        position: Target, robot units, [dof].
        velocity: Its derivative, robot units per second, [dof].
        starved: True when the newest chunk has ended: ``position`` is then its last action.
        remaining: Actions of the newest chunk that lie at or after this moment.
    """

    position: FloatArray
    velocity: FloatArray
    starved: bool
    remaining: int


@dataclass(frozen=True)
class _Playing:
    """A chunk in the buffer, its tangents, and when it began to be blended in."""

    chunk: ActionChunk
    tangents: FloatArray  # [horizon, dof]
    added_s: float

    def at(self, now_s: float) -> tuple[FloatArray, FloatArray]:
        chunk = self.chunk
        return hermite(chunk.actions, self.tangents, chunk.dt_s, now_s - chunk.time_s)


class ChunkBuffer:
    """Plays the newest chunk from the index that belongs to now, blended in over the older ones.

    A chunk says for which time its first action is meant, so one that took 300 ms to compute
    begins to play at its 300th millisecond. Not thread-safe: its owner holds the lock.

    Args:
        dof: Joints of the layout.
        blend_s: Time over which a new chunk replaces the one playing, seconds.
    """

    def __init__(self, dof: int, blend_s: float) -> None:
        self._dof = dof
        self._blend_s = blend_s
        self._playing: list[_Playing] = []  # oldest first
        self._epoch = 0
        self._drop_reason = ""

    @property
    def epoch(self) -> int:
        """Current epoch: the one that queries must carry for their chunk to be accepted."""
        return self._epoch

    @property
    def drop_reason(self) -> str:
        """Why the last ``add`` returned False."""
        return self._drop_reason

    @property
    def newest(self) -> ActionChunk | None:
        """The chunk that is playing or being blended in."""
        return self._playing[-1].chunk if self._playing else None

    def bump_epoch(self) -> int:
        """Forget every chunk, including those still being computed; returns the new epoch."""
        self._epoch += 1
        self._playing.clear()
        return self._epoch

    def add(self, chunk: ActionChunk, now_s: float) -> bool:
        """Accept a chunk and blend it in from ``now_s``, or drop it whole.

        Args:
            chunk: Actions [horizon, dof] in robot units.
            now_s: Control-clock time, seconds.

        Returns:
            False when dropped; ``drop_reason`` then says why.
        """
        self._drop_reason = self.reason_to_drop(chunk, now_s)
        if self._drop_reason:
            return False
        while len(self._playing) > 1 and self._weight(self._playing[1], now_s)[0] >= 1.0:
            self._playing.pop(0)
        tangents = monotone_tangents(chunk.actions, chunk.dt_s)
        self._playing.append(_Playing(chunk, tangents, now_s))
        return True

    def reason_to_drop(self, chunk: ActionChunk, now_s: float) -> str:
        """Why ``add`` would drop this chunk; empty when it would accept it."""
        if chunk.epoch != self._epoch:
            return f"chunk of epoch {chunk.epoch}, current is {self._epoch}"
        malformed = malformation(chunk, self._dof)
        if malformed:
            return malformed
        if chunk.end_s <= now_s:
            return f"chunk ended {now_s - chunk.end_s:.3f} s ago"
        newest = self.newest
        if newest is not None and chunk.time_s < newest.time_s:
            return "chunk older than the one playing"
        return ""

    def sample(self, now_s: float) -> Sample | None:
        """The blended plan at ``now_s``; None while the buffer is empty.

        Args:
            now_s: Control-clock time, seconds.
        """
        if not self._playing:
            return None
        position, velocity = self._playing[0].at(now_s)
        for playing in self._playing[1:]:
            weight, weight_rate = self._weight(playing, now_s)
            new_position, new_velocity = playing.at(now_s)
            step = new_position - position
            velocity = velocity + weight * (new_velocity - velocity) + weight_rate * step
            position = position + weight * step
        newest = self._playing[-1].chunk
        left_s = newest.end_s - now_s
        remaining = min(len(newest.actions), int(np.floor(left_s / newest.dt_s + 1e-9)) + 1)
        return Sample(position, velocity, starved=left_s < 0.0, remaining=max(0, remaining))

    def mean_velocity(self, now_s: float, half_window_s: float) -> FloatArray:
        """Mean velocity of the plan around ``now_s``, [dof]; zeros while the buffer is empty.

        Args:
            now_s: Control-clock time, seconds.
            half_window_s: Averaged from this long before to this long after, seconds.
        """
        before, after = self.sample(now_s - half_window_s), self.sample(now_s + half_window_s)
        if before is None or after is None:
            return np.zeros(self._dof)
        return (after.position - before.position) / (2.0 * half_window_s)

    def _weight(self, playing: _Playing, now_s: float) -> tuple[float, float]:
        """Blend weight of a chunk and its rate of change, 1/s."""
        if self._blend_s <= 0.0:
            return 1.0, 0.0
        weight, slope = smoothstep((now_s - playing.added_s) / self._blend_s)
        return weight, slope / self._blend_s


def malformation(chunk: ActionChunk, dof: int) -> str:
    """What makes a chunk unusable whatever the moment; empty for a sound one."""
    shape = chunk.actions.shape
    if len(shape) != 2 or shape[1] != dof or shape[0] == 0:
        return f"actions of shape {list(shape)}, expected [horizon, {dof}]"
    if not np.all(np.isfinite(chunk.actions)):
        return "actions not finite"
    largest = float(np.max(np.abs(chunk.actions)))
    if largest > _ABSURD:
        return f"an action of magnitude {largest:g}"
    if not (np.isfinite(chunk.time_s) and np.isfinite(chunk.dt_s) and chunk.dt_s > 0.0):
        return f"chunk time {chunk.time_s} s, step {chunk.dt_s} s, expected finite and positive"
    return ""
