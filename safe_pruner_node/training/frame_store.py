"""Decoded camera images of a data set in memory, at the policy's input size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safe_pruner_node.demonstrations.images import fit

ReadFrames = Callable[[int, str], NDArray[np.uint8]]
"""Episode position and camera to its kept frames, [n, h, w, 3]."""


@dataclass(frozen=True)
class Job:
    """One episode: where its frames go.

    Attributes:
        episode: Position of the episode in the data set.
        begin: First row in the store.
        count: Rows.
    """

    episode: int
    begin: int
    count: int


class FrameStore:
    """Every kept frame of every camera, uint8, filled by several threads.

    Threads and not processes: the decoder and the resizing let go of the interpreter lock, and a
    process forked from one with torch's threads in it may hang.

    Args:
        cameras: Camera keys of the data set, in the policy's order.
        shapes: Height and width of each camera's stored frames.
        frames: Rows.
    """

    def __init__(
        self, cameras: Sequence[str], shapes: Sequence[tuple[int, int]], frames: int
    ) -> None:
        self.cameras = tuple(cameras)
        self._arrays = [np.empty((frames, h, w, 3), np.uint8) for h, w in shapes]
        self._tensors = [torch.from_numpy(array) for array in self._arrays]

    @property
    def gigabytes(self) -> float:
        """Memory of the images."""
        return sum(array.nbytes for array in self._arrays) / 1e9

    def fill(self, jobs: Sequence[Job], read: ReadFrames, workers: int) -> Iterable[int]:
        """Decode all episodes; yields the rows done, one episode after the other.

        Args:
            jobs: Which episode goes where.
            read: Decodes one camera of one episode.
            workers: Threads.
        """
        with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
            yield from pool.map(lambda job: self._fill_one(job, read), jobs)

    def _fill_one(self, job: Job, read: ReadFrames) -> int:
        for camera, array in zip(self.cameras, self._arrays, strict=True):
            frames = read(job.episode, camera)
            for row, frame in enumerate(frames[: job.count]):
                array[job.begin + row] = fit(frame, max(array.shape[1:3]))
        return job.count

    def gather(self, rows: Tensor) -> list[Tensor]:
        """Frames of each camera, [B, h, w, 3] uint8 each."""
        return [tensor.index_select(0, rows) for tensor in self._tensors]
