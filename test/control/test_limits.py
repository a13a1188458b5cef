import numpy as np
import pytest

from safe_pruner_node.control.limits import JointLimits
from safe_pruner_node.errors import ConfigError

GOOD = {
    "min_position": np.array([-1.0, 0.0]),
    "max_position": np.array([1.0, 100.0]),
    "max_velocity": np.array([1.0, 1.0]),
    "max_acceleration": np.array([1.0, 1.0]),
    "max_jerk": np.array([1.0, 1.0]),
}


def test_good_limits():
    assert JointLimits(**GOOD).dof == 2


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("max_position", [1.0, -100.0], "position of joint 1: found 0 .. -100"),
        ("min_position", [np.nan, 0.0], "position of joint 0"),
        ("max_velocity", [1.0, 0.0], "max_velocity of joint 1: found 0"),
        ("max_acceleration", [-1.0, 1.0], "max_acceleration of joint 0"),
        ("max_jerk", [1.0, np.inf], "max_jerk of joint 1"),
        ("max_jerk", [1.0], "max_jerk: found [1]"),
    ],
)
def test_wrong_limits_are_named(key, value, words):
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        JointLimits(**{**GOOD, key: np.array(value)})
