"""The demo as a user calls it: real nodes, real worker, from one episode to the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from safe_pruner_node.twin.tasks.seeds import episode_seed


def test_two_live_episodes(tmp_path, small_checkpoint):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "safe_pruner_node.evaluation.demo"]
    command += ["--checkpoint", str(small_checkpoint), "--out", str(out), "--seconds", "2.5"]
    command += ["--task", "pick_and_place", "--episodes", "2", "--first-seed-index", "1"]
    run = subprocess.run(
        command,
        env=os.environ | {"ROS_DOMAIN_ID": "94", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    logs = "".join(path.read_text() for path in out.glob("*.log"))
    assert run.returncode == 0, run.stdout + run.stderr + logs
    assert "0 of 2 episodes succeeded" in run.stdout
    summary = json.loads((out / "summary.json").read_text())
    episodes = summary["episodes"]
    seeds = [episode_seed("validation", index) for index in (1, 2)]
    assert [(e["task"], e["seed"]) for e in episodes] == [("pick_and_place", s) for s in seeds]
    assert len({e["prompt"] for e in episodes}) == 2
    assert summary["success"]["pick_and_place"]["episodes"] == 2
    for episode in episodes:
        assert f"prompt is now {episode['prompt']!r}" in logs
        assert episode["policy_steps"] >= 2
        assert 2.4 < episode["seconds"] < 3.5
        assert 0.5 < episode["real_time_factor"] < 1.1
    # Each activation began at the joints of the new episode: no start was refused for a jump.
    assert summary["holds"] >= 2, "the stop at the end of each"
    assert "tolerance" not in logs
    assert (summary["final_mode"], summary["worker_deaths"]) == ("HOLD", 0)
    assert summary["keyframes"] >= 2, "a new prompt and a reset each"
    assert all(count["received"] > 0 for count in summary["camera_frames"].values())
    twin = json.loads((out / "twin.json").read_text())
    assert [e["prompt"] for e in twin["episodes"][-2:]] == [e["prompt"] for e in episodes]
    for name in ("latency.png", "rollout.mp4"):
        assert (out / name).stat().st_size > 10_000
