"""Rules of the wire that need no ROS: command messages, the lock-step barrier, parameters."""

import threading

import numpy as np
import pytest

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.twin.commands import command_positions
from safe_pruner_node.twin.lockstep import CommandBarrier
from safe_pruner_node.twin.settings import TwinSettings, twin_settings

NAMES = ("a", "b", "c")


def positions(**message):
    message = {"mode": 1, "names": [], "values": [1.0, 2.0, 3.0], **message}
    return command_positions("/topic", NAMES, **message)


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_positions_come_first_whatever_follows(copies):
    values = [1.0, 2.0, 3.0] + [9.0] * 3 * (copies - 1)
    np.testing.assert_array_equal(positions(values=values), [1, 2, 3])


def test_names_may_be_empty_or_the_parts_own():
    np.testing.assert_array_equal(positions(names=list(NAMES)), [1, 2, 3])


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ({"mode": 2}, "/topic: mode: found 2, expected 1"),
        ({"values": [1.0, 2.0]}, "/topic: command: found 2 values, expected 3, 6 or 9"),
        ({"values": []}, "/topic: command: found 0 values"),
        ({"values": [1.0, float("nan"), 3.0]}, "/topic: command: found .*nan"),
        ({"values": [1.0, 2.0, 3.0, 0.0, 0.0, float("inf")]}, "/topic: command: found .*inf"),
        ({"names": ["b", "a", "c"]}, "/topic: name: found .*'b', 'a', 'c'"),
    ],
)
def test_wrong_commands_give_one_line(message, line):
    with pytest.raises(ConfigError, match=line) as error:
        positions(**message)
    assert "\n" not in str(error.value)


def test_barrier_opens_with_the_last_part_of_the_tick():
    barrier = CommandBarrier(["left", "right"])
    barrier.open_tick(100)
    barrier.offer("left", 100)
    assert not barrier.wait(0)
    barrier.offer("right", 100)
    assert barrier.wait(0)


def test_barrier_does_not_count_answers_to_an_older_tick():
    barrier = CommandBarrier(["left", "right"])
    barrier.open_tick(200)
    barrier.offer("left", 100)
    barrier.offer("right", 200)
    assert not barrier.wait(0)


def test_barrier_counts_unstamped_commands_and_ignores_other_parts():
    barrier = CommandBarrier(["left"])
    barrier.open_tick(200)
    barrier.offer("head", 200)
    assert not barrier.wait(0)
    barrier.offer("left", 0)
    assert barrier.wait(0)


def test_a_new_tick_asks_again():
    barrier = CommandBarrier(["left"])
    barrier.open_tick(1)
    barrier.offer("left", 1)
    barrier.open_tick(2)
    assert not barrier.wait(0)


def test_barrier_wakes_a_waiting_thread():
    barrier = CommandBarrier(["left"])
    barrier.open_tick(5)
    timer = threading.Timer(0.05, barrier.offer, ("left", 5))
    timer.start()
    assert barrier.wait(10)
    timer.join()


def test_closing_frees_a_waiting_thread():
    """Else Ctrl-C would last as long as the lock-step timeout."""
    barrier = CommandBarrier(["left"])
    barrier.open_tick(5)
    timer = threading.Timer(0.05, barrier.close)
    timer.start()
    assert not barrier.wait(60)
    timer.join()


def test_defaults_are_the_robots_rates():
    settings = twin_settings({})
    assert settings == TwinSettings()
    assert (settings.state_rate_hz, settings.camera_rate_hz, settings.cameras_on) == (250, 30, True)


def test_whole_numbers_are_numbers():
    assert twin_settings({"camera_rate_hz": 15}).camera_rate_hz == 15.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("camera_rate_hz", 0.0),
        ("camera_rate_hz", "fast"),
        ("state_rate_hz", -1.0),
        ("camera_scale", 0.0),
        ("camera_scale", 3.0),
        ("control_period_s", 0.0),
        ("lock_step", "yes"),
        ("niceness", 40),
        ("seed", 1.5),
        ("camera_rte_hz", 15.0),
    ],
)
def test_wrong_parameters_name_themselves(name, value):
    with pytest.raises(ConfigError, match=f"^parameter: {name}: found .*, expected ") as error:
        twin_settings({name: value})
    assert "\n" not in str(error.value)
