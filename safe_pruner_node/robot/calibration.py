"""Camera calibration as camera_info_manager writes it, and undistortion."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.strict import STRICT, did_you_mean, load_yaml, shown
from safe_pruner_node.types import FloatArray, RgbImage

COEFFICIENTS = {"plumb_bob": 5, "rational_polynomial": 8, "equidistant": 4}
"""Distortion model to its number of coefficients (sensor_msgs/distortion_models.hpp)."""


@dataclass(frozen=True, config=STRICT)
class _Matrix:
    rows: Annotated[int, Field(gt=0)]
    cols: Annotated[int, Field(gt=0)]
    data: tuple[float, ...]


@dataclass(frozen=True, config=STRICT)
class _CalibrationFile:
    """The keys of a camera_info_manager file, as `camera_calibration` saves them."""

    image_width: Annotated[int, Field(gt=0)]
    image_height: Annotated[int, Field(gt=0)]
    camera_name: str
    camera_matrix: _Matrix
    distortion_model: str
    distortion_coefficients: _Matrix
    rectification_matrix: _Matrix
    projection_matrix: _Matrix


@dataclasses.dataclass(frozen=True)
class CameraCalibration:
    """Intrinsics of one camera (fields of ``sensor_msgs/CameraInfo``).

    Attributes:
        width: Columns of the calibrated image.
        height: Rows of the calibrated image.
        name: ``camera_name`` of the file.
        K: Intrinsic matrix of the raw image, pixels, [3, 3].
        model: ``plumb_bob``, ``rational_polynomial`` or ``equidistant``.
        D: Distortion coefficients of the model.
        R: Rectification, [3, 3].
        P: Projection of the rectified image, pixels, [3, 4].
    """

    width: int
    height: int
    name: str
    K: FloatArray
    model: str
    D: FloatArray
    R: FloatArray
    P: FloatArray


def load_calibration(
    path: Path | str, *, width: int | None = None, height: int | None = None
) -> CameraCalibration:
    """Reads and checks a camera_info YAML file.

    Args:
        path: The file.
        width: Columns of the stream it is for, when known.
        height: Rows of the stream it is for, when known.

    Raises:
        ConfigError: The file is missing or malformed, is for another resolution, its matrices
            have another shape, or cannot be inverted.
    """
    path = Path(path)
    file = load_yaml(path, _CalibrationFile)
    for key, found, expected in (
        ("image_width", file.image_width, width),
        ("image_height", file.image_height, height),
    ):
        if expected is not None and found != expected:
            raise ConfigError(path, key, found, f"{expected}, the resolution of the camera stream")
    if file.distortion_model not in COEFFICIENTS:
        expected_model = did_you_mean(file.distortion_model, COEFFICIENTS)
        raise ConfigError(path, "distortion_model", shown(file.distortion_model), expected_model)
    n_coefficients = COEFFICIENTS[file.distortion_model]
    calibration = CameraCalibration(
        width=file.image_width,
        height=file.image_height,
        name=file.camera_name,
        K=_matrix(path, "camera_matrix", file.camera_matrix, (3, 3)),
        model=file.distortion_model,
        D=_matrix(
            path, "distortion_coefficients", file.distortion_coefficients, (1, n_coefficients)
        )[0],
        R=_matrix(path, "rectification_matrix", file.rectification_matrix, (3, 3)),
        P=_matrix(path, "projection_matrix", file.projection_matrix, (3, 4)),
    )
    _check_camera_matrix(path, "camera_matrix", calibration.K)
    _check_camera_matrix(path, "projection_matrix", calibration.P[:, :3])
    if not np.allclose(calibration.R @ calibration.R.T, np.eye(3), atol=1e-4):
        raise ConfigError(path, "rectification_matrix", "not a rotation", "R R^T = identity")
    return calibration


class Undistorter:
    """Removes lens distortion; the maps are computed once.

    Args:
        calibration: The camera's intrinsics.
    """

    def __init__(self, calibration: CameraCalibration) -> None:
        self.calibration = calibration
        self._maps = _rectify_maps(calibration) if np.any(calibration.D) else None

    def apply(self, rgb: RgbImage) -> RgbImage:
        """The image as an ideal pinhole camera with matrix P would see it.

        Args:
            rgb: [height, width, 3].

        Returns:
            [height, width, 3]; the very same array when the camera has no distortion.

        Raises:
            ConfigError: The image is not of the calibrated resolution.
        """
        if self._maps is None:
            return rgb
        height, width = rgb.shape[:2]
        if (width, height) != (self.calibration.width, self.calibration.height):
            raise ConfigError(
                f"camera {self.calibration.name}",
                "resolution",
                f"{width}x{height}",
                f"{self.calibration.width}x{self.calibration.height}, as calibrated",
            )
        undistorted: Any = cv2.remap(rgb, *self._maps, interpolation=cv2.INTER_LINEAR)
        return np.asarray(undistorted, dtype=np.uint8)


def _matrix(path: Path, key: str, matrix: _Matrix, shape: tuple[int, int]) -> FloatArray:
    found = (matrix.rows, matrix.cols)
    if found != shape:
        raise ConfigError(path, key, f"{found[0]}x{found[1]}", f"{shape[0]}x{shape[1]}")
    if len(matrix.data) != shape[0] * shape[1]:
        raise ConfigError(
            path, f"{key}.data", f"{len(matrix.data)} numbers", f"{shape[0] * shape[1]} numbers"
        )
    return np.reshape(matrix.data, shape)


def _check_camera_matrix(path: Path, key: str, matrix: FloatArray) -> None:
    """Focal lengths positive and the last row 0 0 1: then the matrix can be inverted."""
    fx, fy = matrix[0, 0], matrix[1, 1]
    if fx <= 0 or fy <= 0 or not np.array_equal(matrix[2], [0, 0, 1]):
        found = f"fx {fx:g}, fy {fy:g}, last row {matrix[2].tolist()}"
        expected = "an invertible matrix: fx and fy above 0, last row 0 0 1"
        raise ConfigError(path, key, found, expected)


def _rectify_maps(calibration: CameraCalibration) -> tuple[NDArray, NDArray]:
    """Where in the raw image each pixel of the undistorted one comes from."""
    fisheye = calibration.model == "equidistant"
    init = cv2.fisheye.initUndistortRectifyMap if fisheye else cv2.initUndistortRectifyMap
    camera = calibration.P[:, :3]
    size = (calibration.width, calibration.height)
    return init(calibration.K, calibration.D, calibration.R, camera, size, cv2.CV_16SC2)
