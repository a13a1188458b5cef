import threading
import time

import numpy as np
import pytest

from safe_pruner_node.control.clock import ManualClock, SteadyClock
from safe_pruner_node.control.loop import ClockDrivenLoop, RealTimeLoop


def run_on_manual_clock(durations_s, rate_hz=100.0, ticks=None):
    """Run a loop whose n-th tick takes ``durations_s[n]`` of a manual clock's time."""
    clock, times, done = ManualClock(10.0), [], threading.Event()
    ticks = len(durations_s) if ticks is None else ticks

    def tick(now_s):
        if len(times) < ticks:
            times.append(now_s)
            clock.advance(durations_s[len(times) - 1] if len(times) <= len(durations_s) else 0.0)
        if len(times) == ticks:
            done.set()
            loop.stop()

    loop = RealTimeLoop(rate_hz, tick, clock)
    loop.start()
    assert done.wait(10.0)
    loop.stop()
    return loop, np.array(times)


def test_ticks_keep_to_absolute_deadlines():
    """The time a tick takes does not add to the period."""
    loop, times = run_on_manual_clock([0.003] * 50)
    np.testing.assert_allclose(times, 10.0 + 0.01 * np.arange(50), atol=1e-9)
    statistics = loop.statistics()
    assert statistics.ticks == statistics.expected_ticks == 50
    assert statistics.overruns == 0
    np.testing.assert_allclose(statistics.period_p50_ms, 10.0)
    np.testing.assert_allclose(statistics.jitter_p99_ms, 0.0, atol=1e-9)


def test_missed_deadlines_are_skipped_never_made_up_for():
    durations = [0.001] * 20
    durations[5] = 0.037
    loop, times = run_on_manual_clock(durations)
    periods = np.diff(times)
    np.testing.assert_allclose(periods[5], 0.04)
    np.testing.assert_allclose(np.delete(periods, 5), 0.01, atol=1e-9)
    statistics = loop.statistics()
    assert statistics.overruns == 3
    assert statistics.ticks == 20
    assert statistics.expected_ticks == 23
    np.testing.assert_allclose(statistics.period_max_ms, 40.0)
    np.testing.assert_allclose(loop.periods(after=18), [0.01, 0.01], atol=1e-9)


def test_exception_in_a_tick_is_reported_and_the_loop_goes_on():
    seen, done, count = [], threading.Event(), [0]

    def tick(_now_s):
        count[0] += 1
        if count[0] == 3:
            raise RuntimeError("boom")
        if count[0] > 5:
            done.set()

    loop = RealTimeLoop(500.0, tick, on_error=seen.append)
    loop.start()
    assert done.wait(10.0)
    loop.stop()
    assert [str(error) for error in seen] == ["boom"]
    assert loop.statistics().errors == 1


def test_exception_in_the_report_of_an_exception_does_not_end_the_loop():
    done, count = threading.Event(), [0]

    def tick(_now_s):
        count[0] += 1
        if count[0] > 5:
            done.set()
        raise RuntimeError("boom")

    def on_error(_error):
        raise ValueError("nobody listens")

    loop = RealTimeLoop(500.0, tick, on_error=on_error)
    loop.start()
    assert done.wait(10.0)
    loop.stop()


def test_real_loop_runs_stops_and_starts_again():
    times = []
    loop = RealTimeLoop(100.0, times.append)
    for _ in range(2):
        loop.start()
        time.sleep(0.2)
        loop.stop()
        ticks = len(times)
        time.sleep(0.05)
        assert len(times) == ticks, "a tick after stop"
    assert ticks >= 4
    assert np.all(np.diff(times) > 0.0)
    assert loop.statistics().ticks <= ticks, "statistics are since the last start"
    assert isinstance(loop.statistics().realtime, bool)


def test_stop_waits_for_the_tick_that_runs():
    began, log = threading.Event(), []

    def tick(_now_s):
        began.set()
        time.sleep(0.1)
        log.append("ticked")

    loop = RealTimeLoop(100.0, tick)
    loop.start()
    assert began.wait(5.0)
    loop.stop()
    log.append("stopped")
    time.sleep(0.15)
    assert log[-1] == "stopped"


def test_stop_from_within_a_tick_does_not_deadlock():
    done = threading.Event()

    def tick(_now_s):
        loop.stop()
        done.set()

    loop = RealTimeLoop(100.0, tick)
    loop.start()
    assert done.wait(5.0)


def test_loop_without_ticks_has_statistics():
    statistics = RealTimeLoop(100.0, lambda _now_s: None).statistics()
    assert (statistics.ticks, statistics.expected_ticks) == (0, 0)
    assert np.isnan(statistics.period_p50_ms)


def test_clock_driven_loop_ticks_once_a_period():
    times = []
    loop = ClockDrivenLoop(100.0, times.append)
    loop.start()
    for k in range(101):
        loop.step_to(0.002 * k)
    loop.stop()
    np.testing.assert_allclose(times, 0.01 * np.arange(21), atol=1e-9)
    assert loop.statistics().ticks == loop.statistics().expected_ticks == 21


def test_clock_driven_loop_skips_what_the_clock_skipped_and_sees_it_go_back():
    times = []
    loop = ClockDrivenLoop(100.0, times.append)
    for now_s in (1.0, 1.01, 1.05, 1.05, 0.2):
        loop.step_to(now_s)
    assert times == [1.0, 1.01, 1.05, 0.2]
    assert loop.statistics().overruns == 3


def test_steady_clock_does_not_sleep_to_the_past():
    clock = SteadyClock()
    clock.sleep_until(clock.now_s() - 100.0)


def test_manual_clock_never_goes_back_by_sleeping():
    clock = ManualClock(5.0)
    clock.sleep_until(3.0)
    assert clock.now_s() == pytest.approx(5.0)
    clock.sleep_until(7.0)
    assert clock.now_s() == pytest.approx(7.0)
