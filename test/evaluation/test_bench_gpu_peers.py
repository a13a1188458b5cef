"""Another implementation's program is timed beside ours, and cannot spoil the run."""

import json
import time

import pytest
from bench_gpu_side import SMALL, write_peer
from rich.console import Console

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.bench_gpu import peers, tasks
from safe_pruner_node.evaluation.bench_gpu.bars import is_right
from safe_pruner_node.evaluation.bench_gpu.findings import Findings
from safe_pruner_node.evaluation.bench_gpu.peers import Answer, Peer, parse_peer, read_answer
from safe_pruner_node.evaluation.bench_gpu.queries import Shape
from safe_pruner_node.evaluation.bench_gpu.report import markdown
from safe_pruner_node.evaluation.bench_gpu.section import CUT, DONE, SKIPPED, Result
from safe_pruner_node.evaluation.bench_gpu.tasks import Run


def run(program, out, limit_s=60.0):
    peer, shape = Peer("theirs", program), Shape(2, 80, 10)
    return peers.run_peer(peer, shape, 4, "cpu", out, limit_s, quick=True)


def test_a_peer_is_told_the_shape_and_its_times_come_back(tmp_path):
    result = run(write_peer(tmp_path), tmp_path)
    assert (result.section, result.path, result.status) == ("peer", "theirs", DONE)
    data = result.data
    assert (data["version"], data["steps"]) == ("tiny 1.0", 10)
    assert data["covers"] == "a product of 2 x 80 by 10, 4 times on cpu, 5 s at most"
    assert 0 < data["wall_ms"]["p50"] <= data["wall_ms"]["p99"] < 1e4


def test_what_breaks_a_peer_is_its_row(tmp_path):
    program = tmp_path / "broken.py"
    program.write_text("print('loading')\nraise RuntimeError('no such kernel')\n")
    result = run(program, tmp_path)
    assert (result.status, result.note) == (SKIPPED, "ended with 1: RuntimeError: no such kernel")
    program.write_text("print('nothing to say')\n")
    result = run(program, tmp_path)
    answer = tmp_path / "peer-theirs.answer"
    note = f"{answer}: found No such file or directory, expected the peer's answer"
    assert (result.status, result.note) == (SKIPPED, note)


def test_a_peer_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    program = tmp_path / "hangs.py"
    program.write_text(
        "import pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '1000'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "time.sleep(1000)\n"
    )
    result = run(program, tmp_path, limit_s=5.0)
    assert (result.status, result.note) == (CUT, "ended after 5 s")
    child = int((tmp_path / "child").read_text())
    for _ in range(100):  # its new parent may take a moment to bury it
        if not is_running(child):
            break
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def step(path, p50):
    shape = {"cameras": 3, "prompt": 120, "horizon": 50}
    times = {name: {"p50": 1.0, "p99": 1.0} for name in ("vision", "prefill", "pruner", "denoise")}
    wall = {"p50": p50, "p99": p50}
    row = {"mode": "full", "shape": shape, "wall_ms": wall, "device_ms": wall, "group_ms": times}
    row |= {"steps": 200, "first_steps_s": 1.0, "layer": None, "kept_tokens": None}
    return Result("latency", path, DONE, "", {"rows": [row], "memory": {}})


def test_the_report_has_a_peers_ratio_or_why_there_is_none(tmp_path):
    (tmp_path / "peer-fine.answer").write_text(json.dumps(ANSWER))
    figures = peers._figures(read_answer(tmp_path / "peer-fine.answer"))
    results = [
        step("eager", 8.0),
        Result("peer", "fine", DONE, "", figures),
        Result("peer", "late", CUT, "ended after 9 s", {}),
        Result("peer", "broken", SKIPPED, "ended with 1: KeyError: 'x'", {}),
    ]
    findings = Findings({"device": "one"}, SMALL, results)
    text = markdown(findings)
    assert "| fine (peer), full |  |  |  |  |  | 20.00 / 29.80 | 3 |  | 2.50 |" in text
    assert "fine (peer), release 2: images to actions." in text
    assert "| late (peer), full |  |  |  |  |  | cut |  |  |  |" in text
    assert "late (peer): ended after 9 s." in text
    assert "broken (peer): ended with 1: KeyError: 'x'." in text
    assert is_right(findings)


ANSWER = {"version": "release 2", "covers": "images to\nactions", "wall_ms": [10, 20.0, 30.0]}


def test_an_answer_is_read(tmp_path):
    file = tmp_path / "answer"
    file.write_text(json.dumps(ANSWER))
    assert read_answer(file) == Answer("release 2", "images to actions", (10.0, 20.0, 30.0))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": 2}, "answer: version: found 2, expected a text"),
        ({"covers": " "}, "answer: covers: found ' ', expected a text"),
        ({"wall_ms": []}, r"answer: wall_ms: found \[\], expected a list of milliseconds"),
        ({"wall_ms": 3.5}, "answer: wall_ms: found 3.5, expected a list of milliseconds"),
        ({"wall_ms": [1.0, "2"]}, r"answer: wall_ms\[1\]: found '2', expected milliseconds above"),
        ({"wall_ms": [True]}, r"answer: wall_ms\[0\]: found True, expected milliseconds above 0"),
        ({"wall_ms": [0]}, r"answer: wall_ms\[0\]: found 0, expected milliseconds above 0"),
        ({"wall_ms": [float("inf")]}, r"answer: wall_ms\[0\]: found inf, expected"),
        ({"wall_ms": [float("nan")]}, r"answer: wall_ms\[0\]: found nan, expected"),
    ],
)
def test_a_wrong_answer_is_one_line(tmp_path, change, complaint):
    file = tmp_path / "answer"
    file.write_text(json.dumps(ANSWER | change))
    with pytest.raises(ConfigError, match=complaint):
        read_answer(file)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{", "answer: found Expecting property name"), ("[]", "answer: found list, expected an obj")],
)
def test_an_answer_that_is_no_object_is_one_line(tmp_path, text, complaint):
    file = tmp_path / "answer"
    file.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_answer(file)


def test_a_peer_is_named_on_the_command_line(tmp_path, monkeypatch):
    program = write_peer(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert parse_peer(f"their-name={program.name}") == Peer("their-name", program)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("theirs", "parameter: peer: found 'theirs', expected NAME=FILE"),
        ("a b=x.py", "parameter: peer: found 'a b=x.py', expected NAME=FILE"),
        ("../x=x.py", "parameter: peer: found '../x=x.py', expected NAME=FILE"),
        ("theirs=", "parameter: peer: found 'theirs=', expected NAME=FILE"),
        ("theirs=no.py", "parameter: peer: found no.py, expected a Python file"),
    ],
)
def test_a_wrong_peer_is_one_line(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_peer(text)


def test_no_peer_is_begun_without_time(tmp_path):
    run = Run(("eager",), "small", "cpu", tmp_path, time.time() - 1, True, (), ())
    tasks._run_peer(Peer("theirs", tmp_path / "never-run.py"), run, Console(quiet=True))
    assert json.loads((tmp_path / "peer-theirs.json").read_text())["note"] == "no time left"
    assert [file.name for file in tmp_path.iterdir()] == ["peer-theirs.json"]
