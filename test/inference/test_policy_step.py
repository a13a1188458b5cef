"""The data path of one query: what the engine sees and what the robot gets."""

from __future__ import annotations

import dataclasses
import threading
import time

import conftest
import cv2
import numpy as np
import pytest
import torch
import worker_fakes
import yaml

from safe_pruner_node.engine.build import load_policy
from safe_pruner_node.engine.graphs import GraphRunner
from safe_pruner_node.engine.policy import PolicyEngine
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.inference.overlay import draw_overlay
from safe_pruner_node.inference.policy_step import InputError, PolicyStep
from safe_pruner_node.robot.calibration import Undistorter
from safe_pruner_node.robot.codecs import image_to_rgb
from safe_pruner_node.types import CameraFrame, DeviceImage, host_image

CPU = torch.device("cpu")


class SeeingEngine(worker_fakes.FakeEngine):
    """Keeps what it was shown; answers with ``answer`` at every action, or the state."""

    seen = None
    answer = None

    def step(self, inputs, noise=None):
        self.seen = inputs
        actions, report = super().step(inputs, noise)
        return (actions if self.answer is None else np.tile(self.answer, (50, 1))), report


@pytest.fixture
def engine(tmp_path):
    return SeeingEngine(EngineSettings(checkpoint=tmp_path))


def with_policy(robot, **changed):
    policy = dataclasses.replace(robot.policy, **changed)
    layout = dataclasses.replace(robot.layout, policy=policy)
    return dataclasses.replace(robot, policy=policy, layout=layout)


def test_chunk_is_timed_from_the_observation(engine, robot, observe):
    chunk = PolicyStep(engine, robot).run(observe(), epoch=7, want_overlay=False).chunk
    assert chunk.time_s == 12.5
    assert chunk.dt_s == 1.0 / robot.policy.action_rate_hz
    assert chunk.epoch == 7
    assert chunk.actions.shape == (50, robot.layout.dof)


def test_grippers_are_in_the_policys_units_and_back(engine, robot, observe):
    robot = with_policy(robot, actions="absolute", gripper_open=1.0, gripper_closed=0.0)
    state = robot.home.copy()
    state[robot.layout.gripper] = [25.0, 100.0]
    observation = dataclasses.replace(observe(), state=state)
    chunk = PolicyStep(engine, robot).run(observation, 0, want_overlay=False).chunk
    np.testing.assert_allclose(engine.seen.state[robot.layout.gripper], [0.75, 0.0])
    np.testing.assert_allclose(chunk.actions, np.tile(state, (50, 1)), atol=1e-12)


def test_delta_actions_start_from_the_observed_state(engine, robot, observe):
    engine.answer = np.full(robot.layout.dof, 0.01)
    step = PolicyStep(engine, with_policy(robot, actions="delta"))
    chunk = step.run(observe(), 0, want_overlay=False).chunk
    joints = ~robot.layout.gripper
    np.testing.assert_allclose(chunk.actions[30, joints], robot.home[joints] + 0.01)


def test_images_come_decoded_in_the_policys_order(engine, robot, observe):
    observation = observe()
    shuffled = dict(reversed(list(observation.frames.items())))
    PolicyStep(engine, robot).run(
        dataclasses.replace(observation, frames=shuffled), 0, want_overlay=False
    )
    assert tuple(engine.seen.images) == robot.policy.camera_order
    for name, image in engine.seen.images.items():
        expected = image_to_rgb(observation.frames[name], enough=2 * worker_fakes.IMAGE_SIDE)
        np.testing.assert_array_equal(image, expected)


def test_only_large_images_are_decoded_at_half_their_size(engine, robot, observe):
    """1280x720 has five pixels for each that the model sees, 640x360 not three."""
    observation = observe()
    PolicyStep(engine, robot).run(observation, 0, want_overlay=False)
    shapes = [image.shape for image in engine.seen.images.values()]
    assert shapes == [(360, 640, 3)] * 3
    raw = [image_to_rgb(frame).shape[:2] for frame in observation.frames.values()]
    assert raw == [(720, 1280), (360, 640), (360, 640)]


def test_overlay_is_the_same_on_half_the_image():
    """The kept patches lie where they lay."""
    kept = np.arange(0, 256, 3)
    whole, half = (np.full((height, 2 * height, 3), 200, np.uint8) for height in (1000, 500))
    np.testing.assert_array_equal(draw_overlay(whole, kept, 256), draw_overlay(half, kept, 256))


