"""The table as a picture: success with intervals, and what it costs."""

from __future__ import annotations

import math
from pathlib import Path
from textwrap import fill

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from safe_pruner_node.evaluation.methods import VANILLA
from safe_pruner_node.evaluation.table import Row, Table, title

NOTE_COLUMNS = 170
"""Characters of the note under the title that fit in a line."""

_COLOURS = ("#2471a3", "#ca6f1e", "#1e8449", "#7d3c98", "#b03a2e")


def draw_table(table: Table, path: Path) -> None:
    """Success per task and on average, with Wilson's intervals, and FLOPs against vanilla.

    Args:
        table: What to show.
        path: PNG to write.
    """
    rows = list(reversed(table.rows))
    figure, (success, cost) = plt.subplots(
        1,
        2,
        figsize=(12, 1.6 + 0.75 * len(rows)),
        sharey=True,
        width_ratios=(3, 1),
        layout="constrained",
    )
    series = [*table.tasks, "average"]
    for number, name in enumerate(series):
        offset = 0.28 - 0.56 * number / max(len(series) - 1, 1)
        average = name == "average"
        for y, row in enumerate(rows):
            count = row.pooled if average else row.by_task[name]
            if not count.episodes:
                continue
            interval = count.interval
            rate = row.average if average else interval.rate
            colour = "black" if average else _COLOURS[number % len(_COLOURS)]
            success.plot(
                [100 * interval.low, 100 * interval.high], [y + offset] * 2, color=colour, lw=1.5
            )
            success.plot(
                100 * rate,
                y + offset,
                "D" if average else "o",
                color=colour,
                label=name if y == 0 else None,
            )
    success.set_yticks(range(len(rows)), [_label(row) for row in rows])
    success.set_xlim(-2, 102)
    success.set_xlabel("success, % (lines: Wilson 95 %)")
    success.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(series), fontsize=8)
    for y, row in enumerate(rows):
        ratio = row.flops_ratio.get("exact", math.nan)
        if math.isfinite(ratio):
            cost.barh(y, ratio, color="0.75" if row.method == VANILLA else "#7fb3d5", height=0.5)
            cost.text(ratio, y, f" {ratio:.2f}", va="center", fontsize=8)
    cost.set_xlim(0, 1.2)
    cost.set_xlabel("prefill FLOPs / vanilla\n(exact, keyframes included)")
    figure.suptitle(
        f"Success in the twin, rho = {table.rho:g}, {table.split} seeds\n"
        + fill(table.notes[0], NOTE_COLUMNS),
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _label(row: Row) -> str:
    test = row.against.get(VANILLA)
    lines = [title(row.method), f"n = {row.pooled.episodes}"]
    if test is not None:
        lines[1] += f", p = {test.p:.2g} vs vanilla"
    if math.isfinite(row.keyframes):
        lines[1] += f", {100 * row.keyframes:.0f} % keyframes"
    return "\n".join(lines)
