"""Reads a LeRobot v3.0 dataset, ours or a lab's own, without torch and without LeRobot.

Any image size, frame rate and number of files; images as videos. What a dataset lacks or says
wrongly is one :class:`ConfigError` line when it is opened, or when the damaged file is read.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from safe_pruner_node.demonstrations.features import (
    ACTION,
    ENVIRONMENT,
    IMAGES,
    STATE,
    camera_feature,
)
from safe_pruner_node.demonstrations.schema import (
    CODEBASE_VERSION,
    DATA_PATH,
    EPISODES_FOLDER,
    INFO_PATH,
    TASKS_PATH,
    VIDEO_PATH,
)
from safe_pruner_node.demonstrations.video import VideoFileReader
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.config import RobotConfig
from safe_pruner_node.robot.strict import did_you_mean, shown

Float32Array = NDArray[np.float32]

OPEN_FILES = 8
"""Video files that a thread keeps open; opening a long one takes longer than reading from it."""


@dataclass(frozen=True)
class EpisodeInfo:
    """One episode.

    Attributes:
        index: Its number in the dataset.
        task: The task in words.
        first: Its first row in the dataset's columns.
        length: Number of frames.
        details: Columns of the episodes' table that LeRobot does not know, such as ``seed``.
    """

    index: int
    task: str
    first: int
    length: int
    details: Mapping[str, Any]

    @property
    def rows(self) -> slice:
        """Its rows in the dataset's columns."""
        return slice(self.first, self.first + self.length)


@dataclass(frozen=True, eq=False)
class Dataset:
    """An opened dataset: every number in memory, images read on demand.

    Attributes:
        path: Its folder.
        fps: Frames per second.
        robot_type: What ``info.json`` says; empty where it says nothing.
        joint_names: Names of the action's values as ``info.json`` has them; may be empty.
        cameras: Image feature (``observation.images.head``) to height and width.
        tasks: The different sentences, by task index.
        episodes: The episodes; their numbers are their places here.
        state: Measured positions, [n, dof].
        action: Commands, [n, dof].
        environment: Privileged state, [n, values]; None where the dataset has none.
        task_index: Which of the sentences each frame is for, [n].
    """

    path: Path
    fps: float
    robot_type: str
    joint_names: tuple[str, ...]
    cameras: Mapping[str, tuple[int, int]]
    tasks: tuple[str, ...]
    episodes: tuple[EpisodeInfo, ...]
    state: Float32Array
    action: Float32Array
    environment: Float32Array | None
    task_index: NDArray[np.int64]
    _videos: Mapping[str, Sequence[tuple[Path, float]]] = field(repr=False)
    _open: _OpenFiles = field(repr=False)

    @property
    def frames(self) -> int:
        """Number of frames of all episodes."""
        return len(self.state)

    def read_frames(
        self, episode: int, camera_key: str, stride: int = 1, offset: int = 0
    ) -> NDArray[np.uint8]:
        """Images of one episode, in order. Safe in several threads and processes.

        Args:
            episode: Its number.
            camera_key: Image feature, such as ``observation.images.head``.
            stride: Every how many frames.
            offset: The first frame, counted from the episode's first.

        Returns:
            RGB, [ceil((length - offset) / stride), height, width, 3].

        Raises:
            ConfigError: No such feature, or its video is missing, damaged or too short.
        """
        if camera_key not in self.cameras:
            known = did_you_mean(camera_key, self.cameras)
            raise ConfigError(self.path / INFO_PATH, "features", shown(camera_key), known)
        info = self.episodes[episode]
        path, start_s = self._videos[camera_key][episode]
        reader = self._open.reader(path, self.cameras[camera_key])
        return reader.read(start_s, self.fps, range(offset, info.length, stride), info.length)

    def check_robot(self, robot: RobotConfig) -> None:
        """Makes sure that the dataset is for the robot of a robot file.

        Raises:
            ConfigError: Another number or order of joints, another rate, or a missing camera.
        """
        info, layout = self.path / INFO_PATH, robot.layout
        expected = f"{layout.dof}, {layout.name} of {robot.path}"
        if self.action.shape[1] != layout.dof:
            raise ConfigError(info, f"features.{ACTION}.shape", [self.action.shape[1]], expected)
        names = self.joint_names
        if sorted(names) == sorted(layout.joint_names) and names != layout.joint_names:
            first = next(i for i in range(layout.dof) if names[i] != layout.joint_names[i])
            key = f"features.{ACTION}.names[{first}]"
            expected = f"{layout.joint_names[first]}, {layout.name} of {robot.path}"
            raise ConfigError(info, key, names[first], expected)
        if not np.isclose(self.fps, robot.policy.action_rate_hz):
            expected = f"{robot.policy.action_rate_hz:g}, policy.action_rate_hz of {robot.path}"
            raise ConfigError(info, "fps", f"{self.fps:g}", expected)
        for camera in robot.policy.camera_order:
            if camera_feature(camera) not in self.cameras:
                found = ", ".join(self.cameras)
                expected = f"{camera_feature(camera)}, camera {camera} of {robot.path}"
                raise ConfigError(info, "features", found, expected)


