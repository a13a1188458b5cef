"""The results file: resumable, and never two kinds in one."""

import json
from dataclasses import replace

import pytest

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.results import (
    EpisodeKey,
    Results,
    pruner_from_json,
    pruner_to_json,
    read_lines,
)
from safe_pruner_node.pruning.settings import load_preset

SETTINGS = {"latency_s": 0.4, "noise_seed": 0}
SAFE = load_preset(None, "robot")


def line(index=0, method="safe", pruner=SAFE, **values):
    key = {"method": method, "rho": 0.75, "task": "t", "split": "evaluation", "index": index}
    return key | {
        "checkpoint": "abc",
        "settings": SETTINGS,
        "pruner": pruner_to_json(pruner),
        "success": True,
        **values,
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "evaluation.jsonl"


def written(path, *lines):
    with Results(path, "abc", SETTINGS) as results:
        for entry in lines:
            results.append(entry)


def test_what_is_written_is_there_again(path):
    written(path, line(0), line(1))
    with Results(path, "abc", SETTINGS) as results:
        assert EpisodeKey("safe", 0.75, "t", "evaluation", 1) in results
        assert EpisodeKey("safe", 0.75, "t", "evaluation", 2) not in results
        assert results.pruner_of("safe", 0.75) == SAFE


def test_a_line_cut_off_by_a_kill_is_run_again(path):
    written(path, line(0), line(1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert [entry["index"] for entry in read_lines(path)] == [0]
    written(path, line(1))
    assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_named(path):
    written(path, line(0), line(1))
    first, second = path.read_text().splitlines()
    path.write_text(f"{first[:-9]}\n{second}\n")
    with pytest.raises(ConfigError, match="line 1"):
        Results(path, "abc", SETTINGS)


@pytest.mark.parametrize(
    ("checkpoint", "settings", "named"),
    [
        ("xyz", SETTINGS, "line 1: checkpoint"),
        ("abc", {**SETTINGS, "latency_s": 0.1}, "line 1: latency_s"),
        ("abc", {**SETTINGS, "new": 1}, "line 1: new"),
    ],
)
def test_lines_of_others_are_refused(path, checkpoint, settings, named):
    written(path, line(0))
    with pytest.raises(ConfigError, match=named) as refusal:
        Results(path, checkpoint, settings)
    assert "\n" not in str(refusal.value)


def test_one_method_has_one_set_of_settings(path):
    other = replace(SAFE, gamma=0.5)
    with Results(path, "abc", SETTINGS) as results:
        results.append(line(0))
        results.check_pruner("safe", 0.75, replace(SAFE, name="other", source="elsewhere"))
        with pytest.raises(ConfigError, match=r"safe at rho 0\.75: gamma"):
            results.check_pruner("safe", 0.75, other)
        with pytest.raises(ConfigError, match="gamma"):
            results.append(line(1, pruner=other))
        results.append(line(1, method="another", pruner=other))


def test_an_episode_is_there_once(path):
    with Results(path, "abc", SETTINGS) as results:
        results.append(line(0))
        with pytest.raises(ConfigError, match="a second time"):
            results.append(line(0))
    assert len(path.read_text().splitlines()) == 1


def test_one_writer_at_a_time(path):
    with (
        Results(path, "abc", SETTINGS),
        pytest.raises(ConfigError, match="another process that writes it"),
    ):
        Results(path, "abc", SETTINGS)
    Results(path, "abc", SETTINGS).__exit__(None, None, None)


def test_pruners_survive_json():
    for name in ("robot", "vanilla", "fastv", "random", "paper", "without_division"):
        pruner = load_preset(None, name)
        assert pruner_from_json(json.loads(json.dumps(pruner_to_json(pruner))), name) == pruner
