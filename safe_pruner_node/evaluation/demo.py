"""``make demo``: the twin, the policy node and their worker in closed loop, recorded and summed up.

The nodes and their parameters come from ``safe_pruner_node.bringup``, the description that
``ros2 launch safe_pruner_node astribot.launch.py twin:=true auto_start:=true`` uses as well.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rclpy
import tyro
from rclpy.executors import SingleThreadedExecutor
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from safe_pruner_msgs.srv import SetPrompt
from std_srvs.srv import Trigger

from safe_pruner_node.bringup import BringupOptions, NodeSpec, node_specs
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.figures import latency_figure
from safe_pruner_node.evaluation.run_record import git_revision, summarise
from safe_pruner_node.evaluation.video import rollout_video
from safe_pruner_node.nodes.recorder import RunRecorder

_CAMERAS = ("head", "left_wrist", "right_wrist")
_NANO = Path("checkpoints/nano")
_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class DemoOptions:
    """Closed loop on the twin: starts the nodes, runs, ends in a hold, writes what happened."""

    seconds: float = 30.0
    """Length of the recorded closed loop."""
    out: Path = Path("runs/demo")
    """Where summary.json, latency.png, rollout.mp4 and the logs go."""
    checkpoint: Path = _NANO
    """Policy to run; the default, and no other, is built when it is not there."""
    prompt: str = "pick up the red cube"
    """The task in words."""
    then: str = "put the orange ball on the plate"
    """The task from half time on: a new prompt makes a keyframe."""
    pruner: str = "robot"
    """Preset of config/pruners.yaml."""
    pruning_ratio: float = -1.0
    """Share of the visual tokens to prune; -1 takes the preset's."""
    control_rate_hz: float = 0.0
    """Rate of the joint commands; 0 takes the twin's 100 Hz."""
    video: bool = True
    """Write rollout.mp4."""
    seed: int = 0
    """Seed of the flow noise and of the scene."""


class DemoError(Exception):
    """The run could not be made; one line says why."""


def main() -> int:
    """Entry point of ``make demo``."""
    options = tyro.cli(DemoOptions)
    console = Console()
    try:
        summary = run_demo(options, console)
    except (DemoError, ConfigError) as error:
        console.print(f"[red]demo failed:[/red] {error}")
        return 1
    except KeyboardInterrupt:
        console.print("stopped by hand")
        return 130
    print_summary(summary, options, console)
    return 0


