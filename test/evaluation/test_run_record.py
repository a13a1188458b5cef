"""The summary of a run: figures that can be checked by hand."""

from __future__ import annotations

import io
from contextlib import closing
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image

from safe_pruner_node.evaluation.figures import latency_figure
from safe_pruner_node.evaluation.run_record import (
    CameraWindow,
    ControlRecord,
    EpisodeRecord,
    RunRecord,
    StepRecord,
    camera_frames,
    percentiles,
    success_by_task,
    summarise,
)
from safe_pruner_node.evaluation.video import FPS, LAST_PICTURE_S, RolloutFilm

FRAMES = {"head": {"published": 10, "received": 9, "used": 5, "dropped": 1}}


def step(index, *, keyframe=False, kappa=0.95):
    return StepRecord(
        time_s=0.5 * (index + 1),
        query=index,
        keyframe=keyframe,
        kappa=float("nan") if keyframe else kappa,
        gamma=0.92,
        stage_ms={"vision": 10.0 + index, "denoise": 20.0},
        step_ms=30.0 + index,
        end_to_end_ms=60.0 + index,
        visual_tokens=768,
        kept_tokens=768 if keyframe else 192,
        flops=(3.0, 2.0, 1.0),
    )


CONTROL = ControlRecord(
    rate_hz=100.0,
    ticks=299,
    ticks_expected=300,
    starved_ticks=1,
    clamped_ticks=2,
    holds=1,
    worker_deaths=0,
    max_step=(0.01,) * 13 + (0.02,) + (4.0, 4.0),
    mode_name="HOLD",
    periods_ms=tuple([10.0] * 98 + [11.0, 15.0]),
)


def pictures(count=4, colour=60):
    made = []
    for index in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 36), (colour * index, 0, 0)).save(buffer, "JPEG")
        made.append((0.5 * index, buffer.getvalue()))
    return made


def episode(**changes):
    base = EpisodeRecord(
        task="pick_and_place",
        prompt="pick up the white egg",
        seed=1_000_000,
        time_limit_s=20.0,
        control=CONTROL,
        checkpoint="abc",
        pruner="safe",
        success=True,
        progress=100.0,
        seconds=1.5,
        simulated_s=1.9,
        wall_s=2.0,
        steps=[step(0, keyframe=True), step(1), step(2), step(3, kappa=0.93)],
        stages=[(0.0, 0.0), (0.6, 20.0), (1.5, 100.0)],
        cameras={"head": CameraWindow(1000, 5000, received=3, used=2)},
        images={"head": pictures(), "left_wrist": pictures(), "right_wrist": []},
        overlays={"head": pictures(), "left_wrist": [], "right_wrist": []},
    )
    return replace(base, **changes)


@pytest.fixture
def record():
    slower = replace(CONTROL, ticks=100, ticks_expected=100, max_step=(0.05,) * 14 + (9.0, 9.0))
    failed = episode(
        task="pack_doll",
        success=False,
        progress=55.0,
        seconds=4.0,
        simulated_s=4.0,
        wall_s=4.0,
        control=slower,
        steps=[step(0, keyframe=True), step(1, kappa=0.91)],
    )
    return RunRecord(episodes=[episode(), failed])


def test_summary_of_one_episode_counts_what_happened():
    summary = summarise(RunRecord([episode()]), FRAMES, "rev")
    assert summary["policy_steps"] == 4
    assert summary["keyframes"] == 1
    assert summary["step_ms"]["p50"] == 31.5
    assert summary["step_ms_keyframe"]["p50"] == 30.0
    assert summary["stage_ms"] == {"vision": 11.5, "denoise": 20.0}
    assert summary["tokens"] == {"visual": 768, "kept_p50": 192.0}
    assert summary["kappa"] == {"p50": 0.95, "min": 0.93}
    assert summary["control_period_ms"]["max"] == 15.0
    assert summary["max_joint_step_rad"] == 0.02, "grippers are not radians"
    assert summary["camera_frames"] == FRAMES
    assert (summary["checkpoint"], summary["pruner"], summary["git"]) == ("abc", "safe", "rev")


