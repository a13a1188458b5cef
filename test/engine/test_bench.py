"""The benchmark's bookkeeping on a tiny policy; its milliseconds are nobody's to assert."""

import io
import json

import pytest
from rich.console import Console

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.bench import BenchOptions, MovingScene, run
from safe_pruner_node.evaluation.bench_report import print_report


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=80)


@pytest.mark.parametrize("rows", ["text", "action_probe"])
def test_table_json_and_picture_of_one_run(small_checkpoint, tmp_path, console, rows):
    options = BenchOptions(
        checkpoint=small_checkpoint,
        out=tmp_path,
        steps=3,
        warm_up=1,
        device="cpu",
        query_rows=rows,
    )
    bench = run(options)
    print_report(bench, console)
    table = console.file.getvalue()
    result = json.loads((tmp_path / "bench.json").read_text())
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    assert result["about"]["query_rows"] == rows
    assert result["about"]["engine"] == "eager cpu fp32, 1 thread"
    modes = result["modes"]
    kept = {mode: modes[mode]["kept_tokens"] for mode in modes}
    assert kept == {"vanilla": 192, "SAFE keyframe": 192, "SAFE pruned": 48}
    for mode, samples in bench.samples.items():
        keyframes = [sample.report.keyframe for sample in samples]
        assert keyframes == [mode == "SAFE keyframe"] * 3
        for sample in samples:
            assert sum(sample.report.stage_ms.values()) <= sample.step_ms
    for mode in ("SAFE keyframe", "SAFE pruned"):
        parts = [bench.rows(mode)[s] for s in ("match", "prefill_early", "select", "prefill_late")]
        assert bench.rows(mode)["= prefill"] == pytest.approx(sum(parts))
    ratio = modes["SAFE pruned"]["prefill_ms"]["p50"] / modes["vanilla"]["prefill_ms"]["p50"]
    assert result["prefill_ratio"] == pytest.approx(ratio)
    assert f"prefill, pruned / vanilla: {ratio:.3f}" in table
    for word in ("vision", "prefill_late", "= step", "p99", "192 visual", "torch", "Not in it"):
        assert word in table


def test_frames_change_a_little_from_one_to_the_next():
    scene = MovingScene(2, seed=0)
    first, second, later = (scene.frames(t)["head"].astype(float) for t in (0, 1, 40))
    assert first.shape == (360, 640, 3)
    assert 0 < abs(first - second).mean() < 15 < abs(first - later).mean()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"steps": 0}, r"parameter: steps: found 0"),
        ({"cameras": 4}, r"parameter: cameras: found 4, expected 1\.\.3"),
        ({"rho": 1.0}, r"parameter: rho: found 1\.0"),
        ({"preset": "vanilla"}, r"parameter: preset: found vanilla, expected .* method safe"),
        ({"preset": "fast"}, r"pruner: found fast, expected one of"),
        ({"query_rows": "image"}, r"robot\.query_rows: found image"),
        ({"device": "tpu"}, r"parameter: device: found tpu"),
    ],
)
def test_wrong_options_are_one_line(small_checkpoint, tmp_path, change, complaint):
    with pytest.raises(ConfigError, match=complaint):
        run(BenchOptions(**{"checkpoint": small_checkpoint, "out": tmp_path, **change}))