class _OpenFiles(threading.local):
    """The video files that this thread has open, the last used ones."""

    def __init__(self) -> None:
        self._readers: dict[Path, VideoFileReader] = {}

    def reader(self, path: Path, size: tuple[int, int]) -> VideoFileReader:
        reader = self._readers.pop(path, None) or VideoFileReader(path, size)
        self._readers[path] = reader
        while len(self._readers) > OPEN_FILES:
            self._readers.pop(next(iter(self._readers))).close()
        return reader

    def __reduce__(self) -> tuple[type[_OpenFiles], tuple[()]]:
        return _OpenFiles, ()  # open files stay in the process that opened them


def open_dataset(path: Path | str) -> Dataset:
    """Opens a dataset and checks that its tables and its description fit together.

    Args:
        path: Its folder, which holds ``meta``, ``data`` and ``videos``.

    Raises:
        ConfigError: Something missing, malformed, of another version or contradictory.
    """
    path = Path(path)
    info = _Info.load(path)
    episodes = _table(path, EPISODES_FOLDER, sorted((path / EPISODES_FOLDER).glob("*/*.parquet")))
    rows = sorted(_rows(episodes, path), key=lambda row: row["episode_index"])
    data_files = [_data_file(path, info, row) for row in rows]
    data = _table(path, "data", sorted(set(data_files)))
    columns = {
        key: _vectors(data, key, info.vectors[key], path)
        for key in (STATE, ACTION, ENVIRONMENT)
        if key in info.vectors
    }
    tasks = _tasks(path)
    task_index = _whole_numbers(data, "task_index", path)
    if len(task_index) and not 0 <= task_index.min() <= task_index.max() < len(tasks):
        wrong = int(task_index.max() if task_index.min() >= 0 else task_index.min())
        raise ConfigError(
            path / "data", "task_index", wrong, f"0 to {len(tasks) - 1}, {TASKS_PATH}"
        )
    infos = _episodes(path, rows, _whole_numbers(data, "episode_index", path))
    return Dataset(
        path=path,
        fps=info.fps,
        robot_type=info.robot_type,
        joint_names=info.names(ACTION),
        cameras=info.cameras,
        tasks=tasks,
        episodes=infos,
        state=columns[STATE],
        action=columns[ACTION],
        environment=columns.get(ENVIRONMENT),
        task_index=task_index,
        _videos={key: [_video(path, info, row, key) for row in rows] for key in info.cameras},
        _open=_OpenFiles(),
    )


@dataclass(frozen=True)
class _Info:
    """What ``meta/info.json`` says, as far as it is needed here."""

    path: Path
    fps: float
    robot_type: str
    data_path: str
    video_path: str
    features: Mapping[str, Mapping[str, Any]]
    vectors: Mapping[str, int]
    cameras: Mapping[str, tuple[int, int]]

    @staticmethod
    def load(folder: Path) -> _Info:
        path = folder / INFO_PATH
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(path, "", "nothing", "a LeRobot v3.0 dataset") from None
        except (OSError, ValueError) as error:
            raise ConfigError(path, "", str(error), "JSON") from None
        if not isinstance(raw, dict):
            raise ConfigError(path, "", shown(raw), "a JSON object")
        version = raw.get("codebase_version")
        if version != CODEBASE_VERSION:
            expected = f"{CODEBASE_VERSION!r} (LeRobot converts older datasets)"
            raise ConfigError(path, "codebase_version", shown(version), expected)
        fps = raw.get("fps")
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not fps > 0:
            raise ConfigError(path, "fps", shown(fps), "frames per second")
        features = raw.get("features")
        if not isinstance(features, dict):
            raise ConfigError(path, "features", shown(features), "names and types of the features")
        return _Info(
            path=path,
            fps=float(fps),
            robot_type=str(raw.get("robot_type") or ""),
            data_path=_template(path, raw, "data_path", DATA_PATH),
            video_path=_template(path, raw, "video_path", VIDEO_PATH),
            features=features,
            vectors=_vector_features(path, features),
            cameras=_image_features(path, features),
        )

    def names(self, key: str) -> tuple[str, ...]:
        """The names of a vector's values: a list, or a list under some heading, or nothing."""
        names = self.features[key].get("names")
        if isinstance(names, dict):
            names = next(iter(names.values()), None)
        return tuple(map(str, names)) if isinstance(names, list) else ()


