"""Writes a LeRobot v3.0 dataset: parts put together, or a lab's own episodes one by one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from safe_pruner_node.demonstrations import statistics
from safe_pruner_node.demonstrations.parts import Detail, Part, PartWriter
from safe_pruner_node.demonstrations.schema import (
    DATA_FILE_MB,
    DATA_PATH,
    EPISODES_PATH,
    INFO_PATH,
    STATS_PATH,
    TASKS_PATH,
    VIDEO_FILE_MB,
    VIDEO_PATH,
    DatasetSpec,
    file_position,
)
from safe_pruner_node.demonstrations.statistics import Statistics
from safe_pruner_node.demonstrations.video import VIDEO_INFO, join
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.types import RgbImage

PARTS_FOLDER = "parts"
"""Inside of a dataset that is not finished yet."""

_MB = 1_000_000


def check_new(out: Path) -> None:
    """Makes sure that a folder does not hold a finished dataset.

    Raises:
        ConfigError: It does.
    """
    if (out / INFO_PATH).exists():
        raise ConfigError(out, INFO_PATH, "a finished dataset", "a folder without one")


@dataclass(frozen=True)
class _Bounds:
    data_bytes: float
    video_bytes: float


def assemble(
    parts: Sequence[Part],
    out: Path,
    spec: DatasetSpec,
    *,
    data_file_mb: float = DATA_FILE_MB,
    video_file_mb: float = VIDEO_FILE_MB,
) -> int:
    """Puts parts together, in this order, and removes their folders.

    ``meta/info.json`` is written last: a folder that has one is a whole dataset.

    Args:
        parts: The episodes.
        out: Folder of the dataset.
        spec: What a frame holds.
        data_file_mb: A parquet file is not begun to be filled beyond this.
        video_file_mb: The same for a video file.

    Returns:
        Size of the dataset, bytes.

    Raises:
        ConfigError: No parts, or a finished dataset in the folder.
    """
    check_new(out)
    if not parts:
        raise ConfigError(out, "", "no episodes", "at least one")
    for folder in ("data", "videos", "meta"):
        shutil.rmtree(out / folder, ignore_errors=True)
    bounds = _Bounds(data_file_mb * _MB, video_file_mb * _MB)
    tasks = list(dict.fromkeys(part.prompt for part in parts))
    with ThreadPoolExecutor() as pool:
        videos = {
            key: pool.submit(_write_videos, parts, out, key, spec.fps, bounds)
            for key in spec.cameras
        }
        data, stats = _write_data(parts, out, spec, tasks, bounds)
        places = [data, *(future.result() for future in videos.values())]
    rows = [_episode_row(number, part, tasks, spec) for number, part in enumerate(parts)]
    for place in places:
        for row, columns in zip(rows, place, strict=True):
            row.update(columns)
    _write_tasks(tasks, out)
    _write_episodes(rows, out)
    for key in spec.cameras:
        counts = np.sum([part.histograms[key] for part in parts], axis=0)
        stats[key] = statistics.of_histogram(counts, sum(part.sampled for part in parts))
    (out / STATS_PATH).write_text(json.dumps(stats, indent=2) + "\n")
    frames = sum(part.length for part in parts)
    info = spec.info(episodes=len(parts), frames=frames, tasks=len(tasks), video=VIDEO_INFO)
    (out / INFO_PATH).write_text(json.dumps(info, indent=2) + "\n")
    shutil.rmtree(out / PARTS_FOLDER, ignore_errors=True)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


@final
class DatasetWriter:
    """Writes a dataset episode by episode, for a lab's own recordings; use it as a context.

    Args:
        out: Folder of the dataset; must not hold one.
        spec: What a frame holds.

    Raises:
        ConfigError: A finished dataset in the folder.
    """

    def __init__(self, out: Path, spec: DatasetSpec) -> None:
        check_new(out)
        shutil.rmtree(out / PARTS_FOLDER, ignore_errors=True)
        self._out = out
        self._spec = spec
        self._folders: list[Path] = []

    def add_episode(
        self,
        images: Iterable[Mapping[str, RgbImage]],
        *,
        state: NDArray[np.floating],
        action: NDArray[np.floating],
        environment: NDArray[np.floating] | None = None,
        prompt: str,
        details: Mapping[str, Detail] | None = None,
    ) -> None:
        """Appends an episode.

        Args:
            images: For each frame image feature to image, [height, width, 3].
            state: Measured positions, [n, dof].
            action: Commands in force at the frames' times, [n, dof].
            environment: Privileged state, [n, values]; as the spec has it.
            prompt: The task in words.
            details: What else is known about it, the same keys for every episode.

        Raises:
            ConfigError: Images or numbers are not as the spec says.
        """
        folder = self._out / PARTS_FOLDER / f"{len(self._folders):06d}"
        with PartWriter(folder, self._spec) as part:
            for frame in images:
                part.add(frame)
            part.finish(
                state=state, action=action, environment=environment, prompt=prompt, details=details
            )
        self._folders.append(folder)

    def finish(self, **bounds: float) -> int:
        """Completes the dataset; the arguments are the bounds of :func:`assemble`.

        Returns:
            Size of the dataset, bytes.
        """
        return assemble(
            [Part.load(folder) for folder in self._folders], self._out, self._spec, **bounds
        )

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._out / PARTS_FOLDER, ignore_errors=True)


class _Files:
    """Fills files one after the other up to a size."""

    def __init__(self, limit_bytes: float) -> None:
        self._limit = limit_bytes
        self._used = 0.0
        self.number = 0

    def place(self, size: float) -> int:
        """Number of the file that something of a size goes into."""
        if self._used and self._used + size > self._limit:
            self.number += 1
            self._used = 0.0
        self._used += size
        return self.number


def _write_videos(
    parts: Sequence[Part], out: Path, key: str, fps: float, bounds: _Bounds
) -> list[dict[str, Any]]:
    """The videos of one camera, and where in them each episode is."""
    files = _Files(bounds.video_bytes)
    grouped: dict[int, list[Part]] = {}
    places = []
    before = 0
    for part in parts:
        number = files.place(part.video(key).stat().st_size)
        if number not in grouped:
            grouped[number], before = [], 0
        grouped[number].append(part)
        position = file_position(number)
        places.append(
            {
                f"videos/{key}/chunk_index": position["chunk_index"],
                f"videos/{key}/file_index": position["file_index"],
                f"videos/{key}/from_timestamp": before / fps,
                f"videos/{key}/to_timestamp": (before + part.length) / fps,
            }
        )
        before += part.length
    for number, group in grouped.items():
        target = out / VIDEO_PATH.format(video_key=key, **file_position(number))
        target.parent.mkdir(parents=True, exist_ok=True)
        join([(part.video(key), part.length) for part in group], target, fps)
    return places


def _write_data(
    parts: Sequence[Part], out: Path, spec: DatasetSpec, tasks: Sequence[str], bounds: _Bounds
) -> tuple[list[dict[str, Any]], dict[str, Statistics]]:
    """The data files; where each episode is, and the statistics of every column."""
    schema = spec.arrow_schema()
    files = _Files(bounds.data_bytes)
    places = []
    written: pq.ParquetWriter | None = None
    number, first = -1, 0
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in schema.names}
    for index, part in enumerate(parts):
        episode = _columns(part, index, first, tasks.index(part.prompt), spec.fps)
        size = sum(values.nbytes for values in episode.values())
        if files.place(size) != number:
            if written is not None:
                written.close()
            number = files.number
            path = out / DATA_PATH.format(**file_position(number))
            path.parent.mkdir(parents=True, exist_ok=True)
            written = pq.ParquetWriter(path, schema)
        assert written is not None  # noqa: S101 - the first episode has opened it
        written.write_table(_table(episode, schema))  # one row group for each episode
        position = file_position(number)
        places.append(
            {
                "data/chunk_index": position["chunk_index"],
                "data/file_index": position["file_index"],
                "dataset_from_index": first,
                "dataset_to_index": first + part.length,
            }
        )
        first += part.length
        for name, values in episode.items():
            columns[name].append(values)
    if written is not None:
        written.close()
    stats = {name: statistics.of_values(np.concatenate(v)) for name, v in columns.items()}
    return places, stats


def _columns(part: Part, index: int, first: int, task: int, fps: float) -> dict[str, NDArray[Any]]:
    frames = np.arange(part.length, dtype=np.int64)
    scalars: dict[str, NDArray[Any]] = {
        "timestamp": (frames / fps).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.full_like(frames, index),
        "index": first + frames,
        "task_index": np.full_like(frames, task),
    }
    return {**part.vectors, **scalars}


def _table(columns: Mapping[str, NDArray[Any]], schema: pa.Schema) -> pa.Table:
    arrays = [
        pa.array(columns[field.name])
        if columns[field.name].ndim == 1
        else pa.FixedSizeListArray.from_arrays(columns[field.name].ravel(), type=field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _episode_row(number: int, part: Part, tasks: Sequence[str], spec: DatasetSpec) -> dict:
    """What the episodes' table says about an episode, but for the places of its files."""
    columns = _columns(part, number, 0, tasks.index(part.prompt), spec.fps)
    stats = {name: statistics.of_values(values) for name, values in columns.items()}
    for key, counts in part.histograms.items():
        stats[key] = statistics.of_histogram(counts, part.sampled)
    return {
        "episode_index": number,
        "tasks": [part.prompt],
        "length": part.length,
        **part.details,
        **{
            f"stats/{feature}/{name}": value
            for feature, values in stats.items()
            for name, value in values.items()
        },
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }


def _write_episodes(rows: Sequence[dict[str, Any]], out: Path) -> None:
    path = out / EPISODES_PATH.format(**file_position(0))
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {name: [row[name] for row in rows] for name in rows[0]}
    pq.write_table(pa.Table.from_pydict(table), path)


def _write_tasks(tasks: Sequence[str], out: Path) -> None:
    """The sentences, as pandas writes a table with them as its index: so LeRobot reads it."""
    plain = {"metadata": None}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {
                "name": "task_index",
                "field_name": "task_index",
                "pandas_type": "int64",
                "numpy_type": "int64",
                **plain,
            },
            {
                "name": "task",
                "field_name": "task",
                "pandas_type": "unicode",
                "numpy_type": "object",
                **plain,
            },
        ],
        "pandas_version": "2.0.0",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": list(tasks)})
    path = out / TASKS_PATH
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)
