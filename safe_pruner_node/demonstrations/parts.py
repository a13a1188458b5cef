"""One episode on its way into a dataset: a folder of its own, whole or not there.

Whoever records, one process or many, writes parts; :mod:`.writer` puts them together. Only paths
travel between processes, and what a crash leaves behind is every finished episode.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from safe_pruner_node.demonstrations.features import ACTION, ENVIRONMENT, STATE
from safe_pruner_node.demonstrations.schema import DatasetSpec
from safe_pruner_node.demonstrations.statistics import histogram
from safe_pruner_node.demonstrations.video import VideoFileWriter
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.types import RgbImage

NUMBERS = "episode.npz"
SAMPLE_EVERY = 8
"""Every 8th image goes into the image statistics."""

Detail = str | int | float


@dataclass(frozen=True)
class Part:
    """A finished episode.

    Attributes:
        folder: Where its files are.
        vectors: Numeric feature to its values, float32 [n, dim].
        prompt: The task in words.
        details: What else is known about it; becomes columns of the episodes' table.
        histograms: Image feature to the histogram of its sampled images, [3, 256].
        sampled: How many images were sampled.
    """

    folder: Path
    vectors: Mapping[str, NDArray[np.float32]]
    prompt: str
    details: Mapping[str, Detail]
    histograms: Mapping[str, NDArray[np.int64]]
    sampled: int

    @property
    def length(self) -> int:
        """Number of frames."""
        return len(self.vectors[STATE])

    def video(self, feature: str) -> Path:
        """The file of an image feature."""
        return self.folder / f"{feature}.mp4"

    @staticmethod
    def load(folder: Path) -> Part:
        """A part from its folder."""
        with np.load(folder / NUMBERS) as file:
            about = json.loads(str(file["about"]))
            return Part(
                folder=folder,
                vectors={key: file[f"vector/{key}"] for key in about["vectors"]},
                prompt=about["prompt"],
                details=about["details"],
                histograms={key: file[f"histogram/{key}"] for key in about["cameras"]},
                sampled=about["sampled"],
            )


@final
class PartWriter:
    """Writes one episode; use it as a context. Without :meth:`finish` nothing is left of it.

    Args:
        folder: The part's folder; must not exist.
        spec: What a frame holds.
    """

    def __init__(self, folder: Path, spec: DatasetSpec) -> None:
        self._folder = folder
        self._spec = spec
        self._temporary = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        self._open = ExitStack()
        self._videos = {
            key: self._open.enter_context(
                VideoFileWriter(self._temporary / f"{key}.mp4", spec.fps, size)
            )
            for key, size in spec.cameras.items()
        }
        self._histograms = {key: np.zeros((3, 256), np.int64) for key in spec.cameras}
        self._frames = self._sampled = 0

    def add(self, images: Mapping[str, RgbImage]) -> None:
        """Appends one frame's images.

        Args:
            images: Image feature to image, [height, width, 3], of the size in the spec.

        Raises:
            ConfigError: A missing image, or one of another size.
        """
        sample = self._frames % SAMPLE_EVERY == 0
        for key, (height, width) in self._spec.cameras.items():
            if key not in images:
                raise ConfigError("frame", key, "nothing", f"an image of {width}x{height}")
            image = images[key]
            if image.shape != (height, width, 3) or image.dtype != np.uint8:
                found = f"{image.dtype} {list(image.shape)}"
                raise ConfigError("frame", key, found, f"uint8 [{height}, {width}, 3]")
            self._videos[key].add(image)
            if sample:
                self._histograms[key] += histogram(image)
        self._frames += 1
        self._sampled += sample

    def finish(
        self,
        *,
        state: NDArray[np.floating],
        action: NDArray[np.floating],
        environment: NDArray[np.floating] | None = None,
        prompt: str,
        details: Mapping[str, Detail] | None = None,
    ) -> Path:
        """Completes the episode.

        Args:
            state: Measured positions, [n, dof].
            action: Commands in force at the frames' times, [n, dof].
            environment: Privileged state, [n, values]; as the spec has it.
            prompt: The task in words.
            details: What else is known about the episode.

        Returns:
            The part's folder.

        Raises:
            ConfigError: Not one finite row of the right length for each frame.
        """
        given = {STATE: state, ACTION: action, ENVIRONMENT: environment}
        vectors = {}
        for key, names in self._spec.vectors.items():
            values = given[key]
            expected = f"finite [{self._frames}, {len(names)}]"
            if values is None:
                raise ConfigError("episode", key, "nothing", expected)
            if values.shape != (self._frames, len(names)) or self._frames == 0:
                raise ConfigError("episode", key, list(values.shape), expected)
            if not np.isfinite(values).all():
                raise ConfigError("episode", key, "a value that is not finite", expected)
            vectors[key] = np.asarray(values, dtype=np.float32)
        if not prompt.strip():
            raise ConfigError("episode", "prompt", repr(prompt), "the task in words")
        self._open.close()
        about = {
            "vectors": list(vectors),
            "cameras": list(self._histograms),
            "prompt": prompt,
            "details": dict(details or {}),
            "sampled": self._sampled,
        }
        arrays: dict[str, Any] = {f"vector/{key}": values for key, values in vectors.items()}
        arrays |= {f"histogram/{key}": counts for key, counts in self._histograms.items()}
        np.savez(self._temporary / NUMBERS, about=np.array(json.dumps(about)), **arrays)
        self._temporary.rename(self._folder)
        return self._folder

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)
        shutil.rmtree(self._temporary, ignore_errors=True)
