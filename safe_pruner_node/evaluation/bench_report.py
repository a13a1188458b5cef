"""Table, JSON and picture of `bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from safe_pruner_node.types import StepReport

VANILLA, KEYFRAME, PRUNED = "vanilla", "SAFE keyframe", "SAFE pruned"

STAGES = (
    "resize",
    "vision",
    "tokenize",
    "prefill",
    "match",
    "prefill_early",
    "select",
    "prefill_late",
    "denoise",
    "postprocess",
)
PREFILL = ("prefill", "match", "prefill_early", "select", "prefill_late")
"""From the projector's output to the complete key/value cache, the pruner's own work included."""
OVERHEAD = ("match", "select")
"""Matching, saliency, kappa, fusion and selection."""
PREFILL_TOTAL, OVERHEAD_TOTAL, STEP_TOTAL = "= prefill", "  of it pruner", "= step"

BAR = 0.60
"""Prefill of a pruned step against a full one, at rho 0.75 with three cameras on a CPU."""

COVERS = (
    "A step is one policy query inside the worker: decoded RGB images and joint state to "
    "unnormalised actions. Not in it: JPEG decoding, undistortion, the way between processes, ROS. "
    "Prefill is everything from the projector's output to the complete key/value cache: text "
    "embedding, all layers, and for SAFE also matching, saliency and selection. The deep saliency "
    "of a keyframe is measured during denoise and counted there; with query_rows action_probe the "
    "probe is too, as it is the first layers of denoise step 1. Modes take turns on the same "
    "frames with the same noise."
)


@dataclass(frozen=True)
class Sample:
    """One timed step: wall time around the engine's step, and its report."""

    step_ms: float
    report: StepReport


@dataclass(frozen=True)
class Bench:
    """All samples of one run, mode by mode, and what they were taken of."""

    samples: Mapping[str, Sequence[Sample]]
    about: Mapping[str, Any]

    def rows(self, mode: str) -> dict[str, NDArray[np.float64]]:
        """Row name to milliseconds per step; stages that a mode does not have are absent."""
        reports = [sample.report for sample in self.samples[mode]]
        known = {s for report in reports for s in report.stage_ms}
        rows = {s: _milliseconds(reports, (s,)) for s in STAGES if s in known}
        rows[PREFILL_TOTAL] = _milliseconds(reports, PREFILL)
        if known.intersection(OVERHEAD):
            rows[OVERHEAD_TOTAL] = _milliseconds(reports, OVERHEAD)
        rows[STEP_TOTAL] = np.array([sample.step_ms for sample in self.samples[mode]])
        return rows

    def ratio(self, row: str) -> float:
        """p50 of a pruned step over p50 of a vanilla step."""
        return float(np.median(self.rows(PRUNED)[row]) / np.median(self.rows(VANILLA)[row]))

    @property
    def capture_ms(self) -> float:
        """What the deep saliency adds to a keyframe: paired median over the same frames."""
        extra = self.rows(KEYFRAME)["denoise"] - self.rows(VANILLA)["denoise"]
        return float(np.median(extra))


def _milliseconds(reports: Sequence[StepReport], stages: Sequence[str]) -> NDArray[np.float64]:
    return np.array([sum(r.stage_ms.get(s, 0.0) for s in stages) for r in reports])


def _percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    return {"p50": float(np.percentile(values, 50)), "p99": float(np.percentile(values, 99))}


def summarise(bench: Bench) -> dict[str, Any]:
    """What goes into bench.json."""
    modes = {}
    for mode, samples in bench.samples.items():
        report = samples[-1].report
        rows = bench.rows(mode)
        modes[mode] = {
            "stage_ms": {s: _percentiles(v) for s, v in rows.items() if s in STAGES},
            "prefill_ms": _percentiles(rows[PREFILL_TOTAL]),
            "step_ms": _percentiles(rows[STEP_TOTAL]),
            "visual_tokens": sum(report.visual_tokens.values()),
            "kept_tokens": sum(report.kept_tokens.values()),
            "text_tokens": report.text_tokens,
            "flops": vars(report.flops),
        }
        if OVERHEAD_TOTAL in rows:
            modes[mode]["pruner_ms"] = _percentiles(rows[OVERHEAD_TOTAL])
    return {
        "about": dict(bench.about),
        "covers": COVERS,
        "modes": modes,
        "prefill_ratio": bench.ratio(PREFILL_TOTAL),
        "prefill_ratio_bar": BAR,
        "step_ratio": bench.ratio(STEP_TOTAL),
        "keyframe_capture_ms": bench.capture_ms,
    }


