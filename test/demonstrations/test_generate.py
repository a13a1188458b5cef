"""The generator with the real twin, the real experts and real processes."""

import itertools
import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from safe_pruner_node.demonstrations.dataset import open_dataset
from safe_pruner_node.demonstrations.features import CAMERA_FEATURES, camera_feature
from safe_pruner_node.demonstrations.generate import (
    GenerateOptions,
    _keep_only_if_same,
    code_fingerprint,
    generate,
)
from safe_pruner_node.demonstrations.images import fit
from safe_pruner_node.demonstrations.recording import twin_spec
from safe_pruner_node.demonstrations.rollout import demonstrate
from safe_pruner_node.demonstrations.workers import Job, WorkerPool, failure_file
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.twin.cameras import CameraRig, drawn_resolutions
from safe_pruner_node.twin.tasks.episode import Episode
from safe_pruner_node.twin.tasks.registry import build_task
from safe_pruner_node.twin.tasks.seeds import episode_seed

ROBOT_FILE = resource("config/astribot_s1.yaml")
PICK, THROW = "pick_and_place", "throw_basketball"
SIZE = 96


def options(out, **changes):
    return GenerateOptions(
        **({"tasks": (PICK, THROW), "episodes": 1, "image_size": SIZE, "out": out} | changes)
    )


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """Two episodes by two processes, and the summary line."""
    out = tmp_path_factory.mktemp("generated") / "dataset"
    return out, generate(options(out, workers=2), Console(quiet=True))


def test_the_summary_counts(generated):
    out, summary = generated
    frames = open_dataset(out).frames
    assert f"2 episodes, {frames} frames" in summary
    assert f"{PICK} 1/1, {THROW} 1/1" in summary
    assert "episodes/min" in summary


def test_the_dataset_is_the_demonstration(generated):
    """State, action, landmarks and images of frame k are those of the expert's frame k."""
    opened = open_dataset(generated[0])
    robot = load_robot_config(ROBOT_FILE)
    opened.check_robot(robot)
    episode = Episode(build_task(PICK, episode_seed("demonstration", 0)), robot)
    truth = demonstrate(episode)
    info = opened.episodes[0]
    assert info.details == {"task_name": PICK, "seed": truth.seed, "tries": truth.tries}
    assert info.task == truth.prompt
    assert info.length == len(truth.frames)
    for key, column in (("state", opened.state), ("action", opened.action)):
        values = np.stack([getattr(frame, key) for frame in truth.frames])
        np.testing.assert_array_equal(column[info.rows], values.astype(np.float32))
    landmarks = np.stack([frame.landmarks.ravel() for frame in truth.frames])
    np.testing.assert_array_equal(opened.environment[info.rows], landmarks.astype(np.float32))
    rig = CameraRig(episode.sim.model, drawn_resolutions(robot))
    for camera, feature in CAMERA_FEATURES.items():
        images = opened.read_frames(0, feature)
        for k in (0, info.length // 2, info.length - 1):
            rig.show(truth.frames[k].snapshot)
            drawn = fit(rig.render(camera), SIZE)
            error = np.mean((images[k].astype(float) - drawn) ** 2)
            assert 10 * np.log10(255**2 / error) > 30, (camera, k)  # coarse at 96 pixels
    rig.close()


def broken_off(out, *failed):
    """What a run leaves that was broken off after some episodes failed."""
    spec = twin_spec(load_robot_config(ROBOT_FILE), SIZE)
    _keep_only_if_same(out / "parts", options(out), spec, code_fingerprint(ROBOT_FILE))
    for task in failed:
        failure_file(out / "parts" / f"{task}-00000000").write_text("{}")


def test_one_process_makes_the_same_and_a_run_goes_on_where_it_was(generated, tmp_path):
    broken_off(tmp_path, THROW)
    summary = generate(options(tmp_path, workers=1), Console(quiet=True))
    assert f"{PICK} 1/1, {THROW} 0/1" in summary
    whole, again = open_dataset(generated[0]), open_dataset(tmp_path)
    rows = whole.episodes[0].rows
    np.testing.assert_array_equal(again.state, whole.state[rows])
    np.testing.assert_array_equal(again.action, whole.action[rows])
    for feature in CAMERA_FEATURES.values():
        np.testing.assert_array_equal(again.read_frames(0, feature), whole.read_frames(0, feature))
    about = json.loads((tmp_path / "meta/generation.json").read_text())
    assert about["tasks"][THROW] == {"tried": 1, "kept": 0, "failed_seeds": [0]}


def test_failures_alone_make_no_dataset(tmp_path):
    broken_off(tmp_path, PICK, THROW)
    with pytest.raises(ConfigError, match="no episodes"):
        generate(options(tmp_path), Console(quiet=True))


def test_parts_of_another_run_are_not_mixed_in(tmp_path):
    broken_off(tmp_path)
    with pytest.raises(ConfigError, match=r"settings\.json: split: found demonstration, expected"):
        generate(options(tmp_path, split="validation"), Console(quiet=True))


def test_parts_of_other_code_are_not_mixed_in(tmp_path):
    broken_off(tmp_path)
    settings = tmp_path / "parts" / "settings.json"
    settings.write_text(settings.read_text().replace(code_fingerprint(ROBOT_FILE), "0ld"))
    with pytest.raises(ConfigError, match=r"settings\.json: code: found 0ld, expected"):
        generate(options(tmp_path), Console(quiet=True))


def test_a_stopped_pool_finishes_what_it_has_begun(tmp_path):
    jobs = [Job(THROW, seed, tmp_path / f"{seed}") for seed in range(40)]
    pool = WorkerPool(jobs, 1, ROBOT_FILE, 32)
    recorded = 0
    for recording in pool.outcomes():
        if recording is not None:
            recorded += 1
            pool.stop()
    pool.close()
    assert 1 <= recorded <= 2
    done = [path for path in tmp_path.iterdir() if not path.name.endswith(".unfinished")]
    assert len(done) == recorded
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_failing_process_is_one_line(tmp_path):
    pool = WorkerPool([Job("juggling", 0, tmp_path / "0")], 1, ROBOT_FILE, 32)
    with pytest.raises(ConfigError, match="task: found juggling, expected one of"):
        list(pool.outcomes())
    pool.close()


def test_a_finished_dataset_is_not_touched(generated, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(generated[0], out)
    with pytest.raises(ConfigError, match="a finished dataset"):
        generate(options(out), Console(quiet=True))
    open_dataset(out)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tasks": ("juggling",)}, "tasks: found juggling"),
        ({"episodes": 0}, "episodes: found 0"),
        ({"workers": 0}, "workers: found 0"),
        ({"minutes": 0.0}, "minutes"),
        ({"image_size": 8}, "image_size: found 8"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, wrong, said):
    with pytest.raises(ConfigError, match=said):
        options(tmp_path, **wrong)


def test_camera_names_of_the_robot_and_of_the_dataset():
    robot = load_robot_config(ROBOT_FILE)
    features = [camera_feature(name) for name in robot.policy.camera_order]
    assert features == list(itertools.islice(CAMERA_FEATURES.values(), len(features)))
    assert camera_feature("left_wrist") == "observation.images.wrist_left"