@pytest.fixture
def distorted(robot, tmp_path):
    """The robot with a head camera whose lens distorts."""
    head = robot.cameras[0]
    focal = [head.width, 0, head.width / 2, 0, head.width, head.height / 2, 0, 0, 1]
    matrix = [float(value) for value in focal]
    projection = [*matrix[:3], 0.0, *matrix[3:6], 0.0, *matrix[6:], 0.0]
    path = tmp_path / "head.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "image_width": head.width,
                "image_height": head.height,
                "camera_name": "head",
                "camera_matrix": {"rows": 3, "cols": 3, "data": matrix},
                "distortion_model": "plumb_bob",
                "distortion_coefficients": {
                    "rows": 1,
                    "cols": 5,
                    "data": [-0.3, 0.1, 0.0, 0.0, 0.0],
                },
                "rectification_matrix": {
                    "rows": 3,
                    "cols": 3,
                    "data": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
                },
                "projection_matrix": {"rows": 3, "cols": 4, "data": projection},
            }
        )
    )
    head = dataclasses.replace(head, calibration=path)
    return dataclasses.replace(robot, cameras=(head, *robot.cameras[1:]))


def test_distorted_camera_is_undistorted_before_the_policy_sees_it(engine, distorted, observe):
    observation = observe()
    PolicyStep(engine, distorted).run(observation, 0, want_overlay=False)
    raw = image_to_rgb(observation.frames["head"])
    expected = Undistorter(distorted.cameras[0].load_calibration()).apply(raw)
    np.testing.assert_array_equal(engine.seen.images["head"], expected)
    assert not np.array_equal(expected, raw)


def test_frame_of_another_resolution_than_calibrated_is_one_line(engine, distorted, observe):
    step = PolicyStep(engine, distorted)
    with pytest.raises(InputError, match="resolution: found 32x16, expected"):
        step.run(observe(head=conftest.jpeg_frame(32, 16)), 0, want_overlay=False)


def test_report_has_every_stage_in_order(engine, robot, observe):
    step = PolicyStep(engine, robot)
    without = step.run(observe(), 0, want_overlay=False)
    assert list(without.report.stage_ms) == ["decode", "model", "to_robot"]
    assert without.overlays == {}
    assert all(milliseconds >= 0 for milliseconds in without.report.stage_ms.values())


def test_overlays_are_jpegs_of_every_camera(engine, robot, observe):
    output = PolicyStep(engine, robot).run(observe(), 0, want_overlay=True)
    assert list(output.report.stage_ms)[-1] == "overlay"
    assert set(output.overlays) == set(robot.policy.camera_order)
    for camera in robot.cameras:
        image = cv2.imdecode(np.frombuffer(output.overlays[camera.name], np.uint8), 1)
        assert image.shape[1] == min(480, camera.width)


def test_images_are_decoded_side_by_side(engine, robot, observe):
    """With as many threads as images each waits here for the two others."""
    meeting = threading.Barrier(3)

    def place(_camera, image):
        meeting.wait(conftest.PATIENCE_S)
        return image

    engine.place = place
    PolicyStep(engine, robot, threads=3).run(observe(), 0, want_overlay=False)
    assert not meeting.broken


@pytest.mark.parametrize("threads", [1, 2])
def test_no_more_images_at_a_time_than_threads(engine, robot, observe, threads):
    busy = []
    most = 0

    def place(camera, image):
        nonlocal most
        busy.append(camera)
        most = max(most, len(busy))
        time.sleep(0.01)  # a chance for one too many
        busy.remove(camera)
        return image

    engine.place = place
    PolicyStep(engine, robot, threads=threads).run(observe(), 0, want_overlay=False)
    assert most <= threads


@pytest.mark.parametrize("threads", [1, 3])
def test_the_engine_steps_on_what_it_placed(engine, robot, observe, threads):
    """Each image in its camera's place of the prefix, whichever thread decodes it."""
    placed = {}

    def place(camera, image):
        placed[camera] = image.copy()
        return placed[camera]

    engine.place = place
    PolicyStep(engine, robot, threads=threads).run(observe(), 0, want_overlay=False)
    for camera, image in enumerate(engine.seen.images.values()):
        assert image is placed[camera]


@pytest.mark.parametrize("bad", ["head", "left_wrist"])
def test_a_bad_frame_is_raised_when_nobody_decodes_any_more(engine, robot, observe, bad):
    """Else the next query's images would meet this one's on their way to the device."""
    placed = []

    def place(camera, image):
        time.sleep(0.05)  # the bad frame is known long before
        placed.append(camera)
        return image

    engine.place = place
    broken = {bad: conftest.frame_of(b"not\xff\xd9")}
    with pytest.raises(InputError, match=f"camera {bad}: .* do not decode"):
        PolicyStep(engine, robot, threads=3).run(observe(**broken), 0, want_overlay=False)
    assert len(placed) == 2


