"""What one full-token episode showed of the policy's attention: everything the figures are from.

An episode is one NPZ file that needs nothing beside it. Shapes: Q policy queries, N_vis visual
tokens of all cameras in prefix order, D VLM width, L expert layers, T control periods, two hands.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.types import FloatArray, RgbImage

Half = NDArray[np.float16]
Single = NDArray[np.float32]

EARLY = ("text", "last_text", "action_probe", "fastv")
"""Early maps: the `query_rows` of a pruner, and FastV's own: last text row, softmax over all."""


@dataclass(frozen=True)
class SaliencyRecord:
    """One episode.

    Attributes:
        about: Task, prompt, seed, outcome, checkpoint, cameras, settings; plain JSON values.
        time_s: Simulated time of each query, [Q].
        policy_state: What the policy was told of the joints, policy units, [Q, dof].
        z_hat: Unit rows of the projector outputs, [Q, N_vis, D].
        early: Early saliency at the pruning layer, by name in `EARLY`, [Q, N_vis] each.
        deep: Action-to-visual saliency of every expert layer, mean over the denoise steps of a
            full-token query, [Q, L, N_vis].
        prefill: Text-to-visual saliency of VLM layers 0..L-2 at query `about["moment"]`,
            [L-1, N_vis]. The last VLM layer has no queries: nothing reads its output.
        images: Camera to JPEG of each query, as the policy saw it.
        tick_time_s: Simulated time of the control periods, [T].
        gripper: Commanded grippers, 0 open to 100 closed, by hand in `about["hands"]`, [T, 2].
        hand_speed_m_s: Speed of the commanded pinch points, [T, 2].
        stages: Time, s, and progress where progress changed, [S, 2].
    """

    about: Mapping[str, Any]
    time_s: FloatArray
    policy_state: FloatArray
    z_hat: Half
    early: Mapping[str, Single]
    deep: Single
    prefill: Single
    images: Mapping[str, Sequence[bytes]]
    tick_time_s: FloatArray
    gripper: Single
    hand_speed_m_s: Single
    stages: FloatArray

    @property
    def queries(self) -> int:
        """Q."""
        return len(self.time_s)

    @property
    def cameras(self) -> tuple[tuple[str, int], ...]:
        """(name, visual tokens) in prefix order."""
        return tuple((name, int(tokens)) for name, tokens in self.about["cameras"])

    @property
    def camera_slices(self) -> dict[str, slice]:
        """Camera to its range of visual tokens."""
        spans, start = {}, 0
        for name, tokens in self.cameras:
            spans[name] = slice(start, start + tokens)
            start += tokens
        return spans

    @property
    def label(self) -> str:
        """Task and number of the episode."""
        return f"{self.about['task']} {self.about['index']}"

    def image(self, camera: str, query: int) -> RgbImage:
        """What a camera showed at a query."""
        data = np.frombuffer(self.images[camera][query], np.uint8)
        bgr = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))
        return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), dtype=np.uint8)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        arrays["about"] = np.frombuffer(json.dumps(dict(self.about)).encode(), np.uint8)
        arrays |= {f"early.{name}": values for name, values in self.early.items()}
        for camera, pictures in self.images.items():
            arrays[f"images.{camera}"] = np.frombuffer(b"".join(pictures), np.uint8)
            arrays[f"lengths.{camera}"] = np.array([len(data) for data in pictures])
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(buffer.getvalue())
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> SaliencyRecord:
        """Read a file.

        Raises:
            ConfigError: It is not one of `save`.
        """
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(arrays.pop("about").tobytes())
            images = {
                name.partition(".")[2]: _split(arrays[name], arrays[f"lengths.{name[7:]}"])
                for name in arrays
                if name.startswith("images.")
            }
            early = {name: arrays[f"early.{name}"] for name in EARLY}
            named = {name: arrays[name] for name in _ARRAYS}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ConfigError(path, "", error, "a saliency record of forecast_study") from None
        return cls(about=about, early=early, images=images, **named)


_ARRAYS = (
    "time_s",
    "policy_state",
    "z_hat",
    "deep",
    "prefill",
    "tick_time_s",
    "gripper",
    "hand_speed_m_s",
    "stages",
)


def _split(data: NDArray[np.uint8], lengths: NDArray[np.int64]) -> list[bytes]:
    ends = np.cumsum(lengths)
    return [data[end - n : end].tobytes() for end, n in zip(ends, lengths, strict=True)]
