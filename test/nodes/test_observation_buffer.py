"""The newest coherent set of frames, or a reason why there is none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_pruner_node.nodes.observation_buffer import CameraSet, NoSet, ObservationBuffer
from safe_pruner_node.types import CameraFrame

MS = 1_000_000
CAMERAS = ("head", "left_wrist", "right_wrist")


def frame(stamp_ms, received_ms=None):
    received_ms = stamp_ms if received_ms is None else received_ms
    return CameraFrame(b"", "jpeg", 0, 0, 0, int(stamp_ms * MS), int(received_ms * MS))


def buffer_with(stamps_ms):
    buffer = ObservationBuffer(CAMERAS, max_age_s=0.25, max_skew_s=0.05)
    for camera, stamps in zip(CAMERAS, stamps_ms, strict=True):
        for stamp in stamps:
            buffer.add(camera, frame(stamp))
    return buffer


def newest(buffer, now_ms, steady_ms=None):
    return buffer.newest_set(int(now_ms * MS), int((steady_ms or now_ms) * MS))


def test_a_silent_camera_is_named():
    buffer = buffer_with([[1000], [], [1000]])
    assert newest(buffer, 1010) == NoSet("no image yet from left_wrist")


def test_frames_of_one_moment_are_paired_though_one_camera_is_behind():
    buffer = buffer_with([[967, 1000, 1033], [966, 999], [968, 1001, 1034]])
    chosen = newest(buffer, 1040)
    assert isinstance(chosen, CameraSet)
    stamps = [f.stamp_ns // MS for f in chosen.frames.values()]
    assert stamps == [1000, 999, 1001]
    assert chosen.skew_s == pytest.approx(0.002)
    assert chosen.oldest_stamp_ns == 999 * MS


def test_too_far_apart_is_refused():
    buffer = buffer_with([[1000], [1000], [1100]])
    answer = newest(buffer, 1110)
    assert isinstance(answer, NoSet)
    assert "100 ms apart" in answer.reason


def test_a_frozen_camera_repeats_its_stamp_and_is_refused():
    buffer = buffer_with([[1000], [1000], [1000]])
    for now in range(1033, 1400, 33):
        for camera in CAMERAS:
            buffer.add(camera, frame(1000 if camera == "head" else now, received_ms=now))
    answer = newest(buffer, 1400)
    assert isinstance(answer, NoSet)
    assert "head" in answer.reason


def test_old_by_the_steady_clock_though_the_stamps_look_fresh():
    buffer = buffer_with([[1000], [1000], [1000]])
    answer = newest(buffer, 1010, steady_ms=1400)
    assert isinstance(answer, NoSet)
    assert "silent for 0.40 s" in answer.reason


@pytest.mark.parametrize("offset_ms", [-5000, 5000])
def test_clocks_that_are_not_synchronised_are_called_so(offset_ms):
    buffer = buffer_with([[1000 + offset_ms]] * 3)
    answer = newest(buffer, 1010, steady_ms=1010 + offset_ms)
    assert isinstance(answer, NoSet)
    assert "clocks not synchronised" in answer.reason


def test_a_restarted_camera_forgets_its_future():
    buffer = buffer_with([[9000], [9000], [9000]])
    for camera in CAMERAS:
        buffer.add(camera, frame(1000))
    assert isinstance(newest(buffer, 1010), CameraSet)


def test_lost_frames_are_counted_by_the_gaps():
    stamps = [33 * i for i in range(30) if i not in {10, 11, 20}]
    buffer = buffer_with([stamps] * 3)
    counts = buffer.counts()["head"]
    assert (counts.received, counts.dropped) == (27, 3)


def test_used_counts_frames_not_queries():
    buffer = buffer_with([[1000]] * 3)
    newest(buffer, 1001)
    newest(buffer, 1002)
    assert buffer.counts()["head"].used == 1


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.integers(0, 2000), min_size=1, max_size=8), min_size=3, max_size=3),
    st.integers(0, 2500),
)
def test_whatever_arrives_a_set_is_within_its_bounds(stamps, now):
    answer = newest(buffer_with([sorted(s) for s in stamps]), now)
    if isinstance(answer, CameraSet):
        assert answer.skew_s <= 0.05
        assert all(abs(age) <= 0.25 for age in answer.age_s.values())
        assert all(age <= 0.25 for age in answer.receive_age_s.values())
