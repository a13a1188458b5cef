"""The command: resumes after a kill, refuses mistakes in one line, prints tables from a file."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import av
import pytest
from rich.console import Console

from safe_pruner_node.evaluation import evaluate as command
from safe_pruner_node.evaluation.results import EpisodeKey, read_lines
from safe_pruner_node.evaluation.worker import work

PATIENCE_S = 120.0


def options(checkpoint, out, *more):
    words = ["--checkpoint", checkpoint, "--out", out, "--device", "cpu", "--time-limit-s", "0.5"]
    return [str(word) for word in (*words, "--tasks", "throw_basketball", *more)]


def test_a_killed_run_goes_on_where_it_ended(small_checkpoint, tmp_path):
    words = options(small_checkpoint, tmp_path, "--episodes", "4", "--workers", "1")
    words += ["--methods", "vanilla", "fastv"]
    call = [sys.executable, "-m", "safe_pruner_node.evaluation.evaluate", *words]
    path = tmp_path / "evaluation.jsonl"
    with subprocess.Popen(call, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        deadline_s = time.monotonic() + PATIENCE_S
        while not path.exists() or path.read_bytes().count(b"\n") < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    before = path.read_bytes()
    assert subprocess.run(call, check=False, stdout=subprocess.DEVNULL).returncode == 0
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    keys = [EpisodeKey.of(line) for line in read_lines(path)]
    wanted = {
        EpisodeKey(method, rho, "throw_basketball", "evaluation", index)
        for method, rho in (("vanilla", 0.0), ("fastv", 0.75))
        for index in range(4)
    }
    assert len(keys) == len(wanted)
    assert set(keys) == wanted
    assert (tmp_path / "evaluation_rho0.75.md").is_file()
    assert (tmp_path / "evaluation_rho0.75.png").is_file()


@pytest.fixture
def in_thread(monkeypatch):
    """The worker in a thread of this process: no start-up."""
    pool = ThreadPoolExecutor(1)

    class Pool:
        def __init__(self, plan, _workers):
            self.plan = plan

        def __enter__(self):
            return lambda job: pool.submit(work, self.plan, job)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(command, "process_pool", Pool)
    yield
    pool.shutdown()


@pytest.mark.usefixtures("in_thread")
def test_every_method_and_the_table_from_the_file_alone(small_checkpoint, tmp_path, capsys):
    words = options(small_checkpoint, tmp_path, "--episodes", "1", "--gamma", "1.5")
    words = ["--query-period-s", "0.3", *words]
    assert command.main(words) == 0
    lines = read_lines(tmp_path / "evaluation.jsonl")
    assert len(lines) == 7
    by_method = {line["method"]: line for line in lines}
    assert by_method["safe"]["keyframes"] == by_method["safe"]["queries"] == 2
    assert by_method["without_division"]["pruner"]["interval"] == 1
    assert by_method["fastv_equal_flops"]["pruner"]["rho"] == 0.0  # every step of SAFE was full
    assert len({json.dumps(line["settings"]) for line in lines}) == 1
    table = (tmp_path / "evaluation_rho0.75.md").read_text()
    assert "| SAFE-Pruner | 0.0 [0, 79] 0/1 |" in table
    assert "Seeds: 3000000 (evaluation)" in table
    assert "RANDOM" not in table  # the small one has no card: its folder's name stands for it
    assert "not all episodes" not in table

    (tmp_path / "evaluation_rho0.75.md").unlink()
    gone = ["--out", str(tmp_path), "--table-only", "--checkpoint", "nowhere"]
    assert command.main(gone) == 0
    assert (tmp_path / "evaluation_rho0.75.md").read_text() == table

    capsys.readouterr()
    assert command.main([*words, "--latency-s", "0.3"]) == 1
    assert "latency_s: found 0.1, expected 0.3" in capsys.readouterr().out
    assert command.main([*words[:-1], "0.8"]) == 1
    assert "safe at rho 0.75: gamma: found 1.5, expected 0.8" in capsys.readouterr().out


def test_out_of_time_begins_nothing_and_loses_nothing(small_checkpoint, tmp_path):
    words = options(small_checkpoint, tmp_path, "--episodes", "1", "--methods", "vanilla", "safe")
    evaluation = command.Evaluation.of(command.tyro.cli(command.EvaluateOptions, args=words))
    late = command.replace(evaluation, deadline_s=time.monotonic() - 1.0)
    pool = ThreadPoolExecutor(1)
    with late.results("late.jsonl") as results:
        submitted = []

        def submit(job):
            submitted.append(job)
            return pool.submit(work, late.plan, job)

        assert not command.evaluate(late, results, submit, Console(quiet=True))
        assert submitted == []
        assert command.evaluate(evaluation, results, submit, Console(quiet=True))
        assert len(submitted) == 2
    pool.shutdown()


@pytest.mark.usefixtures("in_thread")
def test_gamma_with_its_evidence(small_checkpoint, tmp_path, capsys):
    words = options(small_checkpoint, tmp_path, "--episodes", "1", "--calibrate-gamma")
    words += ["--query-period-s", "0.1", "--latency-s", "0.0", "--keyframe-rate", "0.4"]
    assert command.main(words) == 0
    evidence = json.loads((tmp_path / "gamma.json").read_text())
    last = evidence["trials"][-1]
    assert evidence["gamma"] == last["gamma"]
    assert last["rate"] == last["keyframes"] / last["queries"] == pytest.approx(0.4, abs=0.015)
    assert f"gamma: {evidence['gamma']:.5f}  #" in capsys.readouterr().out
    seeds = {line["split"] for line in read_lines(tmp_path / "gamma.jsonl")}
    assert seeds == {"calibration"}


@pytest.mark.usefixtures("in_thread")
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--methods", "vanila"], "--methods: found vanila"),
        (["--tasks", "juggle"], "task: found juggle"),
        (["--split", "test"], "split: found test"),
        (["--checkpoint", "nowhere"], "--checkpoint: found no model.safetensors in nowhere"),
        (["--episodes", "0"], "--episodes: found 0"),
        (["--rho", "0.75", "0.75"], "--rho: found [0.75, 0.75]"),
        (["--rho", "1.5", "--methods", "safe"], "rho: found 1.5"),
        (["--table-only"], "no episode"),
    ],
)
def test_mistakes_are_one_line(words, named, small_checkpoint, tmp_path, capsys):
    base = ["--checkpoint", str(small_checkpoint), "--out", str(tmp_path / "none")]
    assert command.main([*base, *words]) == 1
    out = capsys.readouterr().out.strip()
    assert named in out
    assert "Traceback" not in out


def test_a_film_of_an_episode(small_checkpoint, tmp_path):
    path = tmp_path / "films" / "safe.mp4"
    assert command.main(options(small_checkpoint, tmp_path, "--video", path)) == 0
    with av.open(str(path)) as film:
        seconds = float(film.duration) / av.time_base
    assert seconds == pytest.approx(0.5 + 1.5, abs=0.2)  # the episode, and its last picture
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_machine_that_only_computes_needs_neither_ros_nor_figures():
    absent = ["rclpy", "astribot_msgs", "safe_pruner_msgs", "matplotlib", "av", "mink"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); "
    code += "import safe_pruner_node.evaluation.evaluate"
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