def _template(path: Path, raw: Mapping[str, Any], key: str, example: str) -> str:
    template = raw.get(key)
    if not isinstance(template, str):
        raise ConfigError(path, key, shown(template), f"a path such as {example}")
    try:
        template.format(chunk_index=0, file_index=0, video_key="")
    except (KeyError, ValueError, IndexError):
        raise ConfigError(path, key, shown(template), f"a path such as {example}") from None
    return template


def _vector_features(path: Path, features: Mapping[str, Any]) -> dict[str, int]:
    vectors = {}
    for key in (STATE, ACTION, ENVIRONMENT):
        feature = features.get(key)
        if feature is None and key == ENVIRONMENT:
            continue
        expected = "a feature of dtype float32 and shape [dim]"
        if not isinstance(feature, dict):
            raise ConfigError(path, f"features.{key}", shown(feature), expected)
        shape = feature.get("shape")
        if feature.get("dtype") not in {"float32", "float64"} or not _is_shape(shape, 1):
            found = f"{feature.get('dtype')} {shape}"
            raise ConfigError(path, f"features.{key}", found, expected)
        vectors[key] = shape[0]
    if vectors[STATE] != vectors[ACTION]:
        found = f"{vectors[ACTION]} values"
        expected = f"{vectors[STATE]}, as {STATE} has: the joints commanded are the joints measured"
        raise ConfigError(path, f"features.{ACTION}", found, expected)
    return vectors