def run_demo(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Run the closed loop and write its files.

    Returns:
        What ``summary.json`` holds.

    Raises:
        DemoError: A process ended early, or the policy never began.
        ConfigError: The options contradict each other.
    """
    if not options.seconds > 0.0:
        raise ConfigError("--seconds", "", options.seconds, "more than 0")
    options.out.mkdir(parents=True, exist_ok=True)
    _ensure_checkpoint(options.checkpoint, console)
    twin_summary = (options.out / "twin.json").resolve()
    twin_summary.unlink(missing_ok=True)
    specs = node_specs(
        BringupOptions(
            checkpoint=str(options.checkpoint.resolve()),
            prompt=options.prompt,
            pruner=options.pruner,
            pruning_ratio=options.pruning_ratio,
            control_rate_hz=options.control_rate_hz,
            twin=True,
            auto_start=True,
            auto_resume=True,
            seed=options.seed,
            twin_summary=str(twin_summary),
        )
    )
    rclpy.init()
    executor = SingleThreadedExecutor()
    recorder = RunRecorder("safe_pruner", _CAMERAS)
    executor.add_node(recorder)
    try:
        with _processes(specs, options.out) as processes:
            _wait_for_policy(executor, recorder, processes, options, console)
            _record(executor, recorder, processes, options, console)
            recorder.recording = False
            _stop_policy(executor, recorder)
    finally:
        executor.shutdown()
        recorder.destroy_node()
        rclpy.try_shutdown()
    return _write(options, recorder, twin_summary, console)


def _ensure_checkpoint(checkpoint: Path, console: Console) -> None:
    if (checkpoint / "model.safetensors").exists():
        return
    if checkpoint != _NANO:  # a misspelt path must not become random weights
        raise ConfigError(
            "--checkpoint", "", f"no policy at {checkpoint}", "a checkpoint directory"
        )
    console.print(f"no policy at {checkpoint}: building the small one with random weights")
    # In a process of its own: this one never needs torch.
    command = [sys.executable, "-m", "safe_pruner_node.pi05.nano", str(checkpoint)]
    if subprocess.run(command, check=False).returncode != 0:  # noqa: S603
        raise DemoError(f"cannot build {checkpoint}")


@contextmanager
def _processes(specs: list[NodeSpec], out: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The nodes as processes; each is asked to end by SIGINT, in reverse order, then killed."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for spec in specs:
            with (out / f"{spec.executable}.log").open("wb") as log:
                running[spec.name] = subprocess.Popen(  # noqa: S603
                    [sys.executable, "-m", spec.module, *spec.ros_arguments()],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"},
                )
        yield running
    finally:
        for process in reversed(running.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _check_alive(processes: dict[str, subprocess.Popen[bytes]], out: Path) -> None:
    for name, process in processes.items():
        if process.poll() is not None:
            line = _last_line(_log_of(name, out))
            raise DemoError(f"{name} ended with status {process.returncode}: {line}")


def _log_of(name: str, out: Path) -> Path:
    return out / {"astribot_twin": "twin_node.log", "safe_pruner": "policy_node.log"}[name]


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "(nothing in its log)"


def _wait_for_policy(
    executor: SingleThreadedExecutor,
    recorder: RunRecorder,
    processes: dict[str, subprocess.Popen[bytes]],
    options: DemoOptions,
    console: Console,
) -> None:
    """Until the policy drives the arms."""
    begun_s = time.monotonic()
    log = _log_of("safe_pruner", options.out)
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        while True:
            executor.spin_once(timeout_sec=0.1)
            _check_alive(processes, options.out)
            control = recorder.control
            if control is not None and control.mode_name == "POLICY":
                break
            waited_s = time.monotonic() - begun_s
            if "configure failed" in log.read_text(errors="replace"):
                raise DemoError(_last_line(log))
            if waited_s > _START_TIMEOUT_S:
                why = recorder.control.hold_reason if recorder.control else _last_line(log)
                raise DemoError(f"no policy after {waited_s:.0f} s: {why}")
            live.update(Text(f"starting, {waited_s:4.1f} s: {_last_line(log)[-100:]}"))
    console.print(f"policy drives the arms after {time.monotonic() - begun_s:.1f} s")


def _record(
    executor: SingleThreadedExecutor,
    recorder: RunRecorder,
    processes: dict[str, subprocess.Popen[bytes]],
    options: DemoOptions,
    console: Console,
) -> None:
    """Record for the wished time with a live status line; a new prompt at half time."""
    begun_s = time.monotonic()
    prompt = recorder.create_client(SetPrompt, "/safe_pruner/set_prompt")
    second_half = False
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        while (elapsed_s := time.monotonic() - begun_s) < options.seconds:
            executor.spin_once(timeout_sec=0.1)
            _check_alive(processes, options.out)
            if not second_half and elapsed_s > options.seconds / 2:
                second_half = True
                prompt.call_async(SetPrompt.Request(prompt=options.then))
            live.update(Text(_status_line(recorder, elapsed_s, options.seconds)))


def _status_line(recorder: RunRecorder, elapsed_s: float, total_s: float) -> str:
    control, step = recorder.control, recorder.last_step
    line = f"{elapsed_s:5.1f} / {total_s:.0f} s"
    if control is not None:
        line += f"  {control.mode_name:6s} {control.rate_hz:.0f} Hz"
        line += f"  period max {control.period_max_ms:.1f} ms  starved {control.starved_ticks}"
    if step is not None:
        keyframes = sum(record.keyframe for record in recorder.record.steps)
        line += f"  step {step.query}: {step.step_ms:.0f} ms"
        line += f"  kept {step.kept_tokens}/{step.visual_tokens}"
        line += f"  kappa {step.kappa:.3f}  keyframes {keyframes}"
    return line


def _stop_policy(executor: SingleThreadedExecutor, recorder: RunRecorder) -> None:
    """Call ~/stop and wait until the joints hold.

    Raises:
        DemoError: The node did not come to a hold.
    """
    client = recorder.create_client(Trigger, "/safe_pruner/stop")
    if not client.wait_for_service(timeout_sec=5.0):
        raise DemoError("~/stop is not there")
    future = client.call_async(Trigger.Request())
    deadline_s = time.monotonic() + 5.0
    while time.monotonic() < deadline_s:
        executor.spin_once(timeout_sec=0.1)
        control = recorder.control
        if future.done() and control is not None and control.mode_name == "HOLD":
            return
    raise DemoError("the node did not come to a hold within 5 s of ~/stop")


def _camera_frames(recorder: RunRecorder, twin: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Frames per camera between the first and the last recorded step.

    ``published`` and ``dropped`` come from the twin's own list of stamps, so a frame counts as
    dropped when the twin sent it in that time and the node did not get it.
    """
    first, last = recorder.first_step, recorder.last_step
    if first is None or last is None:
        raise DemoError("the policy made no step")
    begin = {camera.name: camera for camera in first.cameras}
    frames = {}
    for camera in last.cameras:
        start = begin[camera.name]
        received = camera.received - start.received
        stamps = twin["camera_stamps_ns"][camera.name]
        published = sum(_stamp_ns(start) < stamp <= _stamp_ns(camera) for stamp in stamps)
        frames[camera.name] = {
            "published": published,
            "received": received,
            "used": camera.used - start.used,
            "dropped": max(0, published - received),
        }
    return frames


def _stamp_ns(camera: Any) -> int:  # noqa: ANN401 - a generated message
    """Stamp of the frame that a CameraStatus speaks of, nanoseconds."""
    return int(camera.stamp.sec) * 1_000_000_000 + int(camera.stamp.nanosec)


def _write(
    options: DemoOptions, recorder: RunRecorder, twin_summary: Path, console: Console
) -> dict[str, Any]:
    """The summary, the figure and the film."""
    if not twin_summary.exists():
        raise DemoError(f"the twin left no {twin_summary}")
    twin = json.loads(twin_summary.read_text(encoding="utf-8"))
    record = recorder.record
    root = Path(__file__).resolve().parent.parent
    try:
        summary = summarise(record, _camera_frames(recorder, twin), git_revision(root))
    except ValueError as error:
        raise DemoError(str(error)) from None
    summary["real_time_factor"] = twin["real_time_factor"]
    summary["seconds"] = options.seconds
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    title = f"{summary['pruner']}, checkpoint {summary['checkpoint']}, {summary['git']}"
    latency_figure(record, options.out / "latency.png", title)
    if options.video:
        rollout_video(record, options.out / "rollout.mp4")
    console.print(f"wrote {options.out}/summary.json, latency.png, rollout.mp4 and the logs")
    return summary


def print_summary(summary: dict[str, Any], options: DemoOptions, console: Console) -> None:
    """The table a person reads, and one last line."""
    table = Table(title=f"{options.seconds:g} s closed loop on the twin")
    for column in ("what", "figure", "meaning"):
        table.add_column(column)
    period, step = summary["control_period_ms"], summary["step_ms"]
    ticks, expected = summary["control_ticks"], summary["control_ticks_expected"]
    table.add_row(
        "control ticks", f"{ticks} of {expected}", f"{100 * ticks / max(expected, 1):.2f} %"
    )
    table.add_row(
        "control period",
        f"p50 {period['p50']:.2f}, p99 {period['p99']:.2f}, max {period['max']:.2f} ms",
        f"nominal {1e3 / summary['control_rate_hz']:.2f} ms",
    )
    table.add_row(
        "policy step",
        f"p50 {step['p50']:.0f}, p99 {step['p99']:.0f} ms",
        f"{summary['policy_steps']} steps, {summary['keyframes']} keyframes",
    )
    for name, value in summary["stage_ms"].items():
        table.add_row(f"  {name}", f"{value:.2f} ms" if value is not None else "-", "p50")
    end = summary["end_to_end_ms"]
    table.add_row(
        "end to end",
        f"p50 {end['p50']:.0f}, p99 {end['p99']:.0f} ms",
        "camera stamp to first command",
    )
    for name, count in summary["camera_frames"].items():
        table.add_row(
            f"camera {name}",
            f"{count['received']} of {count['published']}",
            f"{count['used']} used, {count['dropped']} lost",
        )
    tokens, kappa = summary["tokens"], summary["kappa"]
    table.add_row(
        "visual tokens", f"{tokens['kept_p50']:.0f} of {tokens['visual']}", "kept on a pruned step"
    )
    if kappa["p50"] is not None:
        table.add_row("kappa", f"p50 {kappa['p50']:.3f}, min {kappa['min']:.3f}", "Eq. 6")
    table.add_row(
        "starved / clamped / holds",
        f"{summary['starved_ticks']} / {summary['clamped_ticks']} / {summary['holds']}",
        "ticks, ticks, times (the last stop is one)",
    )
    table.add_row("largest joint step", f"{summary['max_joint_step_rad']:.4f} rad", "per tick")
    console.print(table)
    nano = "; nano has random weights: it shows the system, not a skill"
    console.print(f"ended in {summary['final_mode']}{nano if options.checkpoint == _NANO else ''}")


if __name__ == "__main__":
    sys.exit(main())
