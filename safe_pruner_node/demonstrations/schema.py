"""The LeRobot dataset format v3.0: paths, types and the ``meta/info.json`` of a dataset.

Written from the source of huggingface/lerobot 0.6.2 (``datasets/utils.py``, ``feature_utils.py``,
``dataset_writer.py``, ``dataset_metadata.py``); what is written here loads in its 0.6.1 release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from safe_pruner_node.demonstrations.features import ACTION, DEFAULT_FEATURES, ENVIRONMENT, STATE

CODEBASE_VERSION = "v3.0"

INFO_PATH = "meta/info.json"
STATS_PATH = "meta/stats.json"
TASKS_PATH = "meta/tasks.parquet"
EPISODES_FOLDER = "meta/episodes"
FILE_PATTERN = "chunk-{chunk_index:03d}/file-{file_index:03d}"
EPISODES_PATH = f"{EPISODES_FOLDER}/{FILE_PATTERN}.parquet"
DATA_PATH = f"data/{FILE_PATTERN}.parquet"
VIDEO_PATH = "videos/{video_key}/" + FILE_PATTERN + ".mp4"

FILES_PER_CHUNK = 1000
DATA_FILE_MB = 100
VIDEO_FILE_MB = 200
"""LeRobot's own bounds on the size of a file."""


@dataclass(frozen=True)
class DatasetSpec:
    """What the frames of a dataset hold.

    Attributes:
        fps: Frames per second.
        robot_type: Kind of robot, such as ``astribot_s1``.
        joint_names: Names of the joints of state and action, in order.
        cameras: Image feature to the height and width of its frames.
        environment_names: Names of the privileged state's values; empty where there is none.
    """

    fps: float
    robot_type: str
    joint_names: tuple[str, ...]
    cameras: Mapping[str, tuple[int, int]]
    environment_names: tuple[str, ...] = ()

    @property
    def vectors(self) -> dict[str, tuple[str, ...]]:
        """Numeric feature to the names of its values."""
        vectors = {STATE: self.joint_names, ACTION: self.joint_names}
        if self.environment_names:
            vectors[ENVIRONMENT] = self.environment_names
        return vectors

    def arrow_schema(self) -> pa.Schema:
        """Columns of the data files."""
        vectors = [(key, pa.list_(pa.float32(), len(names))) for key, names in self.vectors.items()]
        scalars = [(key, pa.type_for_alias(dtype)) for key, dtype in DEFAULT_FEATURES.items()]
        return pa.schema(vectors + scalars)

    def info(self, *, episodes: int, frames: int, tasks: int, video: Mapping[str, Any]) -> dict:
        """The content of ``meta/info.json``.

        Args:
            episodes: How many there are.
            frames: How many there are in all.
            tasks: How many different sentences.
            video: How the videos are coded, ``video.codec`` and so on.
        """
        features: dict[str, dict] = {
            key: {"dtype": "float32", "shape": [len(names)], "names": list(names)}
            for key, names in self.vectors.items()
        }
        for key, (height, width) in self.cameras.items():
            features[key] = {
                "dtype": "video",
                "shape": [height, width, 3],
                "names": ["height", "width", "channels"],
                "info": {
                    "video.height": height,
                    "video.width": width,
                    "video.channels": 3,
                    "video.fps": round(self.fps),
                    **video,
                    "has_audio": False,
                    "is_depth_map": False,
                },
            }
        for key, dtype in DEFAULT_FEATURES.items():
            features[key] = {"dtype": dtype, "shape": [1], "names": None}
        return {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": self.robot_type,
            "fps": int(self.fps) if float(self.fps).is_integer() else self.fps,
            "total_episodes": episodes,
            "total_frames": frames,
            "total_tasks": tasks,
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": DATA_FILE_MB,
            "video_files_size_in_mb": VIDEO_FILE_MB,
            "splits": {"train": f"0:{episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": features,
        }


def file_position(number: int) -> dict[str, int]:
    """Chunk and file index of the n-th file."""
    return {"chunk_index": number // FILES_PER_CHUNK, "file_index": number % FILES_PER_CHUNK}
