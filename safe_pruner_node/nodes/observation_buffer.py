"""The newest coherent set of camera frames: bounded in age and in skew, or a reason why not.

Callbacks store bytes and stamps here and do nothing else; the policy query takes a set. No ROS.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from safe_pruner_node.types import CameraFrame

_FRAMES_KEPT = 6
"""Frames kept per camera: enough to pair 30 Hz cameras that are a few periods apart."""
_INTERVALS_KEPT = 31
_GAP_FACTOR = 1.5
"""A stamp gap longer than this many usual periods means frames were lost in between."""


@dataclass(frozen=True)
class CameraCount:
    """Frames of one camera, counted up to the frame that a query used.

    Attributes:
        received: Frames received up to and including this one.
        used: Queries that used a new frame of this camera.
        dropped: Frames missing in the stamps: gaps of more than 1.5 usual periods.
    """

    received: int = 0
    used: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class CameraSet:
    """A coherent set of frames, one per camera.

    Attributes:
        frames: Camera to frame, in the configured order.
        counts: Camera to frame counts as of that frame.
        age_s: Camera to header age when the set was taken, seconds (ROS time).
        receive_age_s: Camera to age since reception, seconds (steady clock).
        skew_s: Largest difference between the header stamps, seconds.
    """

    frames: Mapping[str, CameraFrame]
    counts: Mapping[str, CameraCount]
    age_s: Mapping[str, float]
    receive_age_s: Mapping[str, float]
    skew_s: float

    @property
    def oldest_stamp_ns(self) -> int:
        """Header stamp of the oldest frame, ROS time, nanoseconds."""
        return min(frame.stamp_ns for frame in self.frames.values())


@dataclass(frozen=True)
class NoSet:
    """Why there is no coherent set, in one line."""

    reason: str


class _Camera:
    """Recent frames of one camera with their running counts."""

    def __init__(self) -> None:
        self.frames: deque[tuple[CameraFrame, int, int]] = deque(maxlen=_FRAMES_KEPT)
        self.intervals_s: deque[float] = deque(maxlen=_INTERVALS_KEPT)
        self.received = 0
        self.dropped = 0
        self.used = 0
        self.used_stamp_ns = -1

    def add(self, frame: CameraFrame) -> None:
        self.received += 1
        if self.frames:
            gap_s = (frame.stamp_ns - self.frames[-1][0].stamp_ns) * 1e-9
            if gap_s <= 0.0:
                # A restarted driver or a clock set back: older frames cannot be paired any more.
                # A repeated stamp is kept out too, so a frozen camera ages and is refused.
                if gap_s < 0.0:
                    self.frames.clear()
                    self.intervals_s.clear()
                else:
                    return
            else:
                if self.intervals_s:
                    usual_s = float(np.median(self.intervals_s))
                    if gap_s > _GAP_FACTOR * usual_s:
                        self.dropped += round(gap_s / usual_s) - 1
                self.intervals_s.append(gap_s)
        self.frames.append((frame, self.received, self.dropped))


class ObservationBuffer:
    """Recent frames of every camera; thread-safe, constant time.

    Args:
        cameras: Camera names in prefix order.
        max_age_s: Oldest frame accepted, by header stamp and by reception.
        max_skew_s: Largest difference between the header stamps of one set.
    """

    def __init__(self, cameras: tuple[str, ...], max_age_s: float, max_skew_s: float) -> None:
        self._cameras = {name: _Camera() for name in cameras}
        self._max_age_s = max_age_s
        self._max_skew_s = max_skew_s
        self._lock = threading.Lock()

    def add(self, camera: str, frame: CameraFrame) -> None:
        """Keep a frame; called from a subscription callback."""
        with self._lock:
            self._cameras[camera].add(frame)

    def counts(self) -> dict[str, CameraCount]:
        """Totals so far."""
        with self._lock:
            return {
                name: CameraCount(item.received, item.used, item.dropped)
                for name, item in self._cameras.items()
            }

    def newest_set(self, ros_now_ns: int, steady_now_ns: int) -> CameraSet | NoSet:
        """The newest frames that belong together.

        The camera whose newest frame is oldest sets the moment; every other camera gives its
        frame nearest to it.

        Args:
            ros_now_ns: ROS time now, the clock of the header stamps.
            steady_now_ns: Steady clock now, the clock of reception.
        """
        with self._lock:
            silent = [name for name, item in self._cameras.items() if not item.frames]
            if silent:
                return NoSet(f"no image yet from {', '.join(silent)}")
            anchor_ns = min(item.frames[-1][0].stamp_ns for item in self._cameras.values())
            chosen = {
                name: min(item.frames, key=lambda entry: abs(entry[0].stamp_ns - anchor_ns))
                for name, item in self._cameras.items()
            }
            age_s = {n: (ros_now_ns - f.stamp_ns) * 1e-9 for n, (f, _, _) in chosen.items()}
            receive_age_s = {
                n: (steady_now_ns - f.received_ns) * 1e-9 for n, (f, _, _) in chosen.items()
            }
            problem = self._too_old(age_s, receive_age_s)
            stamps = [frame.stamp_ns for frame, _, _ in chosen.values()]
            skew_s = (max(stamps) - min(stamps)) * 1e-9
            if problem is None and skew_s > self._max_skew_s:
                problem = (
                    f"cameras {skew_s * 1e3:.0f} ms apart, at most {self._max_skew_s * 1e3:.0f} ms"
                )
            if problem is not None:
                return NoSet(problem)
            counts = {}
            for name, (frame, received, dropped) in chosen.items():
                item = self._cameras[name]
                if frame.stamp_ns != item.used_stamp_ns:
                    item.used += 1
                    item.used_stamp_ns = frame.stamp_ns
                counts[name] = CameraCount(received, item.used, dropped)
        frames = {name: frame for name, (frame, _, _) in chosen.items()}
        return CameraSet(frames, counts, age_s, receive_age_s, skew_s)

    def _too_old(self, age_s: dict[str, float], receive_age_s: dict[str, float]) -> str | None:
        for name, age in age_s.items():
            if receive_age_s[name] > self._max_age_s:
                return f"camera {name} silent for {receive_age_s[name]:.2f} s"
            if age > self._max_age_s:
                return (
                    f"camera {name} stamps {age:.2f} s old, at most {self._max_age_s:.2f} s "
                    "(frozen camera, or clocks not synchronised)"
                )
            if age < -self._max_age_s:
                return f"camera {name} stamps {-age:.2f} s in the future (clocks not synchronised)"
        return None