def test_summary_of_a_run_adds_its_episodes_up(record):
    summary = summarise(record, FRAMES, "rev")
    assert (summary["control_ticks"], summary["control_ticks_expected"]) == (399, 400)
    assert (summary["policy_steps"], summary["keyframes"], summary["holds"]) == (6, 2, 2)
    assert summary["max_joint_step_rad"] == 0.05
    assert summary["kappa"]["min"] == 0.91
    assert summary["real_time_factor"] == pytest.approx(5.9 / 6.0, abs=1e-4)
    first, second = summary["episodes"]
    assert (first["success"], first["seconds"], first["prompt"]) == (
        True,
        1.5,
        "pick up the white egg",
    )
    assert first["real_time_factor"] == 0.95
    assert (second["success"], second["progress"], second["policy_steps"]) == (False, 55.0, 2)


def test_success_has_wilson_intervals():
    runs = [episode(success=index < 18) for index in range(20)] + [episode(task="pack_doll")]
    table = success_by_task(runs)
    assert (table["pick_and_place"]["successes"], table["pick_and_place"]["episodes"]) == (18, 20)
    low, high = table["pick_and_place"]["wilson_95"]
    # By hand: (0.9 + z²/40 ± z sqrt(0.9 * 0.1 / 20 + z²/1600)) / (1 + z²/20), z = 1.96
    assert (low, high) == (pytest.approx(0.6990, abs=1e-3), pytest.approx(0.9721, abs=1e-3))
    assert table["pack_doll"]["wilson_95"][1] == 1.0


def test_a_frame_is_lost_when_the_twin_sent_it_while_the_policy_ran_and_nobody_got_it():
    first = episode()
    second = episode(cameras={"head": CameraWindow(8000, 9000, received=1, used=1)})
    sent = [1000, 2000, 3000, 4000, 5000, 6000, 7000, 8000, 9000]  # 6000 to 8000: in between
    assert camera_frames([first, second], {"head": sent}) == {
        "head": {"published": 5, "received": 4, "used": 3, "dropped": 1}
    }


def test_nothing_recorded_is_an_error_not_a_zero():
    with pytest.raises(ValueError, match="nothing to summarise"):
        summarise(RunRecord(), FRAMES, "rev")


def test_percentiles_leave_out_what_is_not_a_number():
    assert percentiles([1.0, float("nan"), 3.0], {"p50": 50.0}) == {"p50": 2.0}
    assert percentiles([float("nan")], {"p50": 50.0}) == {"p50": None}


def red_pixels(path):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return (abs(pixels - [0xC0, 0x39, 0x2B]).sum(axis=2) < 12).sum()


def test_latency_figure_marks_the_keyframes(record, tmp_path):
    path = tmp_path / "latency.png"
    latency_figure(record, path, "title")
    marked = red_pixels(path)
    for part in record.episodes:
        part.steps = [step(index) for index in range(4)]
    latency_figure(record, path, "title")
    assert marked > red_pixels(path)


def test_the_film_runs_in_real_time_and_shows_the_newest_picture_and_the_end(tmp_path):
    path = tmp_path / "rollout.mp4"
    with closing(RolloutFilm(path)) as film:
        film.add(episode())
        film.add(episode(success=False, progress=20.0, stages=[(0.0, 0.0)]))
    with av.open(str(path)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    length = int(2.0 * FPS) + 1 + int(LAST_PICTURE_S * FPS)
    assert len(frames) == 2 * length
    for start in (0, length):
        head = [int(f[300, 427, 0]) for f in frames[start : start + length]]
        assert head[int(0.3 * FPS)] < head[int(0.8 * FPS)] < head[int(1.3 * FPS)] < head[-1]
    # The flag in the corner of the last picture, and the bar of the progress.
    flag, bar = (60, 20), (700, 400)
    assert frames[length - 1][flag].argmax() == 1, "green: done"
    assert frames[-1][flag].argmax() == 0, "red: not done"
    assert frames[length - 1][bar].max() > frames[int(0.3 * FPS)][bar].max() + 60
