"""The run as tables: on the terminal, and as the Markdown page beside the JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console

from safe_pruner_node.engine.fp8_calibration import LEAST_COSINE
from safe_pruner_node.evaluation.bench_gpu.bars import all_bars, incomplete
from safe_pruner_node.evaluation.bench_gpu.findings import Findings, Row
from safe_pruner_node.evaluation.bench_gpu.fp8 import FP8
from safe_pruner_node.evaluation.bench_gpu.gpu_timing import DENOISE, PREFILL, PRUNER, VISION
from safe_pruner_node.evaluation.bench_gpu.grid import Grid
from safe_pruner_node.evaluation.bench_gpu.methods import FULL, pruned_name
from safe_pruner_node.evaluation.bench_gpu.queries import BASE, Shape
from safe_pruner_node.evaluation.bench_gpu.section import Result

COVERS = (
    "A step runs from tensors on the device to normalised actions on the device, batch 1, random "
    "weights in openpi's mixed bf16, images and prompts that change from step to step. Wall: from "
    "the call until the actions are there, on the host's clock; device: by events on the stream. "
    "Prefill is everything between the projector and the complete key/value cache, the pruner's "
    "matching, saliency and selection included; these alone are the column `pruner`. A keyframe's "
    "deep saliency is taken while it denoises and counted there. Milliseconds, p50 / p99. / best: "
    "wall over that of the same step of the fastest right path."
)


def tables(run: Findings) -> list[Grid]:
    """Every table that the results are enough for."""
    grids = [_bars(run), *_correctness(run), *_fp8(run), *_latency(run), *_achieved(run)]
    return [*grids, *_shapes(run), *_curves(run), *_end_to_end(run), *_cold_start(run)]


def print_report(run: Findings, console: Console) -> None:
    """All of it on a terminal, where the end is what one sees: the bars come last."""
    bars, *others = tables(run)
    for grid in (*others, bars):
        grid.print(console)
    for line in (*_about(run), *incomplete(run)):
        console.print(line, highlight=False)


def markdown(run: Findings) -> str:
    """All of it as a page."""
    head = ["# GPU benchmark", "", *(f"- {line}" for line in _about(run)), ""]
    head += [f"- {line}" for line in incomplete(run)]
    return "\n".join(head) + "\n\n" + "\n".join(grid.markdown() for grid in tables(run))


def _about(run: Findings) -> Iterator[str]:
    yield ", ".join(f"{key} {value}" for key, value in run.about.items())
    ceilings = run.ceilings
    if ceilings is not None:
        yield (
            f"measured ceilings: copy {ceilings.bytes_per_s / 1e12:.2f} TB/s, "
            f"bf16 matrix product {ceilings.flop_per_s / 1e12:.0f} TFLOP/s"
        )


def _bars(run: Findings) -> Grid:
    rows = [
        (
            bar.name,
            "–" if bar.found is None else f"{bar.found:.3g} {bar.unit}".strip(),
            f"{bar.at_most:g} {bar.unit}".strip(),
            bar.verdict,
        )
        for bar in all_bars(run)
    ]
    note = f"Fastest right path of this run: {run.best}." if run.best else ""
    return Grid("Bars", ("what", "found", "at most", "verdict"), rows, note)


def _correctness(run: Findings) -> Iterator[Grid]:
    rows = [
        _correctness_row("plain bf16" if result.section == "reference" else result.path, case)
        for result in (*run.of("reference"), *run.of("correctness"))
        for case in result.data["cases"]
    ]
    header = ("path, method, shape", "error", "/ bf16's", "cosine", "worst", "arm, mrad")
    note = (
        "Against fp32 eager with the same weights. Error: |a - ref| / |ref| of the final "
        "normalised actions over all seeds; / bf16's: in units of plain "
        "bf16 eager's error on the same queries; worst: one normalised action; arm: the same where "
        "the normalised range is ± 0.15 rad; other tokens: share of fp32's that was not kept. "
        "Where SAFE chooses, the tokens are judged and not the errors that come of others."
    )
    if rows:
        full_header = (*header, "other tokens", "verdict")
        yield Grid("Correctness", full_header, rows, note)


def _correctness_row(path: str, case: Row) -> tuple[str, ...]:
    return (
        f"{path}, {case['mode']}, {Shape(**case['shape'])}",
        f"{case['error']:.2e}",
        f"{case['error'] / case['bf16_error']:.2f}",
        f"{case['cosine']:.6f}",
        f"{case['worst']:.3f}",
        f"{case['worst_arm_mrad']:.1f}",
        f"{100 * case['lost_tokens']:.1f} %",
        "; ".join(case["complaints"]) or "right",
    )


def _fp8(run: Findings) -> Iterator[Grid]:
    for result in run.of(FP8):
        rows = [
            (
                f"{row['mode']}, {BASE}",
                str(row["inputs"]),
                f"{row['cosine']:.6f}",
                f"{row['error']:.2e}",
                f"{row['worst']:.3f}",
                f"{row['worst_arm_mrad']:.1f}",
            )
            for row in result.data["rows"]
        ]
        note = (
            "The fused path with the language model's MLPs in FP8 (E4M3, one fixed scale per "
            "matrix and per input, from other random inputs), against fp32 eager. Cosine: the "
            f"least of an input. FP8 is experimental while one is below {LEAST_COSINE}."
        )
        header = ("step", "inputs", "cosine", "error", "worst", "arm, mrad")
        yield Grid("FP8", header, rows, note)


def _latency(run: Findings) -> Iterator[Grid]:
    rows = [
        (f"{path}, {row['mode']}", *_time_cells(row), _of_best(run, row["mode"], row["wall_ms"]))
        for path, of_path in run.latency.items()
        for row in of_path
    ]
    rows += [_peer_row(run, peer) for peer in run.peers]
    if rows:
        header = ("path, step", *_TIME_HEADER, "/ best")
        peers = "".join(f" {_peer_note(peer)}" for peer in run.peers)
        yield Grid(f"Latency: {BASE}", header, rows, COVERS + peers)


def _of_best(run: Findings, mode: str, wall_ms: Mapping[str, float]) -> str:
    """Times the same step of the best path."""
    best = run.row(run.best, mode)
    return "" if best is None else f"{wall_ms['p50'] / best['wall_ms']['p50']:.2f}"


def _peer_row(run: Findings, peer: Result) -> tuple[str, ...]:
    name, stages = f"{peer.path} (peer), {FULL}", ("",) * 5
    if not peer.data:
        return (name, *stages, peer.status, "", "", "")
    wall_ms = peer.data["wall_ms"]
    ratio = _of_best(run, FULL, wall_ms)
    return (name, *stages, _pair(wall_ms), str(peer.data["steps"]), "", ratio)


def _peer_note(peer: Result) -> str:
    if not peer.data:
        return f"{peer.path} (peer): {peer.note}."
    return f"{peer.path} (peer), {peer.data['version']}: {peer.data['covers'].rstrip('.')}."


_TIME_HEADER = ("vision", "prefill", "pruner", "denoise", "device", "wall", "steps", "first, s")


def _time_cells(row: Row) -> tuple[str, ...]:
    groups = [_pair(row["group_ms"][name]) for name in (VISION, PREFILL, PRUNER, DENOISE)]
    times = (_pair(row["device_ms"]), _pair(row["wall_ms"]))
    return (*groups, *times, str(row["steps"]), f"{row['first_steps_s']:.1f}")


def _stage_cell(row: Row, name: str) -> str:
    return _pair(row["stage_ms"][name]) if name in row["stage_ms"] else ""


def _pair(percentiles: Mapping[str, float]) -> str:
    return f"{percentiles['p50']:.2f} / {percentiles['p99']:.2f}"


def _achieved(run: Findings) -> Iterator[Grid]:
    ceilings, rows = run.ceilings, []
    if ceilings is None:
        return
    for mode in (FULL, pruned_name(0.75)):
        row = run.row(run.best, mode)
        if row is None:
            continue
        for stage, cost in run.costs(row).items():
            ms = row["group_ms"][stage]["p50"]
            floor_ms = cost.floor_ms(ceilings)
            flop_per_s, bytes_per_s = cost.flops / ms * 1e3, cost.bytes / ms * 1e3
            rows.append(
                (
                    f"{mode}, {stage}",
                    f"{ms:.2f}",
                    f"{floor_ms:.2f}",
                    f"{ms / floor_ms:.1f}",
                    f"{flop_per_s / 1e12:.1f} ({100 * flop_per_s / ceilings.flop_per_s:.0f} %)",
                    f"{bytes_per_s / 1e12:.2f} ({100 * bytes_per_s / ceilings.bytes_per_s:.0f} %)",
                )
            )
    header = ("step, stage", "p50, ms", "floor, ms", "p50 / floor", "TFLOP/s", "TB/s")
    note = (
        "Operations and bytes that the stage cannot do without, counted from the model's sizes, "
        "over the measured time; in brackets the share of the ceilings measured in this run. "
        "Floor: the greater of the two at these ceilings."
    )
    if rows:
        yield Grid(f"Against the roofline: {run.best}", header, rows, note)


def _shapes(run: Findings) -> Iterator[Grid]:
    for result in run.of("shapes"):
        rows = [
            (f"{Shape(**row['shape'])}, {row['mode']}", *_time_cells(row))
            for row in result.data["rows"]
        ]
        yield Grid(f"Other shapes: {result.path}", ("shape, step", *_TIME_HEADER), rows)


def _curves(run: Findings) -> Iterator[Grid]:
    full = run.row(run.best, FULL)
    if full is None:
        return
    for result in run.of("curves"):
        rows = []
        for row in result.data["rows"]:
            shares = [
                f"{row['prefill_flops'][kind] / full['prefill_flops'][kind]:.3f}"
                for kind in ("paper_padded", "paper_trimmed", "exact")
            ]
            kept = f"{row['kept_tokens']} of {row['visual_tokens']}"
            cells = (_pair(row["group_ms"][PREFILL]), _pair(row["wall_ms"]))
            rows.append((f"ρ {row['rho']:g}, ls {row['layer']}", kept, *shares, *cells))
        note = (
            "FLOPs of the prefill against the full step's: the paper's formula with openpi's "
            "padding and trimmed, and as executed."
        )
        header = ("ρ, ls", "kept", "padded", "trimmed", "exact", "prefill, ms", "wall, ms")
        yield Grid(f"Latency over ρ and ls: {result.path}", header, rows, note)


def _decoding(data: Row) -> str:
    """What the stage ``decode`` is, with that decoder."""
    if data["start"]["image_decoder"] == "cpu":
        return (
            "on the CPU, side by side (at half size where that is enough), undistortion, the copy "
            "to the device begun"
        )
    text = "nvJPEG, one batch, into the GPU's memory"
    if (difference := data["decoder_difference"]) is None:
        return text
    whole, fitted = (
        f"{levels['mean']:.2f} in the mean and {levels['max']:.0f} at most"
        for levels in (difference["whole"], difference["fitted"])
    )
    return f"{text} (grey levels from the CPU's images: {whole}; in what the model sees: {fitted})"


def _end_to_end(run: Findings) -> Iterator[Grid]:
    for result in run.of("end_to_end"):
        rows = result.data["rows"]
        names = list(dict.fromkeys(name for row in rows for name in row["stage_ms"]))
        cells = [(name, *(_stage_cell(row, name) for row in rows)) for name in names]
        cells.append(("step: vision to denoise", *(_pair(row["step_ms"]) for row in rows)))
        cells.append(("in the worker", *(_pair(row["worker_ms"]) for row in rows)))
        cells.append(("camera bytes to chunk", *(_pair(row["round_trip_ms"]) for row in rows)))
        cells.append(("of it beside the step", *(_pair(row["beside_step_ms"]) for row in rows)))
        start = result.data["start"]
        parts = ", ".join(f"{part['after_s']:.1f} s {part['text']}" for part in start["parts"])
        frames = result.data["frame_bytes"]
        sizes = ", ".join(f"{camera} {n / 1e3:.0f} kB" for camera, n in frames.items())
        note = (
            f"The node's own worker process ({start['engine']}), ready {start['ready_s']:.1f} s "
            f"after its spawn ({parts}). JPEG of 1280x720 and twice 640x360 ({sizes} a frame) "
            f"through shared memory; decode: {_decoding(result.data)}; resize: what is left of the "
            "copy, and the resize; tokenize: what of it the vision tower does not hide; step, "
            "robot units, the chunk back. Milliseconds, p50 / p99."
        )
        header = ("stage", *(row["mode"] for row in rows))
        yield Grid(f"End to end: {result.path}", header, cells, note)


def _cold_start(run: Findings) -> Iterator[Grid]:
    for result in run.of("cold_start"):
        start = result.data["start"]
        rows = [(part["text"], f"{part['after_s']:.1f}") for part in start["parts"]]
        rows.append(("ready", f"{start['ready_s']:.1f}"))
        cached = result.data["checkpoint_in_page_cache"]
        note = (
            f"The node's own worker process ({start['engine']}), every compiler's cache an empty "
            f"folder. {100 * cached:.0f} % of the checkpoint was in the page cache."
        )
        yield Grid(f"Cold start: {result.path}", ("from here on", "s after the spawn"), rows, note)