class Decoder:
    """Stands in for the GPU's, on the CPU: whole images, planes behind each other; may refuse."""

    def __init__(self):
        self.batches = []
        self.threads = set()
        self.refuses = False

    def decode(self, jpegs):
        self.batches.append(jpegs)
        self.threads.add(threading.current_thread())
        if self.refuses:
            return None
        return [torch.from_numpy(plane_by_plane(jpeg)).permute(1, 2, 0) for jpeg in jpegs]


def plane_by_plane(jpeg):
    return np.ascontiguousarray(image_to_rgb(conftest.frame_of(jpeg)).transpose(2, 0, 1))


class DecodingEngine(SeeingEngine):
    """An engine that has such a decoder."""

    decodes_jpeg = True

    def __init__(self, settings):
        super().__init__(settings)
        self.decoder = Decoder()

    def decode(self, jpegs):
        images = self.decoder.decode(jpegs)
        return None if images is None else [DeviceImage(pixels) for pixels in images]


@pytest.fixture
def decoding(tmp_path):
    return DecodingEngine(EngineSettings(checkpoint=tmp_path))


def color_frame(camera, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (9, 16, 3), np.uint8)
    _, data = cv2.imencode(".jpg", cv2.resize(small, (camera.width, camera.height)))
    return conftest.frame_of(data.tobytes())


@pytest.fixture
def in_color(robot, observe):
    """Makes observations whose frames are what a GPU decodes, unless they are given."""

    def make(**changed):
        frames = {c.name: color_frame(c, seed) for seed, c in enumerate(robot.cameras)}
        return observe(**{**frames, **changed})

    return make


@pytest.mark.parametrize("threads", [1, 3])
def test_jpegs_are_one_batch_of_the_engine_where_it_decodes(decoding, robot, in_color, threads):
    observation = in_color()
    PolicyStep(decoding, robot, threads=threads).run(observation, 0, want_overlay=False)
    assert decoding.decoder.batches == [[f.data for f in observation.frames.values()]]
    assert decoding.decoder.threads == {threading.current_thread()}
    assert tuple(decoding.seen.images) == robot.policy.camera_order
    for name, image in decoding.seen.images.items():
        assert isinstance(image, DeviceImage)
        np.testing.assert_array_equal(host_image(image), image_to_rgb(observation.frames[name]))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_what_the_engine_does_not_decode_the_cpu_does(decoding, distorted, in_color, threads):
    """A lens that distorts, a raw frame; the third is a JPEG. All of them in their places."""
    raw = raw_frame(distorted.cameras[1])
    observation = in_color(left_wrist=raw)
    PolicyStep(decoding, distorted, threads=threads).run(observation, 0, want_overlay=False)
    assert decoding.decoder.batches == [[observation.frames["right_wrist"].data]]
    undistorter = Undistorter(distorted.cameras[0].load_calibration())
    expected = {name: image_to_rgb(frame) for name, frame in observation.frames.items()}
    expected["head"] = undistorter.apply(expected["head"])
    assert list(decoding.seen.images) == list(expected)
    for name, image in decoding.seen.images.items():
        np.testing.assert_array_equal(host_image(image), expected[name])


def test_the_cpu_decodes_while_the_engine_does(decoding, robot, in_color):
    """One frame is the CPU's, and each of the two waits here for the other."""
    meeting, decode = threading.Barrier(2), decoding.decoder.decode

    def place(_camera, image):
        meeting.wait(conftest.PATIENCE_S)
        return image

    def waiting(jpegs):
        meeting.wait(conftest.PATIENCE_S)
        return decode(jpegs)

    decoding.place, decoding.decoder.decode = place, waiting
    observation = in_color(head=raw_frame(robot.cameras[0]))
    PolicyStep(decoding, robot, threads=2).run(observation, 0, want_overlay=False)
    assert not meeting.broken


