"""A run survives what goes wrong in it, and says so."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench_gpu_side import CPU, SMALL, die_in_the_middle, make_bench, write_peer
from rich.console import Console

from safe_pruner_node.engine.graphs import GraphRunner
from safe_pruner_node.engine.runner import EagerRunner
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.bench_gpu import tasks
from safe_pruner_node.evaluation.bench_gpu.__main__ import BenchGpuOptions, main
from safe_pruner_node.evaluation.bench_gpu.bars import all_bars, is_right
from safe_pruner_node.evaluation.bench_gpu.figures import stops_paying
from safe_pruner_node.evaluation.bench_gpu.findings import Findings
from safe_pruner_node.evaluation.bench_gpu.latency import latency
from safe_pruner_node.evaluation.bench_gpu.report import markdown
from safe_pruner_node.evaluation.bench_gpu.section import (
    CUT,
    DONE,
    FAILED,
    SKIPPED,
    Result,
    read_results,
    run_section,
)
from safe_pruner_node.evaluation.bench_gpu.tasks import (
    ALL_SECTIONS,
    COLD_START_S,
    Run,
    Task,
    best_path,
    first_tasks,
    last_tasks,
)

REPOSITORY = Path(__file__).parents[2]


def test_what_a_section_had_before_it_broke_is_kept(tmp_path):
    def breaks(bench):
        yield {"rows": [1]}
        (before,) = read_results(bench.out)
        assert (before.status, before.data) == ("running", {"rows": [1]})
        raise ZeroDivisionError("by\nnought")

    run_section("latency", breaks, make_bench(tmp_path, EagerRunner()))
    (result,) = read_results(tmp_path)
    assert result == Result(
        "latency", "eager", FAILED, "ZeroDivisionError: by nought", {"rows": [1]}
    )


def test_a_section_without_time_is_cut_and_not_failed(tmp_path):
    bench = make_bench(tmp_path, EagerRunner(), deadline_s=time.time() - 1)
    assert run_section("latency", latency, bench).status == CUT


def test_latency_rows_are_of_the_steps_they_say(tmp_path):
    (*_, data) = latency(make_bench(tmp_path, GraphRunner(CPU)))
    kept = {row["mode"]: row["kept_tokens"] for row in data["rows"]}
    assert kept == {
        "full": None,
        "pruned 0.75": 12,
        "keyframe": None,
        "pruned 0.5": 24,
        "pruned 0.9": 5,
    }
    for row in data["rows"]:
        groups = {name: times["p50"] for name, times in row["group_ms"].items()}
        assert (groups["pruner"] == 0) == (row["mode"] == "full")
        assert groups["vision"] + groups["prefill"] + groups["denoise"] <= row["wall_ms"]["p99"]


def test_of_the_compiled_path_only_what_the_bars_compare_with_is_timed(tmp_path):
    runner = GraphRunner(CPU)
    runner.path = "compiled"  # compiling for a CPU would say nothing more about the rows
    (*_, data) = latency(make_bench(tmp_path, runner))
    assert [row["mode"] for row in data["rows"]] == ["full", "pruned 0.75"]


def run_of(out, minutes=5.0, size="small", sections=ALL_SECTIONS):
    end_s = time.time() + 60 * minutes
    return Run(("eager", "graphs"), size, "cpu", out, end_s, True, sections, ())


def test_a_process_that_dies_is_told_of_and_the_next_one_runs(tmp_path, monkeypatch):
    console = Console(file=io.StringIO(), width=200)
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "run_task", die_in_the_middle)
        tasks._run_in_process(Task("eager", ("latency", "shapes")), run_of(tmp_path), console)
    tasks._run_in_process(Task("eager", ("ceilings",)), run_of(tmp_path), console)
    results = {result.section: result for result in read_results(tmp_path)}
    for section, data in (("latency", {"rows": [1]}), ("shapes", {})):
        result = results[section]
        assert (result.status, result.note, result.data) == (FAILED, "process ended with -6", data)
    assert results["ceilings"].status == DONE
    assert "eager, latency: failed: process ended with -6" in console.file.getvalue()


def test_a_policy_that_cannot_be_built_is_told_of(tmp_path):
    tasks.run_task(Task("eager", ("latency", "curves")), run_of(tmp_path, size="huge"), 0.0)
    results = read_results(tmp_path)
    assert [(r.section, r.status, r.note) for r in results] == [
        ("curves", FAILED, "KeyError: 'huge'"),
        ("latency", FAILED, "KeyError: 'huge'"),
    ]


def test_a_process_that_overruns_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "GRACE_S", 0.0)
    console = Console(quiet=True)
    tasks._run_in_process(Task("eager", ("latency",)), run_of(tmp_path, minutes=1e-3), console)
    tasks._run_in_process(Task("eager", ("curves",)), run_of(tmp_path, minutes=-1.0), console)
    results = {result.section: result for result in read_results(tmp_path)}
    assert (results["latency"].status, results["latency"].note) == (CUT, "out of time")
    assert (results["curves"].status, results["curves"].note) == (SKIPPED, "no time left")


def timed(path, p50, memory=None):
    row = {
        "mode": "full",
        "wall_ms": {"p50": p50, "p99": 1.5 * p50},
        "shape": {"cameras": 3, "prompt": 120, "horizon": 50},
    }
    return Result("latency", path, DONE, "", {"rows": [row], "memory": memory or {}})


def checked(path, *complaints, status=DONE):
    case = {"error": 0.02, "bf16_error": 0.01, "chooses": False, "complaints": list(complaints)}
    return Result("correctness", path, status, "", {"cases": [case]})


def test_the_table_end_to_end_says_what_decoded_and_how_far_that_is_from_the_cpu():
    data = {
        "start": {"ready_s": 1.0, "parts": [], "engine": "fused", "image_decoder": "nvjpeg"},
        "frame_bytes": {"head": 1000},
        "decoder_difference": {
            "whole": {"mean": 1.06, "max": 11.0},
            "fitted": {"mean": 0.31, "max": 4.2},
        },
        "rows": [],
    }
    text = markdown(Findings({}, SMALL, [Result("end_to_end", "fused", DONE, "", data)]))
    assert "1.06 in the mean and 11 at most; in what the model sees: 0.31" in text
    assert "nvJPEG" in text
    data["start"]["image_decoder"] = "cpu"
    text = markdown(Findings({}, SMALL, [Result("end_to_end", "fused", DONE, "", data)]))
    assert "on the CPU, side by side" in text
    assert "nvJPEG" not in text


def test_the_best_path_is_the_fastest_that_is_right():
    results = [timed("eager", 40.0), timed("graphs", 20.0), timed("fused", 10.0)]
    right = [checked("graphs"), checked("fused")]
    assert best_path([*results, *right]) == "fused"
    assert best_path([*results, checked("graphs"), checked("fused", "not finite")]) == "graphs"
    assert best_path([*results, checked("graphs", status=CUT)]) == "graphs"
    assert best_path([*results, checked("fused", status=FAILED)]) == "eager"
    assert best_path([]) is None


def test_correctness_comes_first_and_compilation_last(monkeypatch):
    monkeypatch.setattr(tasks, "PATHS", ("auto", "eager", "graphs", "compiled", "fused"))
    paths = ("eager", "graphs", "compiled", "fused")
    first = first_tasks(paths)
    assert [(task.path, task.sections[-1]) for task in first] == [
        ("eager", "reference"),
        ("fused", "correctness"),
        ("graphs", "correctness"),
        ("fused", "latency"),
        ("graphs", "latency"),
        ("eager", "latency"),
        ("compiled", "latency"),
    ]
    last = last_tasks(paths, "graphs")
    assert [(task.path, task.sections[0]) for task in last] == [
        ("graphs", "end_to_end"),
        ("graphs", "cold_start"),
        ("graphs", "shapes"),
        ("compiled", "correctness"),
    ]
    assert [task.path for task in last_tasks(paths, None)] == ["compiled"]


def test_only_sections_that_are_asked_for_are_run(tmp_path):
    first = first_tasks(("eager", "graphs"))
    run = run_of(tmp_path, sections=("ceilings", "latency"))
    assert [(task.path, task.sections) for task in tasks._asked_for(first, run)] == [
        ("eager", ("ceilings",)),
        ("graphs", ("latency",)),
        ("eager", ("latency",)),
    ]


def test_what_comes_last_is_of_the_best_path_where_that_is_known(tmp_path):
    for result in (timed("eager", 40.0), timed("graphs", 20.0), checked("graphs", "not finite")):
        result.write(tmp_path)
    assert tasks._path_that_matters(run_of(tmp_path)) == "eager"
    assert tasks._path_that_matters(run_of(tmp_path, sections=("end_to_end",))) == "graphs"


def test_a_task_that_needs_more_time_than_is_left_is_skipped(tmp_path):
    task = Task("eager", ("cold_start",), least_s=COLD_START_S)
    tasks._run_in_process(task, run_of(tmp_path, minutes=1.0), Console(quiet=True))
    (result,) = read_results(tmp_path)
    assert (result.status, result.note) == (SKIPPED, "60 s left of 90")


def test_bars_are_judged_by_the_best_path_and_by_nothing_that_was_not_measured():
    results = [timed("graphs", 12.5, {"reserved_bytes": 9e9}), checked("graphs")]
    bars = {bar.name: bar for bar in all_bars(Findings({}, SMALL, results))}
    assert (bars["full step, p50"].found, bars["full step, p50"].verdict) == (12.5, "NOT met")
    assert bars["full, p99 / p50"].verdict == "NOT met"
    assert bars["pruned step, rho 0.75, p50"].verdict == "not measured"
    assert bars["device memory: weights, buffers, graphs"].verdict == "met"
    (error,) = (bar for name, bar in bars.items() if "against fp32" in name)
    assert (error.found, error.verdict) == (2.0, "NOT met")


@pytest.mark.parametrize(
    ("results", "right"),
    [
        ([checked("graphs"), Result("curves", "graphs", CUT, "out of time", {})], True),
        ([checked("graphs", "not finite")], False),
        ([checked("graphs"), Result("curves", "graphs", FAILED, "broke", {})], False),
    ],
)
def test_exit_status_follows_what_is_wrong_and_not_what_is_slow(results, right):
    assert is_right(Findings({}, SMALL, results)) == right


def test_pruning_stops_paying_where_the_curve_is_flat():
    ms = {0.0: 12.0, 0.5: 9.0, 0.75: 8.1, 0.9: 8.0, 0.95: 8.05}
    rows = [{"rho": rho, "wall_ms": {"p50": value}} for rho, value in ms.items()]
    assert stops_paying(rows) == 0.75


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"minutes": 0.0}, "parameter: minutes: found 0.0, expected above 0"),
        ({"paths": ("auto",)}, "parameter: paths: found auto, expected one of eager"),
        ({"sections": ("all",)}, "parameter: sections: found all, expected one of ceilings"),
        ({"sections": ("correctness",)}, "parameter: sections: found correctness, expected refer"),
    ],
)
def test_wrong_options_are_one_line(change, complaint):
    with pytest.raises(ConfigError, match=complaint):
        BenchGpuOptions(**change)


def test_two_peers_of_one_name_are_refused(tmp_path, capfd):
    peer = f"--peer theirs={write_peer(tmp_path)}"
    options = f"--out {tmp_path / 'out'} --device cpu --size small {peer} {peer}"
    assert main(options.split()) == 1
    expected = "parameter: peer: found theirs, theirs, expected each name once"
    assert expected in capfd.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_full_size_policy_on_a_cpu_is_one_line_and_loses_no_results(tmp_path, capfd):
    (tmp_path / "about.json").write_text("{}")  # of a run on a GPU
    assert main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "bench-gpu failed: parameter: device: found a CPU" in capfd.readouterr().out
    assert (tmp_path / "about.json").exists()


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ImportError("not on a GPU machine: " + name)

sys.meta_path.insert(0, Blocker())
import safe_pruner_node.evaluation.bench_gpu.{module}
"""
ROBOT_ONLY = {"mujoco", "mink", "daqp", "ruckig", "av", "pyarrow", "rclpy"}


