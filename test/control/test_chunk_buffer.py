import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_pruner_node.control.chunk_buffer import ChunkBuffer
from safe_pruner_node.types import ActionChunk

DT = 1.0 / 30.0


def line(slope, offset=0.0, *, time_s=0.0, horizon=30, epoch=0, dof=2):
    """A chunk whose target is ``offset + slope * t`` in absolute time t."""
    times = time_s + np.arange(horizon) * DT
    return ActionChunk(np.repeat((offset + slope * times)[:, None], dof, axis=1), time_s, DT, epoch)


def test_empty_buffer_has_no_sample():
    assert ChunkBuffer(2, 0.1).sample(0.0) is None


@pytest.mark.parametrize("latency_s", [0.0, 0.05, 0.31])
def test_late_chunk_plays_from_the_action_that_belongs_to_now(latency_s):
    buffer = ChunkBuffer(2, 0.1)
    assert buffer.add(line(1.0, time_s=5.0), 5.0 + latency_s)
    sample = buffer.sample(5.0 + latency_s)
    np.testing.assert_allclose(sample.position, 5.0 + latency_s, atol=1e-9)
    np.testing.assert_allclose(sample.velocity, 1.0, atol=1e-9)
    assert sample.remaining == 30 - int(np.ceil(latency_s / DT - 1e-9))


def test_replacing_a_chunk_by_the_same_plan_changes_nothing():
    buffer = ChunkBuffer(2, 0.1)
    buffer.add(line(1.0), 0.0)
    buffer.add(line(1.0, time_s=0.2), 0.35)
    for now_s in np.linspace(0.35, 0.6, 40):
        np.testing.assert_allclose(buffer.sample(now_s).position, now_s, atol=1e-9)


def test_blend_begins_on_the_old_chunk_and_ends_on_the_new():
    buffer = ChunkBuffer(2, 0.1)
    buffer.add(line(1.0), 0.0)
    buffer.add(line(1.0, offset=1.0, time_s=0.1), 0.2)
    np.testing.assert_allclose(buffer.sample(0.2).position, 0.2, atol=1e-9)
    np.testing.assert_allclose(buffer.sample(0.25).position, 0.75, atol=1e-9)
    np.testing.assert_allclose(buffer.sample(0.3).position, 1.3, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    arrivals=st.lists(
        st.tuples(st.floats(0.0, 0.2), st.floats(0.0, 0.3), st.floats(-3.0, 3.0)),
        min_size=1,
        max_size=8,
    )
)
def test_plan_is_continuous_over_any_sequence_of_chunks(arrivals):
    """Also a chunk that comes while the one before is still being blended in."""
    buffer = ChunkBuffer(1, 0.1)
    now, step = 1.0, 1e-5
    buffer.add(line(0.5, time_s=1.0, dof=1, horizon=100), now)
    for gap_s, latency_s, offset in arrivals:
        now += gap_s
        before = buffer.sample(now)
        buffer.add(line(0.5, offset, time_s=now - latency_s, dof=1, horizon=100), now)
        after = buffer.sample(now)
        np.testing.assert_allclose(after.position, before.position, atol=1e-9)
        np.testing.assert_allclose(after.velocity, before.velocity, atol=1e-7)
        for _ in range(3):
            now += 0.01
            here, there = buffer.sample(now), buffer.sample(now + step)
            moved = (there.position - here.position) / step
            np.testing.assert_allclose(moved, here.velocity, rtol=1e-2, atol=0.5)


def test_end_of_the_chunk_starves_at_the_last_action():
    buffer = ChunkBuffer(2, 0.0)
    chunk = line(1.0)
    buffer.add(chunk, 0.0)
    assert not buffer.sample(chunk.end_s - 1e-6).starved
    sample = buffer.sample(chunk.end_s + 1e-6)
    assert sample.starved
    assert sample.remaining == 0
    np.testing.assert_allclose(sample.position, chunk.actions[-1])
    np.testing.assert_array_equal(sample.velocity, 0.0)


def test_chunk_of_an_older_epoch_is_dropped():
    buffer = ChunkBuffer(2, 0.1)
    in_flight = line(1.0, epoch=buffer.epoch)
    buffer.bump_epoch()
    assert not buffer.add(in_flight, 0.0)
    assert "epoch" in buffer.drop_reason
    assert buffer.sample(0.0) is None
    assert buffer.add(line(1.0, epoch=buffer.epoch), 0.0)


def test_bump_forgets_what_was_playing():
    buffer = ChunkBuffer(2, 0.1)
    buffer.add(line(1.0), 0.0)
    buffer.bump_epoch()
    assert buffer.sample(0.0) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_drops_the_whole_chunk(bad):
    buffer = ChunkBuffer(2, 0.1)
    buffer.add(line(1.0), 0.0)
    chunk = line(3.0, time_s=0.1)
    chunk.actions[-1, 1] = bad
    assert not buffer.add(chunk, 0.1)
    assert "not finite" in buffer.drop_reason
    np.testing.assert_allclose(buffer.sample(0.2).position, 0.2, atol=1e-9)


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        (line(1.0, dof=3), "shape [30, 3], expected [horizon, 2]"),
        (ActionChunk(np.zeros((0, 2)), 0.0, DT, 0), "shape"),
        (ActionChunk(np.zeros(2), 0.0, DT, 0), "shape"),
        (ActionChunk(np.full((3, 2), -1e300), 0.0, DT, 0), "magnitude 1e+300"),
        (ActionChunk(np.zeros((3, 2)), 0.0, 0.0, 0), "step 0.0 s"),
        (ActionChunk(np.zeros((3, 2)), np.nan, DT, 0), "chunk time nan"),
        (line(1.0, horizon=2), "ended"),
        (line(1.0, time_s=-1.0, horizon=90), "older"),
    ],
)
def test_unusable_chunks_are_dropped_with_a_reason(chunk, words):
    buffer = ChunkBuffer(2, 0.1)
    buffer.add(line(1.0), 0.0)
    assert not buffer.add(chunk, 0.5)
    assert words in buffer.drop_reason
