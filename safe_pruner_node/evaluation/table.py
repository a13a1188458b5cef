"""The table of an evaluation, from the lines of its results file alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from safe_pruner_node.evaluation.methods import FASTV, METHODS, VANILLA, keyframe_rate
from safe_pruner_node.evaluation.results import Line
from safe_pruner_node.evaluation.statistics import Interval, PairedTest, mcnemar, wilson

TITLES = {
    "vanilla": "Vanilla (trimmed)",
    "random": "Random",
    "fastv": "FastV",
    "safe": "SAFE-Pruner",
    "without_forecast": "SAFE without forecast (λ = 0)",
    "without_division": "SAFE without division",
    "fastv_equal_flops": "FastV at SAFE's FLOPs",
}


@dataclass(frozen=True)
class Count:
    """Successes of some episodes."""

    successes: int
    episodes: int

    @property
    def interval(self) -> Interval:
        """Rate and Wilson's 95 % interval."""
        return wilson(self.successes, self.episodes)


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        method: Its name.
        pruner: Its settings as JSON.
        by_task: Task to successes.
        pooled: Successes of all tasks.
        average: Mean of the tasks' rates.
        against: Baseline to the paired test against it; the method itself is left out.
        flops: ``paper_padded``, ``paper_trimmed`` and ``exact``, mean per policy step.
        flops_ratio: The same over vanilla's; NaN without vanilla.
        keyframes: Share of keyframes in all policy steps; NaN for methods without.
        step_ms: p50 and p99 on the engine that ran most episodes.
        kept: Camera to tokens kept, mean over pruned steps (over all where none is pruned).
    """

    method: str
    pruner: dict[str, Any]
    by_task: dict[str, Count]
    pooled: Count
    average: float
    against: dict[str, PairedTest]
    flops: dict[str, float]
    flops_ratio: dict[str, float]
    keyframes: float
    step_ms: tuple[float, float]
    kept: dict[str, float]


@dataclass(frozen=True)
class Table:
    """Everything about one rho.

    Attributes:
        rho: Share of visual tokens dropped.
        split: Whose seeds.
        tasks: In alphabetical order.
        rows: In the order of `METHODS`, then what else took part.
        notes: What it was measured on, line by line.
    """

    rho: float
    split: str
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def title(method: str) -> str:
    """A method's name for people; a preset's is its own."""
    return TITLES.get(method, method)


def make_tables(lines: Sequence[Line]) -> list[Table]:
    """One table per rho in the file; vanilla is part of each."""
    rhos = sorted({line["rho"] for line in lines if line["method"] != VANILLA})
    return [make_table(lines, rho) for rho in (rhos or [0.0] if lines else [])]


def make_table(lines: Sequence[Line], rho: float) -> Table:
    """The table of one rho.

    Args:
        lines: Of one file: one checkpoint, one split, one set of settings.
        rho: Methods filed under it take part, and vanilla.
    """
    lines = [line for line in lines if line["method"] == VANILLA or line["rho"] == rho]
    names = tuple(dict.fromkeys((*METHODS, *(line["method"] for line in lines))))
    of = {name: [line for line in lines if line["method"] == name] for name in names}
    tasks = tuple(sorted({line["task"] for line in lines}))
    engine = Counter(line["engine"] for line in lines).most_common(1)[0][0]
    rows = tuple(_row(name, of, tasks, engine) for name in names if of[name])
    return Table(rho, lines[0]["split"], tasks, rows, tuple(_notes(lines, rho, engine)))


def markdown(table: Table) -> str:
    """The table for people, with what it was measured on."""
    cameras = list(table.rows[0].kept)
    header = [
        "Method",
        *(f"{task} % [95 %]" for task in table.tasks),
        "average %",
        "p vs vanilla",
        "p vs FastV",
        "GFLOPs (paper)",
        "/ vanilla",
        "GFLOPs (exact)",
        "/ vanilla",
        "keyframes %",
        "step ms p50 / p99",
        f"kept {' / '.join(cameras)}",
    ]
    rows = [_cells(row, table.tasks, cameras) for row in table.rows]
    grid = "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])
    heading = f"# Success in the twin at rho = {table.rho:g}, {table.split} seeds"
    return "\n\n".join([heading, grid, "\n".join(f"- {note}" for note in table.notes)]) + "\n"


def _row(name: str, of: dict[str, list[Line]], tasks: tuple[str, ...], engine: str) -> Row:
    lines = of[name]
    by_task = {task: _count([line for line in lines if line["task"] == task]) for task in tasks}
    rates = [count.interval.rate for count in by_task.values()]
    flops = _mean_flops(lines)
    full = _mean_flops(of[VANILLA])
    step_ms = [ms for line in lines if line["engine"] == engine for ms in line["step_ms"]]
    percentiles = np.percentile(step_ms, [50, 99]) if step_ms else (math.nan, math.nan)
    return Row(
        method=name,
        pruner=dict(lines[0]["pruner"]),
        by_task=by_task,
        pooled=_count(lines),
        average=float(np.mean(rates)),
        against={
            other: mcnemar(_solved(lines), _solved(of[other]))
            for other in (VANILLA, FASTV)
            if other != name and of[other]
        },
        flops=flops,
        flops_ratio={key: flops[key] / full[key] if full else math.nan for key in flops},
        keyframes=keyframe_rate(lines) if lines[0]["pruner"]["method"] == "safe" else math.nan,
        step_ms=(float(percentiles[0]), float(percentiles[1])),
        kept=_kept(lines),
    )


def _count(lines: Sequence[Line]) -> Count:
    return Count(sum(bool(line["success"]) for line in lines), len(lines))


def _solved(lines: Sequence[Line]) -> dict[Hashable, bool]:
    return {(line["task"], line["index"]): bool(line["success"]) for line in lines}


def _mean_flops(lines: Sequence[Line]) -> dict[str, float]:
    queries = sum(line["queries"] for line in lines)
    names = lines[0]["flops"] if queries else {}
    return {name: sum(line["flops"].get(name, 0) for line in lines) / queries for name in names}


def _kept(lines: Sequence[Line]) -> dict[str, float]:
    pruned = sum(line["pruned_steps"] for line in lines)
    key, steps = "pruned_kept_tokens", pruned
    if not pruned:
        key, steps = ("kept_tokens", sum(line["queries"] for line in lines))
    cameras = dict.fromkeys(camera for line in lines for camera in line["visual_tokens"])
    return {
        camera: sum(line[key].get(camera, 0) for line in lines) / max(steps, 1)
        for camera in cameras
    }


def _cells(row: Row, tasks: tuple[str, ...], cameras: list[str]) -> list[str]:
    keyframes = "–" if math.isnan(row.keyframes) else f"{100 * row.keyframes:.1f}"
    cost = [
        text
        for key in ("paper_trimmed", "exact")
        for text in (f"{row.flops.get(key, math.nan) / 1e9:.3f}", _ratio(row, key))
    ]
    return [
        _title(row),
        *(_rate(row.by_task[task]) for task in tasks),
        f"**{100 * row.average:.1f}** {_interval(row.pooled.interval)}",
        _test(row.against.get(VANILLA)),
        _test(row.against.get(FASTV)),
        *cost,
        keyframes,
        f"{row.step_ms[0]:.0f} / {row.step_ms[1]:.0f}",
        " / ".join(f"{row.kept.get(camera, math.nan):.0f}" for camera in cameras),
    ]


def _title(row: Row) -> str:
    pruner = row.pruner
    if row.method == "fastv_equal_flops":
        return f"{title(row.method)} (rho {pruner['rho']:.3f})"
    if row.method == "without_division":
        return f"{title(row.method)} (every {pruner['interval']} queries)"
    return title(row.method)


def _rate(count: Count) -> str:
    if not count.episodes:
        return "–"
    interval = count.interval
    return f"{100 * interval.rate:.1f} {_interval(interval)} {count.successes}/{count.episodes}"


def _interval(interval: Interval) -> str:
    return f"[{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def _ratio(row: Row, key: str) -> str:
    ratio = row.flops_ratio.get(key, math.nan)
    return "–" if math.isnan(ratio) else f"{ratio:.3f}"


def _test(test: PairedTest | None) -> str:
    return "–" if test is None else f"{test.p:.3g} (+{test.gained} −{test.lost} of {test.pairs})"


def _notes(lines: Sequence[Line], rho: float, engine: str) -> list[str]:
    settings = lines[0]["settings"]
    first = lines[0]
    of_engine = [line for line in lines if line["engine"] == engine]
    workers = sorted({line["workers"] for line in of_engine})
    counts = Counter((line["method"], line["task"]) for line in lines)
    each = sorted(set(counts.values()))
    unequal = "" if len(each) == 1 else "; **not all episodes have been run yet**"
    gammas = sorted({f"{line['pruner']['gamma']:g}" for line in lines if line["method"] == "safe"})
    jpeg = settings["jpeg_quality"]
    each_text = "–".join(map(str, dict.fromkeys((each[0], each[-1]))))
    seeds = _ranges(sorted({line["seed"] for line in lines}))
    images = f"by way of JPEG quality {jpeg}" if jpeg else "as drawn, without JPEG"
    at_once = "–".join(map(str, workers))
    notes = [
        (
            f"Policy: {first['policy']}, checkpoint {first['checkpoint']}. The shipped nano is "
            "small and trained on scripted demonstrations in this twin; nothing here speaks of a "
            "real robot."
        ),
        (
            f"Seeds: {seeds} ({first['split']}), flow noise seed {settings['noise_seed']}; "
            f"{each_text} episodes per method and task, the same scenes and noise for every "
            f"method{unequal}."
        ),
        (
            f"rho {rho:g}, gamma {', '.join(gammas) or '–'}; a chunk {settings['latency_s']:g} s "
            f"after its query (simulated time, the same for every method), the next query when "
            f"the motion shows it; control at "
            f"{settings['control_rate_hz']:g} Hz; images {images}."
        ),
        (
            "Intervals: Wilson 95 %, of the average over all episodes pooled. p: McNemar's exact "
            "test over the pairs (episodes gained, lost)."
        ),
        (
            "FLOPs: prefill of one policy step, mean over all steps, keyframes included. Paper: "
            "4Nd² + 2N²d + 3Ndm per layer without padding, a multiply-add counted once; exact: as "
            "executed, counted twice."
        ),
        (
            f"Step: wall time of one query in the worker, image decoding to chunk, on {engine}, "
            f"{at_once} workers at once; {len(of_engine)} of {len(lines)} episodes. Kept: tokens "
            "per camera, mean over pruned steps."
        ),
        f"Code: {', '.join(sorted({line['git'] for line in lines}))}.",
    ]
    if settings["time_limit_s"]:
        notes.append(f"Episodes were cut at {settings['time_limit_s']:g} s.")
    return notes


def _ranges(numbers: list[int]) -> str:
    """Consecutive numbers as first–last."""
    parts = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}")
    return ", ".join(parts)