def print_report(bench: Bench, console: Console) -> None:
    """The table, the ratios and what they cover."""
    about = bench.about
    title = f"One policy step, milliseconds · {about['model']} · {about['engine']}"
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("stage", no_wrap=True)
    for mode in bench.samples:
        for percentile in ("p50", "p99"):
            table.add_column(f"{mode.replace(' ', chr(10))}\n{percentile}", justify="right")
    rows = {mode: bench.rows(mode) for mode in bench.samples}
    for name in (*STAGES, PREFILL_TOTAL, OVERHEAD_TOTAL, STEP_TOTAL):
        if not any(name in of_mode for of_mode in rows.values()):
            continue
        cells = []
        for of_mode in rows.values():
            values = of_mode.get(name)
            cells += (
                ["", ""] if values is None else [f"{v:.2f}" for v in _percentiles(values).values()]
            )
        table.add_row(name, *cells, end_section=name == STAGES[-1])
    console.print(table)
    summary = summarise(bench)
    pruned, full = summary["modes"][PRUNED], summary["modes"][VANILLA]
    verdict = "met" if summary["prefill_ratio"] <= BAR else "NOT met"
    share = pruned["pruner_ms"]["p50"] / pruned["prefill_ms"]["p50"]
    flops = pruned["flops"]["exact"] / full["flops"]["exact"]
    console.print(
        f"prefill, pruned / vanilla: [bold]{summary['prefill_ratio']:.3f}[/bold] "
        f"(bar {BAR:.2f} at rho 0.75: {verdict}; exact FLOPs {flops:.3f}); "
        f"whole step: {summary['step_ratio']:.3f}"
    )
    console.print(
        f"saliency + matching + selection: {pruned['pruner_ms']['p50']:.2f} ms "
        f"({100 * share:.1f} % of the pruned prefill); "
        f"deep saliency of a keyframe: {summary['keyframe_capture_ms']:+.2f} ms"
    )
    console.print(
        f"tokens: {full['visual_tokens']} visual over {about['cameras']} cameras, "
        f"{pruned['kept_tokens']} kept, {full['text_tokens']} text · rho {about['rho']:g} · "
        f"preset {about['preset']} · query rows {about['query_rows']}"
    )
    console.print(
        f"{about['steps']} steps a mode after {about['warm_up']} · {about['processor']} · "
        f"torch {about['torch']} · python {about['python']} · "
        f"checkpoint {about['checkpoint']} ({about['checkpoint_id']}) · git {about['git']}"
    )
    console.print(COVERS, style="dim")


def draw(bench: Bench, path: Path) -> None:
    """Stages stacked for each mode (median), and the prefill of every step.

    Args:
        bench: The run.
        path: PNG to write.
    """
    figure, (bars, traces) = plt.subplots(
        2, 1, figsize=(10, 7.5), height_ratios=[1.3, 1.0], constrained_layout=True
    )
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    modes = list(bench.samples)
    left = np.zeros(len(modes))
    rows = [bench.rows(mode) for mode in modes]
    for index, stage in enumerate(STAGES):
        width = np.array([float(np.median(r[stage])) if stage in r else 0.0 for r in rows])
        bars.barh(modes, width, left=left, color=colours[index], label=stage)
        for i in range(len(modes)):
            if width[i] > 0.06 * max(float(np.median(r[STEP_TOTAL])) for r in rows):
                bars.text(left[i] + width[i] / 2, i, f"{width[i]:.0f}", ha="center", va="center")
        left += width
    bars.invert_yaxis()
    bars.set_xlabel("median milliseconds of each stage")
    bars.legend(ncols=5, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    bars.set_title(
        f"One policy step · {bench.about['model']} · {bench.about['engine']} · "
        f"{bench.about['cameras']} cameras · rho {bench.about['rho']:g}"
    )
    for mode, of_mode in zip(modes, rows, strict=True):
        traces.plot(of_mode[PREFILL_TOTAL], ".-", label=mode)
    traces.set_xlabel("step")
    traces.set_ylabel("prefill, milliseconds")
    traces.set_ylim(bottom=0)
    traces.set_title(f"prefill, pruned / vanilla: {bench.ratio(PREFILL_TOTAL):.3f} (medians)")
    traces.legend(frameon=False)
    for axes in (bars, traces):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