@pytest.mark.parametrize("threads", [1, 3])
def test_frames_that_are_no_colour_jpegs_never_reach_the_engines_decoder(
    decoding, robot, observe, threads
):
    """Grey ones, and one that is cut; the images are as large as the engine's would be."""
    step = PolicyStep(decoding, robot, threads=threads)
    step.run(observe(), 0, want_overlay=False)
    assert [image.shape for image in decoding.seen.images.values()] == [
        (camera.height, camera.width, 3) for camera in robot.cameras
    ]
    cut = conftest.frame_of(color_frame(robot.cameras[1]).data[:-9])
    with pytest.raises(InputError, match=r"camera left_wrist: .* do not decode"):
        step.run(observe(left_wrist=cut), 0, want_overlay=False)
    with pytest.raises(InputError, match="camera head: no frame"):
        step.run(dataclasses.replace(observe(), frames={}), 0, want_overlay=False)
    assert decoding.decoder.batches == []


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_that_the_engine_refuses_is_the_cpus(decoding, robot, in_color, threads):
    """Which decodes it, at the size that the engine would have, or says which frame is broken."""
    step, observation = PolicyStep(decoding, robot, threads=threads), in_color()
    decoding.decoder.refuses = True
    step.run(observation, 0, want_overlay=False)
    for name, image in decoding.seen.images.items():
        np.testing.assert_array_equal(image, image_to_rgb(observation.frames[name]))
    broken = conftest.frame_of(without_tables(observation.frames["left_wrist"].data))
    with pytest.raises(InputError, match=r"camera left_wrist: .* \d+ bytes that do not decode"):
        step.run(in_color(left_wrist=broken), 0, want_overlay=False)
    decoding.decoder.refuses = False
    step.run(observation, 0, want_overlay=False)
    assert all(isinstance(image, DeviceImage) for image in decoding.seen.images.values())


def without_tables(jpeg):
    """A JPEG whose frame header is whole and whose quantisation tables are not."""
    at = jpeg.index(b"\xff\xdb")
    return jpeg[: at + 4] + b"\xff" + jpeg[at + 5 :]


def test_overlays_of_images_on_the_device(engine, decoding, robot, in_color):
    """As of those on the host, but that they were decoded whole."""
    for policy in (engine, decoding):
        output = PolicyStep(policy, robot).run(in_color(), 0, want_overlay=True)
        images = [cv2.imdecode(np.frombuffer(j, np.uint8), 1) for j in output.overlays.values()]
        if policy is engine:
            expected = images
    for image, other in zip(images, expected, strict=True):
        assert image.shape == other.shape
        assert np.abs(image.astype(int) - other).mean() < 2


@pytest.mark.parametrize("kind", ["CompressedImage", "Image"])
def test_rehearsal_is_on_images_as_large_as_the_cameras_will_be(engine, robot, observe, kind):
    """A JPEG of 1280x720 is decoded at half its size, a raw frame is not."""
    cameras = tuple(dataclasses.replace(camera, type=kind) for camera in robot.cameras)
    step = PolicyStep(engine, dataclasses.replace(robot, cameras=cameras))
    step.rehearse()
    rehearsed = [image.shape for image in engine.seen.images.values()]
    frames = {} if kind == "CompressedImage" else {c.name: raw_frame(c) for c in robot.cameras}
    step.run(observe(**frames), 0, want_overlay=False)
    assert rehearsed == [image.shape for image in engine.seen.images.values()]


def raw_frame(camera):
    data = bytes(3 * camera.width * camera.height)
    return CameraFrame(data, "bgr8", camera.height, camera.width, 3 * camera.width, 777, 1)


def test_no_real_step_captures_anything_after_the_rehearsal(robot, observe, small_checkpoint):
    settings = EngineSettings(small_checkpoint, device="cpu", threads=1)
    engine = PolicyEngine(*load_policy(settings), settings.pruner, runner=GraphRunner(CPU))
    step = PolicyStep(engine, robot)
    engine.warm_up(lambda *_: None, prompt="stand still")
    step.rehearse("stand still")
    for _ in range(2):
        report = step.run(observe(), 0, want_overlay=False).report
        assert "capture" not in report.stage_ms


def test_nor_where_the_gpu_decodes_or_refuses_to(robot, in_color, small_checkpoint):
    settings = EngineSettings(small_checkpoint, device="cpu", threads=1)
    policy, decoder = load_policy(settings), Decoder()
    runner = GraphRunner(CPU)
    engine = PolicyEngine(*policy, settings.pruner, runner=runner, decoder=decoder)
    step = PolicyStep(engine, robot)
    engine.warm_up(lambda *_: None, prompt="stand still")
    step.rehearse("stand still")
    assert decoder.batches
    for decoder.refuses in (False, True, False):
        report = step.run(in_color(), 0, want_overlay=False).report
        assert "capture" not in report.stage_ms


def test_rehearsal_tells_the_sizes_and_leaves_a_fresh_session(engine, robot, observe):
    step = PolicyStep(engine, robot)
    assert step.rehearse() == (50, robot.layout.dof)
    assert step.run(observe(), 0, want_overlay=False).report.query == 1


def test_rehearsal_finds_a_checkpoint_of_another_robot(engine, robot):
    engine.answer = np.zeros(7)
    with pytest.raises(ConfigError, match="layout: found s1_16 of 16 joints, expected 7"):
        PolicyStep(engine, robot).rehearse()
