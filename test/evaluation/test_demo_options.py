"""Options of the demo: which episodes they mean, and wrong ones refused before anything starts."""

from __future__ import annotations

import pytest
from rich.console import Console

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.demo import DemoOptions, plan_episodes, run_demo
from safe_pruner_node.twin.tasks.registry import TASKS
from safe_pruner_node.twin.tasks.seeds import episode_seed


def test_by_default_every_task_once_with_its_own_time():
    plans = plan_episodes(DemoOptions())
    assert [plan.task for plan in plans] == list(TASKS)
    assert {plan.seed for plan in plans} == {episode_seed("validation", 0)}
    assert [plan.limit_s for plan in plans] == [TASKS[p.task].time_limit_s for p in plans]


def test_many_episodes_of_one_task_follow_each_other():
    options = DemoOptions(
        task="pack_doll", episodes=3, split="calibration", first_seed_index=4, seconds=9.0
    )
    plans = plan_episodes(options)
    assert [plan.seed for plan in plans] == [episode_seed("calibration", i) for i in (4, 5, 6)]
    assert {(plan.task, plan.limit_s) for plan in plans} == {("pack_doll", 9.0)}


def test_seconds_shorten_and_never_lengthen():
    for plan in plan_episodes(DemoOptions(seconds=1000.0)):
        assert plan.limit_s == TASKS[plan.task].time_limit_s


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seconds": 0.0}, "seconds"),
        ({"seconds": -3.0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"episodes": 0}, "episodes"),
        ({"task": "juggling"}, "juggling"),
        ({"first_seed_index": -1}, "-1"),
        ({"first_seed_index": 999_999, "episodes": 2}, "1000000"),
    ],
)
def test_a_wrong_option_is_no_run(tmp_path, options, words):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=words):
        run_demo(DemoOptions(**options, out=out), Console())
    assert not out.exists()


def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path):
    checkpoint = tmp_path / "my_polcy"
    with pytest.raises(ConfigError, match="my_polcy") as caught:
        run_demo(DemoOptions(checkpoint=checkpoint, out=tmp_path / "out"), Console())
    assert "\n" not in str(caught.value)
    assert not checkpoint.exists()
