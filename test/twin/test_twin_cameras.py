"""What the cameras show and what their calibration says about it."""

from pathlib import Path

import mujoco
import numpy as np
import pytest

from safe_pruner_node.robot.calibration import load_calibration
from safe_pruner_node.twin.camera_thread import CameraThread
from safe_pruner_node.twin.cameras import FULL_RESOLUTION, CameraRig, Snapshot, pinhole
from safe_pruner_node.twin.scene import build_scene
from safe_pruner_node.twin.sim import TwinSim

ROOT = Path(__file__).parents[2]
HALF = {name: (w // 2, h // 2) for name, (w, h) in FULL_RESOLUTION.items()}


@pytest.fixture(scope="module")
def sim():
    return TwinSim("table", seed=0, resolutions=HALF)


@pytest.fixture(scope="module")
def images(sim):
    rig = CameraRig(sim.model, HALF)
    rig.show(sim.snapshot())
    drawn = {name: rig.render(name) for name in HALF}
    rig.close()
    return drawn


def project(sim, camera, point):
    """Pixel (column, row) of a world point through the calibration of a camera."""
    view = sim.data.camera(camera)
    # MuJoCo's camera looks along -z with y up; the optical frame looks along z with y down.
    optical = np.diag([1, -1, -1]) @ view.xmat.reshape(3, 3).T @ (point - view.xpos)
    pixel = sim.calibration(camera).K @ optical
    return pixel[:2] / pixel[2]


def is_red(rgb):
    rgb = rgb.astype(int)
    return (
        (rgb[..., 0] > 90) & (rgb[..., 0] > 2.5 * rgb[..., 1]) & (rgb[..., 0] > 2.5 * rgb[..., 2])
    )


def test_image_sizes(images):
    shapes = {name: image.shape for name, image in images.items()}
    assert shapes == {
        "head": (360, 640, 3),
        "left_wrist": (180, 320, 3),
        "right_wrist": (180, 320, 3),
    }


@pytest.mark.parametrize("camera", ["head", "left_wrist"])
def test_calibration_finds_the_red_cube(sim, images, camera):
    column, row = project(sim, camera, sim.data.body("red_cube").xpos)
    rows, columns = np.nonzero(is_red(images[camera]))
    assert is_red(images[camera])[round(row), round(column)]
    # The silhouette of a cube is centred on its centre, but for perspective.
    size = np.ptp(columns)
    assert abs(columns.mean() - column) < 0.1 * size
    assert abs(rows.mean() - row) < 0.15 * size


@pytest.mark.parametrize("place", [(-0.4, -0.2), (0.4, 0.2), (0.35, -0.25), (0.0, 0.0)])
def test_calibration_to_the_pixel(place):
    """A speck off the axis is drawn where the intrinsics say, to a quarter of a pixel."""
    spec = build_scene("empty", 0).spec
    right, down = place
    spec.camera("head").parent.add_geom(  # in the tilt link: x forward, -y up, z to the left
        name="speck",
        type=mujoco.mjtGeom.mjGEOM_SPHERE,
        size=(0.006, 0, 0),
        pos=(0.105 + 0.6, -0.12 + down, -right),
        rgba=(1, 0, 0, 1),
    )
    model = spec.compile()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    rig = CameraRig(model, {"head": (640, 360)})
    rig.show(Snapshot(0.0, data.qpos.copy()))
    rows, columns = np.nonzero(is_red(rig.render("head")))
    rig.close()
    pixel = pinhole(model, "head", (640, 360)).K @ [right, down, 0.6]
    assert columns.mean() == pytest.approx(pixel[0] / 0.6, abs=0.25)
    assert rows.mean() == pytest.approx(pixel[1] / 0.6, abs=0.25)


@pytest.mark.parametrize("camera", sorted(FULL_RESOLUTION))
def test_committed_calibration_files_are_the_truth(camera):
    sim = TwinSim("empty")
    width, height = FULL_RESOLUTION[camera]
    path = ROOT / "calibration" / f"twin_{camera}.yaml"
    committed = load_calibration(path, width=width, height=height)
    truth = sim.calibration(camera)
    np.testing.assert_allclose(committed.K, truth.K, atol=1e-6)
    np.testing.assert_allclose(committed.P, truth.P, atol=1e-6)
    np.testing.assert_array_equal(committed.D, truth.D)


def test_scaled_calibration_is_the_same_camera():
    full, half = TwinSim("empty"), TwinSim("empty", resolutions=HALF)
    for camera in HALF:
        ratio = half.calibration(camera).K[0, 0] / full.calibration(camera).K[0, 0]
        assert ratio == pytest.approx(0.5)


def test_head_sees_table_objects_and_both_grippers(sim):
    """What the policy has to see in the home pose lies well inside the head image."""
    points = {name: sim.data.body(name).xpos for name in sim.objects}
    for side in ("left", "right"):
        points[side] = sim.data.site(f"astribot_gripper_{side}_pinch").xpos
    for name, point in points.items():
        column, row = project(sim, "head", point)
        assert 20 < column < 620, name
        assert 20 < row < 340, name


@pytest.mark.parametrize("side", ["left", "right"])
def test_wrist_camera_sees_between_its_fingers(sim, side):
    column, row = project(
        sim, f"{side}_wrist", sim.data.site(f"astribot_gripper_{side}_pinch").xpos
    )
    assert abs(column - 160) < 20
    assert 60 < row < 160


def test_thread_delivers_every_camera_with_the_stamp_of_its_state(sim, images):
    taken = []
    thread = CameraThread(sim.model, HALF, lambda *image: taken.append(image))
    try:
        assert thread.submit(sim.snapshot(), 123)
        thread.wait_drawn()
        assert [(name, stamp) for name, _, stamp in taken] == [(name, 123) for name in HALF]
        for name, rgb, _ in taken:
            np.testing.assert_array_equal(rgb, images[name])
    finally:
        thread.stop()
    assert thread.error is None


def test_thread_leaves_out_sets_it_has_no_time_for(sim):
    taken = []
    thread = CameraThread(sim.model, HALF, lambda *image: taken.append(image))
    try:
        accepted = [thread.submit(sim.snapshot(), i) for i in range(5)]
        thread.wait_drawn()
    finally:
        thread.stop()
    assert accepted[0]
    assert thread.skipped == accepted.count(False) > 0
    assert len(taken) == 3 * accepted.count(True)


def test_a_failure_while_drawing_is_reported_not_lost(sim):
    def fail(*_):
        message = "no more ink"
        raise RuntimeError(message)

    thread = CameraThread(sim.model, HALF, fail)
    thread.submit(sim.snapshot(), 0)
    thread.wait_drawn()
    thread.stop()
    assert "no more ink" in str(thread.error)