def _image_features(path: Path, features: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    cameras = {}
    for key, feature in features.items():
        if not key.startswith(IMAGES):
            continue
        place = f"features.{key}"
        if not isinstance(feature, dict):
            raise ConfigError(path, place, shown(feature), "its dtype, shape and names")
        if feature.get("dtype") != "video":
            raise ConfigError(path, f"{place}.dtype", shown(feature.get("dtype")), "'video'")
        shape = feature.get("shape")
        expected = "[height, width, 3]"
        if not _is_shape(shape, 3):
            raise ConfigError(path, f"{place}.shape", shown(shape), expected)
        if (feature.get("names") or [""])[0] == "channels":  # some converters put them first
            shape = [*shape[1:], shape[0]]
        if shape[2] == 1:  # a depth map: no policy here looks at it
            continue
        if shape[2] != 3:
            raise ConfigError(path, f"{place}.shape", shape, expected)
        cameras[key] = (shape[0], shape[1])
    if not cameras:
        raise ConfigError(path, "features", "no camera", f"a feature {IMAGES}<name>")
    return cameras


def _is_shape(shape: object, dimensions: int) -> TypeGuard[list[int]]:
    return (
        isinstance(shape, list)
        and len(shape) == dimensions
        and all(isinstance(size, int) and size > 0 for size in shape)
    )


def _table(folder: Path, what: str, files: Sequence[Path]) -> pa.Table:
    if not files:
        raise ConfigError(folder / what, "", "no files", "chunk-000/file-000.parquet and so on")
    tables = [_parquet(path) for path in files]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ConfigError(folder / what, "columns", str(error), "the same in every file") from None


def _parquet(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except FileNotFoundError:
        raise ConfigError(path, "", "nothing", "a parquet file") from None
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(path, "", str(error), "a parquet file") from None


def _rows(episodes: pa.Table, path: Path) -> list[dict[str, Any]]:
    needed = ("episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index")
    for name in needed:
        if name not in episodes.column_names:
            raise ConfigError(path / EPISODES_FOLDER, name, "no such column", "one")
    kept = [name for name in episodes.column_names if not name.startswith("stats/")]
    return list(episodes.select(kept).to_pylist())


def _cell(path: Path, row: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401 - a table's
    value = row.get(name)
    if value is None:
        episode = row["episode_index"]
        found = f"nothing for episode {episode}" if name in row else "no such column"
        raise ConfigError(path / EPISODES_FOLDER, name, found, "a value for every episode")
    return value


def _data_file(path: Path, info: _Info, row: Mapping[str, Any]) -> Path:
    chunk, file = (_cell(path, row, f"data/{kind}_index") for kind in ("chunk", "file"))
    return path / info.data_path.format(chunk_index=chunk, file_index=file)


def _video(path: Path, info: _Info, row: Mapping[str, Any], key: str) -> tuple[Path, float]:
    chunk, file, start_s = (
        _cell(path, row, f"videos/{key}/{name}")
        for name in ("chunk_index", "file_index", "from_timestamp")
    )
    name = info.video_path.format(video_key=key, chunk_index=chunk, file_index=file)
    return path / name, float(start_s)


def _column(data: pa.Table, key: str, path: Path) -> pa.ChunkedArray:
    if key not in data.column_names:
        raise ConfigError(path / "data", key, "no such column", "one, as info.json says")
    column = data.column(key)
    if column.null_count:
        raise ConfigError(path / "data", key, f"{column.null_count} empty rows", "a value in each")
    return column


def _whole_numbers(data: pa.Table, key: str, path: Path) -> NDArray[np.int64]:
    column = _column(data, key, path)
    if not pa.types.is_integer(column.type):
        raise ConfigError(path / "data", key, column.type, "int64")
    return np.asarray(column.to_numpy(), dtype=np.int64)


def _vectors(data: pa.Table, key: str, dim: int, path: Path) -> Float32Array:
    """A column of lists as an array, [n, dim]."""
    column = _column(data, key, path)
    rows = len(column)
    if pa.types.is_floating(column.type):  # LeRobot stores vectors of one value so
        flat = column.to_numpy()
    elif _is_list(column.type) and pa.types.is_floating(column.type.value_type):
        chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
        lengths = np.concatenate([_lengths(chunk) for chunk in column.chunks])
        wrong = np.flatnonzero(lengths != dim)
        if len(wrong):
            found = f"{lengths[wrong[0]]} values in row {wrong[0]}"
            raise ConfigError(path / "data", key, found, f"{dim}, the shape in info.json")
        flat = np.concatenate(chunks)
    else:
        raise ConfigError(path / "data", key, column.type, "lists of float32")
    values = np.asarray(flat, dtype=np.float32).reshape(rows, -1)
    if values.shape != (rows, dim):
        found = f"{values.shape[1]} values in a row"
        raise ConfigError(path / "data", key, found, f"{dim}, the shape in info.json")
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        found = f"{values[row].tolist()} in row {row}"
        raise ConfigError(path / "data", key, found, "finite values")
    return values


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _lengths(chunk: pa.Array) -> NDArray[np.int64]:
    if pa.types.is_fixed_size_list(chunk.type):
        return np.full(len(chunk), chunk.type.list_size, np.int64)
    return np.asarray(chunk.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)


def _tasks(path: Path) -> tuple[str, ...]:
    table = _table(path, TASKS_PATH, [path / TASKS_PATH])
    # pandas' index: LeRobot has left it without a name in some versions.
    words = next((n for n in ("task", "__index_level_0__") if n in table.column_names), None)
    if words is None or "task_index" not in table.column_names:
        found = ", ".join(table.column_names)
        raise ConfigError(path / TASKS_PATH, "columns", found, "task and task_index")
    by_index = dict(zip(table["task_index"].to_pylist(), table[words].to_pylist(), strict=True))
    if sorted(by_index) != list(range(len(by_index))):
        found = ", ".join(map(str, by_index))
        raise ConfigError(path / TASKS_PATH, "task_index", found, "0, 1, 2 and so on")
    return tuple(str(by_index[index]) for index in range(len(by_index)))


def _episodes(
    path: Path, rows: Sequence[Mapping[str, Any]], episode_index: NDArray[np.int64]
) -> tuple[EpisodeInfo, ...]:
    """The episodes, checked against the column that says which episode each frame is of."""
    table = path / EPISODES_FOLDER
    episodes = []
    for number, row in enumerate(rows):
        index, length = row["episode_index"], _cell(path, row, "length")
        first, end = (_cell(path, row, f"dataset_{name}_index") for name in ("from", "to"))
        if index != number:
            raise ConfigError(table, "episode_index", index, f"{number}: each number once")
        if end - first != length or length < 1:
            found = f"{length} frames, rows {first} to {end}, for episode {index}"
            raise ConfigError(table, "length", found, "as many rows as frames")
        if first < 0 or end > len(episode_index) or (episode_index[first:end] != index).any():
            expected = f"rows {first} to {end} to be of episode {index}"
            raise ConfigError(path / "data", "episode_index", "others", expected)
        words = list(dict.fromkeys(_cell(path, row, "tasks")))
        if not words:
            raise ConfigError(table, "tasks", f"none for episode {index}", "one sentence or more")
        details = {name: value for name, value in row.items() if _is_detail(name)}
        episodes.append(EpisodeInfo(number, str(words[0]), first, length, details))
    if sum(episode.length for episode in episodes) != len(episode_index):
        found = f"{len(episode_index)} rows"
        expected = (
            f"{sum(episode.length for episode in episodes)}, the sum of the episodes' lengths"
        )
        raise ConfigError(path / "data", "", found, expected)
    return tuple(episodes)


def _is_detail(name: str) -> bool:
    known = ("episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index")
    return name not in known and not name.startswith(("data/", "videos/", "meta/"))