@pytest.mark.parametrize(
    ("module", "names"),
    [("__main__", {*ROBOT_ONLY, "pydantic"}), ("cold_start", ROBOT_ONLY)],
)
def test_needs_nothing_that_only_a_robot_or_a_simulator_needs(module, names):
    code = BLOCKED.format(names=sorted(names), module=module)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


@pytest.mark.timeout(400)
def test_the_whole_run_on_a_cpu(tmp_path, capfd):
    (tmp_path / "latency-fused.json").write_text("{}")  # of another run
    arguments = f"--out {tmp_path} --device cpu --size small --quick --minutes 6"
    peer = f"theirs={write_peer(tmp_path)}"
    paths = ("--paths", "eager", "graphs")
    sections = ("--sections", *(name for name in ALL_SECTIONS if name != "cold_start"))
    assert main([*arguments.split(), *paths, *sections, "--peer", peer]) == 0
    results = {(r.section, r.path): r for r in read_results(tmp_path)}
    done = {key for key, result in results.items() if result.status == DONE}
    assert {section for section, _ in done} == {
        "ceilings",
        "reference",
        "latency",
        "end_to_end",
        "shapes",
        "curves",
        "peer",
    }
    assert {key for key in results if key not in done} == {
        ("correctness", "graphs"),
        ("latency", "graphs"),
    }
    worker = results["end_to_end", "eager"].data
    assert [row["keyframes"] for row in worker["rows"]] == [0, 0, 10]
    assert (worker["start"]["image_decoder"], worker["decoder_difference"]) == ("cpu", None)
    assert worker["frame_bytes"]["head"] > worker["frame_bytes"]["left_wrist"] > 10_000
    for row in worker["rows"]:
        assert 120 <= row["text_tokens"] < 125
        assert {"decode", "resize", "vision", "to_robot"} <= row["stage_ms"].keys()
        assert row["step_ms"]["p50"] < row["worker_ms"]["p50"] < row["round_trip_ms"]["p50"]
        assert row["beside_step_ms"]["p50"] > row["stage_ms"]["decode"]["p50"]
    text = (tmp_path / "report.md").read_text()
    printed = capfd.readouterr().out
    for title in ("Bars", "Correctness", "Latency:", "Against the roofline", "End to end"):
        assert f"## {title}" in text
        assert title in printed
    assert "| theirs (peer), full |" in text
    assert "theirs (peer), tiny 1.0: a product of 3 x 120 by 50, 2 times on cpu" in text
    assert "latency on graphs: skipped, parameter: path: found graphs" in text
    assert json.loads((tmp_path / "about.json").read_text())["model"] == "small"
    for name in ("waterfall.png", "rho.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial"))
