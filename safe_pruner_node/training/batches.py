"""Batches of one prompt length, made ready beside the computation."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Self

from safe_pruner_node.training.augmentation import AugmentationKind, augmented, squares
from safe_pruner_node.training.objective import Batch
from safe_pruner_node.training.training_set import TrainingSet

_WAITING = 4
"""Batches of frames kept ready."""

Host = tuple[NDArray[np.int64], list[Tensor]]
"""Sample numbers and the frames of each camera, [B, h, w, 3] uint8, in page-locked memory."""


class BatchSource:
    """Draws samples and turns them into what the loss needs.

    Prompts are never padded, as they are not in inference: a batch holds prompts of one length,
    drawn in proportion to how many samples have that length.

    Args:
        training_set: Samples and frames.
        device: Where the batches go.
        augment: Kind of image augmentation.
        seed: Of the order and the augmentation.
    """

    def __init__(
        self, training_set: TrainingSet, device: torch.device, augment: AugmentationKind, seed: int
    ) -> None:
        self._set = training_set
        self._device = device
        self._augment = augment
        self._seed = seed
        self._random = torch.Generator(device).manual_seed(seed)
        self._size = training_set.image_size
        self._actions = torch.from_numpy(training_set.samples.actions).to(device)
        landmarks = training_set.samples.landmarks
        self._landmarks = None if landmarks is None else torch.from_numpy(landmarks).to(device)
        tokens = training_set.samples.tokens
        lengths = np.array([len(ids) for ids in tokens])
        self._tokens = {
            int(length): torch.from_numpy(
                np.stack([tokens[int(i)] for i in np.flatnonzero(lengths == length)])
            ).to(device)
            for length in np.unique(lengths)
        }
        self._place = np.zeros(len(tokens), np.int64)  # within the samples of the same length
        for length in self._tokens:
            same = np.flatnonzero(lengths == length)
            self._place[same] = np.arange(len(same))
        self._lengths = lengths
        pool = np.flatnonzero(~training_set.held_out)
        self._pools = [pool[lengths[pool] == length] for length in self._tokens]
        self._pools = [members for members in self._pools if len(members)]

    def draw(self, count: int, number: int) -> NDArray[np.int64]:
        """Samples of batch ``number``, [count]; the same whatever was drawn before."""
        random = np.random.default_rng([self._seed, number])
        sizes = np.array([len(pool) for pool in self._pools], dtype=np.float64)
        pool = self._pools[random.choice(len(self._pools), p=sizes / sizes.sum())]
        return random.choice(pool, count)

    def fetch(self, samples: NDArray[np.int64]) -> Host:
        """Frames of some samples; for a thread beside the computation."""
        rows = torch.from_numpy(self._set.samples.rows[samples])
        frames = self._set.frames.gather(rows)
        if self._device.type == "cuda":
            frames = [frame.pin_memory() for frame in frames]
        return samples, frames

    def finish(self, host: Host) -> Batch:
        """The batch on the device, augmented."""
        samples, frames = host
        images = []
        for camera, stored in zip(self._set.frames.cameras, frames, strict=True):
            square = squares(stored.to(self._device, non_blocking=True), self._size)
            images.append(
                augmented(square, self._augment, on_wrist="wrist" in camera, random=self._random)
            )
        index = torch.from_numpy(samples).to(self._device)
        length = int(self._lengths[samples[0]])
        place = torch.from_numpy(self._place[samples]).to(self._device)
        landmarks = None if self._landmarks is None else self._landmarks[index]
        return Batch(tuple(images), self._tokens[length][place], self._actions[index], landmarks)

    def held_out(self, count: int, batch: int) -> Iterator[Batch]:
        """About ``count`` held-out samples, evenly spaced, in batches of one prompt length."""
        pool = np.flatnonzero(self._set.held_out)
        for length in self._tokens:
            members = pool[self._lengths[pool] == length]
            share = round(count * len(members) / max(1, len(pool)))
            if share == 0:
                continue
            chosen = members[np.linspace(0, len(members) - 1, share).astype(int)]
            for first in range(0, len(chosen), batch):
                yield self.finish(self.fetch(chosen[first : first + batch]))


class Prefetcher:
    """Fetches the frames of coming batches in a thread; iterate inside ``with``.

    Args:
        source: Draws and fetches.
        count: Samples per batch.
        first: Number of the first batch.
    """

    def __init__(self, source: BatchSource, count: int, first: int) -> None:
        self._source = source
        self._count = count
        self._number = first
        self._ready: queue.Queue[Host | Exception] = queue.Queue(_WAITING)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        while self._thread.is_alive():  # it may wait for room
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)
        self._thread.join()

    def __next__(self) -> Batch:
        host = self._ready.get()
        if isinstance(host, Exception):
            raise host
        return self._source.finish(host)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                samples = self._source.draw(self._count, self._number)
                self._number += 1
                self._ready.put(self._source.fetch(samples))
        except Exception as error:  # noqa: BLE001 - raised again by whoever waits for a batch
            self._ready.put(error)
