"""Camera calibration: the twin's files are true, undistortion undistorts, wrong files are named."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.robot.calibration import CameraCalibration, Undistorter, load_calibration
from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.twin.sim import TwinSim

ROOT = Path(__file__).resolve().parents[2]
HEAD = ROOT / "calibration" / "twin_head.yaml"
GOOD = yaml.safe_load(HEAD.read_text(encoding="utf-8"))
DISTORTION = {
    "plumb_bob": [-0.3, 0.1, 0.001, -0.002, 0.0],
    "rational_polynomial": [-0.3, 0.1, 0.001, -0.002, 0.01, 0.02, -0.01, 0.003],
    "equidistant": [0.05, -0.02, 0.003, 0.001],
}


def calibration(model, distortion, width=320, height=180):
    matrix = np.array([[200.0, 0, 160], [0, 200, 90], [0, 0, 1]])
    return CameraCalibration(
        width=width,
        height=height,
        name="test",
        K=matrix,
        model=model,
        D=np.array(distortion),
        R=np.eye(3),
        P=np.hstack([matrix, np.zeros((3, 1))]),
    )


def test_files_of_the_twin_are_what_the_twin_renders():
    twin = TwinSim()
    for camera in load_robot_config(ROOT / "config" / "astribot_s1.yaml").cameras:
        file = camera.load_calibration()
        true = twin.calibration(camera.name)
        assert (file.width, file.height) == (true.width, true.height)
        np.testing.assert_allclose(file.K, true.K, rtol=1e-9)
        np.testing.assert_allclose(file.P, true.P, rtol=1e-9)
        assert not file.D.any()


def test_an_image_without_distortion_is_not_touched():
    image = np.zeros((11, 7, 3), np.uint8)
    assert Undistorter(calibration("plumb_bob", [0.0] * 5)).apply(image) is image


@pytest.mark.parametrize("model", DISTORTION)
def test_a_point_seen_through_the_lens_lands_where_a_pinhole_sees_it(model):
    camera = calibration(model, DISTORTION[model])
    points = np.array([[-0.6, -0.3, 1.0], [0.6, 0.25, 1.0], [-0.5, 0.35, 1.0], [0.6, 0.0, 1.0]])
    zero = np.zeros(3)
    if model == "equidistant":
        seen, _ = cv2.fisheye.projectPoints(points[:, None], zero, zero, camera.K, camera.D)
    else:
        seen, _ = cv2.projectPoints(points, zero, zero, camera.K, camera.D)
    ideal = (camera.K @ points.T).T[:, :2]
    for (x, y), (u, v) in zip(seen[:, 0], ideal, strict=True):
        image = np.zeros((180, 320, 3), np.uint8)
        cv2.circle(image, (round(float(x)), round(float(y))), 3, (255, 255, 255), -1)
        light = Undistorter(camera).apply(image)[..., 0].astype(float)
        rows, columns = np.mgrid[:180, :320]
        centre = np.array([(columns * light).sum(), (rows * light).sum()]) / light.sum()
        assert np.hypot(*(centre - [u, v])) < 1.5
        assert np.hypot(x - u, y - v) > 3  # the lens does move it


def test_an_image_of_another_resolution_is_refused():
    undistorter = Undistorter(calibration("plumb_bob", DISTORTION["plumb_bob"]))
    with pytest.raises(ConfigError, match=r"camera test: resolution: found 640x360.*320x180"):
        undistorter.apply(np.zeros((360, 640, 3), np.uint8))


@pytest.mark.parametrize("model", DISTORTION)
def test_every_model_loads(tmp_path, model):
    coefficients = DISTORTION[model]
    data = GOOD | {
        "distortion_model": model,
        "distortion_coefficients": {"rows": 1, "cols": len(coefficients), "data": coefficients},
    }
    loaded = load_calibration(write(tmp_path, data), width=1280, height=720)
    assert loaded.model == model
    np.testing.assert_array_equal(loaded.D, coefficients)


def test_what_camera_info_manager_writes_loads(tmp_path):
    text = """
image_width: 640
image_height: 360
camera_name: narrow_stereo
camera_matrix:
  rows: 3
  cols: 3
  data: [438.783367, 0.000000, 305.593336, 0.000000, 437.302876, 243.738352, 0.0, 0.0, 1.0]
distortion_model: plumb_bob
distortion_coefficients:
  rows: 1
  cols: 5
  data: [-0.361976, 0.110510, 0.001014, 0.000505, 0.000000]
rectification_matrix:
  rows: 3
  cols: 3
  data: [0.999978, 0.002789, -0.006046, -0.002816, 0.999986, -0.004401, 0.006034, 0.004417,
    0.999972]
projection_matrix:
  rows: 3
  cols: 4
  data: [393.653, 0.0, 322.797, 0.0, 0.0, 393.653, 241.090, 0.0, 0.0, 0.0, 1.0, 0.0]
"""
    path = tmp_path / "ost.yaml"
    path.write_text(text, encoding="utf-8")
    loaded = load_calibration(path, width=640, height=360)
    assert loaded.K[1, 2] == pytest.approx(243.738352)
    assert loaded.P.shape == (3, 4)
    assert Undistorter(loaded).apply(np.zeros((360, 640, 3), np.uint8)).shape == (360, 640, 3)


def write(folder, data):
    path = folder / "camera.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def matrix(rows, cols, data):
    return {"rows": rows, "cols": cols, "data": data}


@pytest.mark.parametrize(
    ("change", "key", "found", "expected"),
    [
        ({"image_width": 640}, "image_width", "640", "1280"),
        ({"image_height": 721}, "image_height", "721", "720"),
        ({"camera_matrix": matrix(3, 4, [0.0] * 12)}, "camera_matrix", "3x4", "3x3"),
        ({"camera_matrix": matrix(3, 3, [1.0] * 8)}, "camera_matrix.data", "8 numbers", "9"),
        (
            {"camera_matrix": matrix(3, 3, [500, 0, 640, 0, 0, 360, 0, 0, 1])},
            "camera_matrix",
            "fy 0",
            "invertible",
        ),
        ({"projection_matrix": matrix(3, 4, [0] * 12)}, "projection_matrix", "fx 0", "invertible"),
        (
            {"rectification_matrix": matrix(3, 3, [0] * 9)},
            "rectification_matrix",
            "not a rotation",
            "identity",
        ),
        ({"distortion_model": "plumb_bomb"}, "distortion_model", "plumb_bomb", "'plumb_bob'"),
        ({"distortion_model": "equidistant"}, "distortion_coefficients", "1x5", "1x4"),
        (
            {"distortion_coefficients": matrix(1, 5, [0, 0, 0, 0, float("nan")])},
            "distortion_coefficients.data[4]",
            "nan",
            "finite",
        ),
        ({"image_widht": 3}, "image_widht", "unknown key", "'image_width'"),
    ],
)
def test_a_wrong_calibration_is_one_line(tmp_path, change, key, found, expected):
    path = write(tmp_path, GOOD | change)
    with pytest.raises(ConfigError) as caught:
        load_calibration(path, width=1280, height=720)
    error = caught.value
    assert "\n" not in str(error)
    assert error.source == str(path)
    assert error.key == key
    assert found in error.found
    assert expected in error.expected
