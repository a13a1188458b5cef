"""The experts by the name of their task."""

from __future__ import annotations

from safe_pruner_node.twin.experts.base import Expert
from safe_pruner_node.twin.experts.pack_doll import PackDollExpert
from safe_pruner_node.twin.experts.pick_and_place import PickAndPlaceExpert
from safe_pruner_node.twin.experts.throw_basketball import ThrowBasketballExpert
from safe_pruner_node.twin.tasks.episode import Episode

EXPERTS: dict[str, type[Expert]] = {
    "pick_and_place": PickAndPlaceExpert,
    "throw_basketball": ThrowBasketballExpert,
    "pack_doll": PackDollExpert,
}


def build_expert(episode: Episode, mistake_chance: float = 0.07) -> Expert:
    """The expert of an episode's task, seeded by the episode."""
    return EXPERTS[episode.task.name](episode, episode.task.seed, mistake_chance)
