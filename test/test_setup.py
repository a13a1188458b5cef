"""tools/setup.sh and tools/env.sh, as a person calls them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command, env=None, cwd=ROOT):
    """Runs a command to its end and returns it with its output as text."""
    return subprocess.run(
        command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def bare_environment(**extra):
    """A login shell's variables: nothing of the environment that these tests run in."""
    keep = {k: os.environ[k] for k in ("HOME", "USER", "LANG", "TMPDIR") if k in os.environ}
    system = [p for p in os.environ["PATH"].split(":") if not p.startswith(str(ROOT))]
    return keep | {"PATH": ":".join(system)} | extra


def in_env(script, **extra):
    """Runs a bash script after sourcing tools/env.sh in a bare environment."""
    return run(
        "bash", "-euo", "pipefail", "-c", f"source {ROOT}/tools/env.sh\n{script}",
        env=bare_environment(**extra), cwd="/",
    )  # fmt: skip


def prefix_with_vendor_messages(folder):
    """An install prefix that holds a package called astribot_msgs."""
    share = folder / "share" / "astribot_msgs"
    share.mkdir(parents=True)
    (share / "package.xml").write_text("<package/>")
    return folder


@pytest.fixture
def programs(tmp_path):
    """A folder with links to every system program, from which a test removes some."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for source in ("/bin", "/usr/bin"):
        for program in Path(source).iterdir():
            link = folder / program.name
            if not link.exists():
                link.symlink_to(program)
    return folder


def test_second_call_does_nothing_and_needs_no_network():
    unreachable = bare_environment(
        PIP_INDEX_URL="http://127.0.0.1:9", PIP_NO_INDEX="1", http_proxy="http://127.0.0.1:9"
    )
    done = run("tools/setup.sh", env=unreachable)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("removed", [("cc", "c++"), ("make",)])
def test_what_the_system_lacks_is_one_line_with_the_command(programs, removed):
    for name in removed:
        (programs / name).unlink()
    package = {"cc": "g++", "make": "make"}[removed[0]]
    python = shutil.which("python3", path=bare_environment()["PATH"])
    lacking = run(
        "tools/setup.sh", "check", env=bare_environment(PATH=str(programs), PYTHON=python)
    )
    assert lacking.returncode == 1
    assert lacking.stdout == ""
    assert lacking.stderr.count("\n") == 1
    assert f"sudo apt-get install {package}" in lacking.stderr


def test_python_out_of_range_is_refused(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    lacking = run("tools/setup.sh", "check", env=bare_environment(PYTHON=str(old)))
    assert lacking.returncode == 1
    assert "sudo apt-get install python3" in lacking.stderr


def test_the_environment_has_the_messages_from_anywhere():
    done = in_env(
        "python -c 'from safe_pruner_msgs.msg import ControlState, PolicyStep\n"
        "from astribot_msgs.msg import RobotJointController, RobotJointState\n"
        "print(ControlState.HOLD, ControlState.POLICY, ControlState.ESTOP)\n"
        "print(list(RobotJointState.get_fields_and_field_types().items())[1:])'",
    )
    assert done.returncode == 0, done.stderr
    constants, fields = done.stdout.splitlines()
    assert constants == "0 1 2"
    # the vendor's field order and types: the wire format
    assert fields == str(
        [
            ("mode", "int8"),
            ("name", "sequence<string>"),
            ("position", "sequence<double>"),
            ("velocity", "sequence<double>"),
            ("acceleration", "sequence<double>"),
            ("torque", "sequence<double>"),
        ]
    )


def test_the_environment_is_private_unless_told_otherwise():
    show = 'echo "$ROS_DOMAIN_ID $ROS_AUTOMATIC_DISCOVERY_RANGE $MUJOCO_GL"'
    domain, reach, drawing = in_env(show).stdout.split()
    assert domain != "25"  # the robot's
    assert reach == "LOCALHOST"
    assert drawing in {"osmesa", "egl"}
    told = in_env(
        show, ROS_DOMAIN_ID="25", ROS_AUTOMATIC_DISCOVERY_RANGE="SUBNET", MUJOCO_GL="glfw"
    )
    assert told.stdout.split() == ["25", "SUBNET", "glfw"]


def test_sourcing_twice_changes_nothing():
    once = in_env("env | sort")
    twice = in_env(f"source {ROOT}/tools/env.sh; env | sort")
    assert once.returncode == twice.returncode == 0
    assert once.stdout == twice.stdout


def test_a_sourced_vendor_package_wins_over_ours(tmp_path):
    vendor = prefix_with_vendor_messages(tmp_path / "vendor")
    sourced = {"AMENT_PREFIX_PATH": str(vendor)}
    found = run("tools/setup.sh", "vendor-msgs", env=bare_environment(**sourced))
    assert found.stdout == f"{vendor}\n"
    paths = in_env('echo "$AMENT_PREFIX_PATH:$PYTHONPATH:$LD_LIBRARY_PATH"', **sourced).stdout
    assert str(vendor) in paths
    assert "install/astribot_msgs" not in paths
    assert "install/safe_pruner_msgs" in paths


def test_our_own_build_is_not_taken_for_the_vendor():
    ours = in_env('echo "$AMENT_PREFIX_PATH"').stdout.strip()
    assert "install/astribot_msgs" in ours
    found = run("tools/setup.sh", "vendor-msgs", env=bare_environment(AMENT_PREFIX_PATH=ours))
    assert found.stdout == "\n"


STAGES = """
set -euo pipefail
state={state}
source {root}/tools/stages.sh
lock
total=2
stage_first() {{ echo first >>{state}/ran; }}
stage_second() {{ echo second >>{state}/ran; [ ! -f {state}/broken ] || exit 1; }}
stage first 'first thing' "$1"
stage second 'second thing'
"""


def run_stages(state, text):
    """Runs two stages, the first with an input; returns the names of those that ran."""
    (state / "ran").write_text("")
    done = run("bash", "-c", STAGES.format(state=state, root=ROOT), "stages", text)
    return done, (state / "ran").read_text().split()


def test_a_stage_runs_again_only_after_failure_or_another_input(tmp_path):
    (tmp_path / "broken").touch()
    failed, ran = run_stages(tmp_path, "a")
    assert failed.returncode == 1
    assert "second thing failed" in failed.stderr
    assert ran == ["first", "second"]

    (tmp_path / "broken").unlink()
    assert run_stages(tmp_path, "a")[1] == ["second"]  # resumed: the first is done
    assert run_stages(tmp_path, "a")[1] == []
    assert run_stages(tmp_path, "b")[1] == ["first", "second"]  # what follows is stale as well


def test_a_package_cut_short_by_a_kill_is_not_believed(tmp_path):
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    whole, cut, early = (site / f"{name}-1.dist-info" for name in ("whole", "cut", "early"))
    for info in (whole, cut, early):
        info.mkdir(parents=True)
        (info / "METADATA").touch()
        (info / "RECORD").write_text(f"{info.name}/METADATA,,\n")  # the wheel's own
    (whole / "RECORD").write_text(f"{whole.name}/METADATA,,\n{whole.name}/INSTALLER,,\n")
    (early / "RECORD").unlink()
    function = run("sed", "-n", "/^drop_half_installed()/,/^}/p", "tools/setup.sh").stdout
    done = run("bash", "-euc", f"{function}\ndrop_half_installed {tmp_path}")
    assert done.returncode == 0, done.stderr
    assert whole.exists()
    assert not cut.exists()
    assert not early.exists()
