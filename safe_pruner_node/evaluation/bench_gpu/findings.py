"""All results of a run, with the questions that tables, bars and figures ask of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from safe_pruner_node.evaluation.bench_gpu.ceilings import Ceilings
from safe_pruner_node.evaluation.bench_gpu.peers import SECTION
from safe_pruner_node.evaluation.bench_gpu.queries import Shape
from safe_pruner_node.evaluation.bench_gpu.roofline import Cost, stage_costs
from safe_pruner_node.evaluation.bench_gpu.section import Result
from safe_pruner_node.evaluation.bench_gpu.tasks import best_path
from safe_pruner_node.pi05.config import Pi05Config

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Findings:
    """A run.

    Attributes:
        about: Device, versions, date and options.
        config: The model's sizes.
        results: What the sections left behind.
    """

    about: Mapping[str, Any]
    config: Pi05Config
    results: Sequence[Result]

    def of(self, section: str) -> Iterator[Result]:
        """A section's results, path by path; those that have some."""
        return (r for r in self.results if r.section == section and r.data)

    @property
    def latency(self) -> Mapping[str, Sequence[Row]]:
        """Path to its rows of the base shape."""
        return {result.path: result.data["rows"] for result in self.of("latency")}

    def row(self, path: str | None, mode: str) -> Row | None:
        """A row of the base shape; None where it was not measured."""
        rows = self.latency.get(path or "", ())
        return next((row for row in rows if row["mode"] == mode), None)

    @property
    def peers(self) -> Sequence[Result]:
        """Programs that were timed beside ours, those that have no figure too."""
        return [result for result in self.results if result.section == SECTION]

    @cached_property
    def best(self) -> str | None:
        """The fastest path that is right."""
        return best_path(self.results)

    @property
    def ceilings(self) -> Ceilings | None:
        """None where they were not measured."""
        return next((Ceilings(**result.data) for result in self.of("ceilings")), None)

    def costs(self, row: Row) -> dict[str, Cost]:
        """What the stages of a row's steps cannot do without."""
        return stage_costs(self.config, Shape(**row["shape"]), row["layer"], row["kept_tokens"])
