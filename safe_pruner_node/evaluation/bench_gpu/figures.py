"""Two pictures: where the time of a step goes against the roofline, and latency over rho."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from safe_pruner_node.evaluation.bench_gpu.findings import Findings, Row
from safe_pruner_node.evaluation.bench_gpu.gpu_timing import DENOISE, PREFILL, PRUNER, VISION
from safe_pruner_node.evaluation.bench_gpu.methods import FULL, pruned_name
from safe_pruner_node.evaluation.figure_file import save_small

COLOURS = {
    VISION: "#2471a3",
    PREFILL: "#ca6f1e",
    PRUNER: "#b03a2e",
    DENOISE: "#1e8449",
    "between stages": "0.75",
}
PRUNED = pruned_name(0.75)
OFF_SCALE = 5.0
"""Times the best path's step beyond which a path is named and not drawn."""
NO_GAIN = 0.02
"""Where pruning further gains less than this share of the fastest, it stops paying."""


def draw(run: Findings, folder: Path) -> list[Path]:
    """Draw what the results are enough for.

    Returns:
        The files, ``waterfall.png`` and ``rho.png`` or fewer.
    """
    files = []
    if run.latency:
        files.append(folder / "waterfall.png")
        _waterfall(run, files[-1])
    for result in run.of("curves"):
        files.append(folder / "rho.png")
        _curves(run, result.data["rows"], files[-1])
    return files


def _waterfall(run: Findings, path: Path) -> None:
    """Stages one after the other for every path, full above pruned, and what is possible.

    A path that takes many times as long as the best would leave the others no room: it is named.
    """
    bars: list[tuple[str, Mapping[str, float]]] = []
    off_scale: list[str] = []
    for mode in (FULL, PRUNED):
        rows = {of_path: run.row(of_path, mode) for of_path in run.latency}
        measured = {of_path: row for of_path, row in rows.items() if row is not None}
        limit = OFF_SCALE * min((_device_ms(row) for row in measured.values()), default=0.0)
        off_scale += [
            f"{mode}, {of_path}: {_device_ms(row):.0f} ms"
            for of_path, row in measured.items()
            if _device_ms(row) > limit
        ]
        measured = {path: row for path, row in measured.items() if _device_ms(row) <= limit}
        slowest_first = sorted(measured.items(), key=lambda item: -_device_ms(item[1]))
        bars += [(f"{mode}\n{of_path}", _stages(row)) for of_path, row in slowest_first]
        ceilings = run.ceilings
        if ceilings is not None and measured:
            costs = run.costs(next(iter(measured.values())))
            floors = {stage: cost.floor_ms(ceilings) for stage, cost in costs.items()}
            bars.append((f"{mode}\nroofline", floors))
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.55 * len(bars)), layout="constrained")
    for y, (_, stages) in enumerate(bars):
        _stack(axes, y, stages)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("p50 of each stage, ms on the device")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    handles = [Patch(color=colour) for colour in COLOURS.values()]
    figure.legend(handles, list(COLOURS), ncols=5, fontsize=8, loc="outside lower center")
    title = f"One step, 3 cameras, horizon 50 · {run.about['device']}"
    if off_scale:
        title += "\nnot drawn: " + "; ".join(off_scale)
    axes.set_title(title, fontsize=10)
    save_small(figure, path)


def _device_ms(row: Row) -> float:
    return float(row["device_ms"]["p50"])


def _stages(row: Row) -> dict[str, float]:
    """Parts that add up to the step; the pruner's own beside the rest of the prefill."""
    p50 = {name: times["p50"] for name, times in row["group_ms"].items()}
    p50[PREFILL] -= p50[PRUNER]
    p50["between stages"] = max(0.0, row["device_ms"]["p50"] - sum(p50.values()))
    return p50


def _stack(axes: Axes, y: int, stages: Mapping[str, float]) -> None:
    left, total = 0.0, sum(stages.values())
    for name, colour in COLOURS.items():
        width = stages.get(name, 0.0)
        axes.barh(y, width, left=left, color=colour, height=0.7)
        left += width
    axes.text(total, y, f" {total:.2f}", va="center", fontsize=8)


def _curves(run: Findings, rows: Sequence[Row], path: Path) -> None:
    """Milliseconds over rho, one line per pruning layer, and over the prefill's operations."""
    figure, (over_rho, over_flops) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    full = run.row(run.best, FULL)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    for layer in layers:
        own = sorted((row for row in rows if row["layer"] == layer), key=lambda row: row["rho"])
        ms = [row["wall_ms"]["p50"] for row in own]
        style = "o-" if layer == layers[0] else "s--"
        over_rho.plot([row["rho"] for row in own], ms, style, ms=4, label=f"ls = {layer}")
        if full is not None:
            for kind, marker in (("paper_padded", "x"), ("paper_trimmed", "+"), ("exact", "o")):
                whole = full["prefill_flops"][kind]
                share = [row["prefill_flops"][kind] / whole for row in own]
                if layer == layers[0]:
                    over_flops.plot(share, ms, marker, label=kind.replace("_", ", "))
    main = [row for row in rows if row["layer"] == layers[0]]
    end = stops_paying(main)
    over_rho.axvline(end, color="0.5", lw=1, ls=":")
    label = f"from ρ = {end:g}: within {100 * NO_GAIN:g} % of the fastest "
    at = over_rho.get_xaxis_transform()
    over_rho.text(end, 0.3, label, fontsize=7, ha="right", transform=at)
    for axes in (over_rho, over_flops):
        if full is not None:
            axes.axhline(full["wall_ms"]["p50"], color="black", lw=1, label="full step")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("p50 of a step, ms")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8)
    over_rho.set_xlabel("ρ: share of the visual tokens that is dropped")
    over_flops.set_xlabel(f"prefill FLOPs / full step's, ls = {layers[0]}")
    figure.suptitle(f"A pruned step, 3 cameras · {run.best} · {run.about['device']}", fontsize=10)
    save_small(figure, path)


def stops_paying(rows: Sequence[Row]) -> float:
    """The least rho whose step is within `NO_GAIN` of the fastest of all."""
    ms = {float(row["rho"]): float(row["wall_ms"]["p50"]) for row in rows}
    return min(rho for rho in ms if ms[rho] <= (1 + NO_GAIN) * min(ms.values()))
