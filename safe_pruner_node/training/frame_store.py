"""Decoded camera images of a data set in memory, at the policy's input size."""

from __future__ import annotations

import mmap
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
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
    """Every kept frame of every camera, uint8, filled by several processes.

    The memory is anonymous and shared, so that forked readers write straight into it.

    Args:
        cameras: Camera keys of the data set, in the policy's order.
        shapes: Height and width of each camera's stored frames.
        frames: Rows.
    """

    def __init__(
        self, cameras: Sequence[str], shapes: Sequence[tuple[int, int]], frames: int
    ) -> None:
        self.cameras = tuple(cameras)
        self._arrays: list[NDArray[np.uint8]] = []
        for height, width in shapes:
            block = mmap.mmap(-1, max(1, frames * height * width * 3))
            flat = np.frombuffer(block, np.uint8, frames * height * width * 3)
            self._arrays.append(flat.reshape(frames, height, width, 3))
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
            workers: Processes; 1 decodes in this one.
        """
        if workers == 1:
            for job in jobs:
                yield self._fill_one(job, read)
            return
        # Forked, so that the mapping above is shared: spawned processes could not see it.
        context = multiprocessing.get_context("fork")
        _Inherited.store, _Inherited.read = self, read
        with context.Pool(workers) as pool:
            yield from pool.imap_unordered(_fill_inherited, jobs, chunksize=1)

    def _fill_one(self, job: Job, read: ReadFrames) -> int:
        for camera, array in zip(self.cameras, self._arrays, strict=True):
            frames = read(job.episode, camera)
            for row, frame in enumerate(frames[: job.count]):
                array[job.begin + row] = fit(frame, max(array.shape[1:3]))
        return job.count

    def gather(self, rows: Tensor) -> list[Tensor]:
        """Frames of each camera, [B, h, w, 3] uint8 each."""
        return [tensor.index_select(0, rows) for tensor in self._tensors]


class _Inherited:
    """What forked workers find in their copy of this process."""

    store: FrameStore
    read: ReadFrames


def _fill_inherited(job: Job) -> int:
    return _Inherited.store._fill_one(job, _Inherited.read)  # noqa: SLF001 - same module
