"""The summary of a run: figures that can be checked by hand."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from PIL import Image

from safe_pruner_node.evaluation.figures import latency_figure
from safe_pruner_node.evaluation.run_record import (
    ControlRecord,
    RunRecord,
    StepRecord,
    percentiles,
    summarise,
)
from safe_pruner_node.evaluation.video import FPS, rollout_video

LOSS = {"head": {"published": 10, "received": 9, "used": 5, "dropped": 1}}


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
        cameras={"head": (index, index, 0)},
        flops=(3.0, 2.0, 1.0),
    )


@pytest.fixture
def record():
    control = ControlRecord(
        rate_hz=100.0,
        ticks=299,
        ticks_expected=300,
        starved_ticks=1,
        clamped_ticks=2,
        holds=0,
        worker_deaths=0,
        max_step=(0.01,) * 13 + (0.02,) + (4.0, 4.0),
        mode_name="HOLD",
        periods_ms=tuple([10.0] * 98 + [11.0, 15.0]),
    )
    pictures = []
    for index in range(4):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 36), (60 * index, 0, 0)).save(buffer, "JPEG")
        pictures.append((0.5 * index, buffer.getvalue()))
    return RunRecord(
        steps=[step(0, keyframe=True), step(1), step(2), step(3, kappa=0.93)],
        control=control,
        overlays={"head": pictures, "left_wrist": pictures, "right_wrist": []},
        checkpoint="abc",
        pruner="safe",
    )


def test_summary_counts_what_happened(record):
    summary = summarise(record, LOSS, "rev")
    assert summary["policy_steps"] == 4
    assert summary["keyframes"] == 1
    assert summary["step_ms"]["p50"] == 31.5
    assert summary["step_ms_keyframe"]["p50"] == 30.0
    assert summary["stage_ms"] == {"vision": 11.5, "denoise": 20.0}
    assert summary["tokens"] == {"visual": 768, "kept_p50": 192.0}
    assert summary["kappa"] == {"p50": 0.95, "min": 0.93}
    assert summary["control_period_ms"]["max"] == 15.0
    assert summary["max_joint_step_rad"] == 0.02, "grippers are not radians"
    assert summary["camera_frames"] == LOSS
    assert (summary["checkpoint"], summary["pruner"], summary["git"]) == ("abc", "safe", "rev")


def test_nothing_recorded_is_an_error_not_a_zero():
    with pytest.raises(ValueError, match="nothing to summarise"):
        summarise(RunRecord(), LOSS, "rev")


def test_percentiles_leave_out_what_is_not_a_number():
    assert percentiles([1.0, float("nan"), 3.0], {"p50": 50.0}) == {"p50": 2.0}
    assert percentiles([float("nan")], {"p50": 50.0}) == {"p50": None}


def test_latency_figure_marks_the_keyframe(record, tmp_path):
    path = tmp_path / "latency.png"
    latency_figure(record, path, "title")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    red = (abs(pixels - [0xC0, 0x39, 0x2B]).sum(axis=2) < 12).sum()
    without = RunRecord(**{**record.__dict__, "steps": [step(i) for i in range(4)]})
    latency_figure(without, path, "title")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert red > (abs(pixels - [0xC0, 0x39, 0x2B]).sum(axis=2) < 12).sum()


def test_rollout_video_runs_in_real_time_and_shows_the_newest_overlay(record, tmp_path):
    path = tmp_path / "rollout.mp4"
    rollout_video(record, path)
    with av.open(str(path)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == int(2.0 * FPS) + 1
    head = [int(f[240, 427, 0]) for f in frames]
    assert head[int(0.3 * FPS)] < head[int(0.8 * FPS)] < head[int(1.3 * FPS)] < head[-1]
