"""The tasks by name."""

from __future__ import annotations

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.twin.tasks.base import Task
from safe_pruner_node.twin.tasks.pack_doll import PackDoll
from safe_pruner_node.twin.tasks.pick_and_place import PickAndPlace
from safe_pruner_node.twin.tasks.throw_basketball import ThrowBasketball

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (PickAndPlace, ThrowBasketball, PackDoll)
}


def build_task(name: str, seed: int) -> Task:
    """An episode of a named task.

    Raises:
        ConfigError: No task of that name.
    """
    if name not in TASKS:
        raise ConfigError("parameter", "task", name, f"one of {', '.join(sorted(TASKS))}")
    return TASKS[name](seed)
