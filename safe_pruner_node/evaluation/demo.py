"""``make demo``: a policy does the twin's tasks live, through the node, recorded and summed up.

The nodes and their parameters come from ``safe_pruner_node.bringup``, the description that
``ros2 launch safe_pruner_node astribot.launch.py twin:=true auto_start:=true`` uses as well. Here
one pair of nodes goes from episode to episode.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rclpy
import tyro
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from safe_pruner_node.bringup import BringupOptions, NodeSpec, default_checkpoint, node_specs
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.figures import latency_figure
from safe_pruner_node.evaluation.run_record import (
    EpisodeRecord,
    RunRecord,
    camera_frames,
    git_revision,
    summarise,
)
from safe_pruner_node.evaluation.video import RolloutFilm
from safe_pruner_node.nodes.episode_client import EpisodeClient, EpisodeError
from safe_pruner_node.nodes.recorder import RunRecorder
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.twin.tasks.registry import TASKS, build_task
from safe_pruner_node.twin.tasks.seeds import Split, episode_seed

POLICY, TWIN = "safe_pruner", "astribot_twin"

ALL = "all"

LINGER_S = 1.0
"""How long the policy goes on once the job is done: the film shows what was done, s."""

_LOGS = {TWIN: "twin_node.log", POLICY: "policy_node.log"}
_START_TIMEOUT_S = 180.0
_TAKE_OVER_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 15.0
_LAST_MESSAGES_S = 0.3
"""For what the node published before it was deactivated to arrive."""


@dataclass(frozen=True)
class DemoOptions:
    """A policy does the twin's tasks live; every episode ends with success or with its time."""

    task: str = ALL
    """pick_and_place, throw_basketball, pack_doll, or all of them in turn."""
    episodes: int = 1
    """Episodes of each task."""
    split: Split = "validation"
    """Where the episodes' seeds come from; "evaluation" is for reported tables."""
    first_seed_index: int = 0
    """Number of the first episode within its split."""
    seconds: float | None = None
    """Ends an episode earlier than its task's time limit."""
    out: Path = Path("runs/demo")
    """Where summary.json, latency.png, rollout.mp4 and the logs go."""
    checkpoint: Path | None = None
    """Policy to run; by default the small one that comes with the package."""
    pruner: str = "robot"
    """Preset of config/pruners.yaml."""
    pruning_ratio: float = -1.0
    """Share of the visual tokens to prune; -1 takes the preset's."""
    control_rate_hz: float = 0.0
    """Rate of the joint commands; 0 takes the twin's 100 Hz."""
    video: bool = True
    """Write rollout.mp4."""
    seed: int = 0
    """Seed of the flow noise."""


@dataclass(frozen=True)
class EpisodePlan:
    """One episode to run.

    Attributes:
        task: Name of the task.
        seed: Seed of the episode.
        limit_s: Simulated time that the policy has.
    """

    task: str
    seed: int
    limit_s: float


class DemoError(Exception):
    """The run could not be made; one line says why."""


def main() -> int:
    """Entry point of ``make demo``."""
    options = tyro.cli(DemoOptions)
    console = Console()
    try:
        summary = run_demo(options, console)
    except (DemoError, EpisodeError, ConfigError) as error:
        console.print(f"[red]demo failed:[/red] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("stopped by hand")
        return 130
    print_summary(summary, console)
    return 0


def plan_episodes(options: DemoOptions) -> list[EpisodePlan]:
    """The episodes of a run: the tasks in turn, one seed after the other.

    Raises:
        ConfigError: Unknown task, no episode, no time, or a seed outside of its split.
    """
    if options.episodes < 1:
        raise ConfigError("--episodes", "", options.episodes, "1 or more")
    if options.seconds is not None and not options.seconds > 0.0:
        raise ConfigError("--seconds", "", options.seconds, "more than 0")
    names = tuple(TASKS) if options.task == ALL else (options.task,)
    plans = []
    for index in range(options.first_seed_index, options.first_seed_index + options.episodes):
        seed = episode_seed(options.split, index)
        for name in names:
            limit_s = build_task(name, seed).time_limit_s
            plans.append(EpisodePlan(name, seed, min(limit_s, options.seconds or limit_s)))
    return plans


def run_demo(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Run the episodes and write their files.

    Returns:
        What ``summary.json`` holds.

    Raises:
        DemoError: A process ended early, or the policy never began.
        EpisodeError: The nodes do not go from one episode to the next.
        ConfigError: A wrong option.
    """
    plans = plan_episodes(options)
    checkpoint = options.checkpoint or default_checkpoint()
    if not (checkpoint / "model.safetensors").exists():
        expected = "a checkpoint directory with model.safetensors"
        raise ConfigError("--checkpoint", "", f"no policy at {checkpoint}", expected)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("--out", "", f"{options.out}: {error.strerror}", "a folder") from None
    twin_summary = (options.out / "twin.json").resolve()
    twin_summary.unlink(missing_ok=True)
    specs = node_specs(
        BringupOptions(
            checkpoint=str(checkpoint.resolve()),
            task=plans[0].task,
            pruner=options.pruner,
            pruning_ratio=options.pruning_ratio,
            control_rate_hz=options.control_rate_hz,
            twin=True,
            auto_resume=True,
            seed=options.seed,
            twin_summary=str(twin_summary),
        )
    )
    # Python's own handler of Ctrl-C: what has been recorded so far is still to be written.
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    executor = SingleThreadedExecutor()
    recorder = RunRecorder(POLICY, TWIN, _camera_topics() if options.video else {})
    executor.add_node(recorder)
    record, film = RunRecord(), None
    try:
        with ExitStack() as stack:
            if options.video:
                film = stack.enter_context(closing(RolloutFilm(options.out / "rollout.mp4")))
            processes = stack.enter_context(_processes(specs, options.out))
            demo = _Demo(executor, recorder, processes, options.out, console)
            demo.wait_for_policy()
            try:
                for episode in demo.episodes(plans):
                    record.episodes.append(episode)
                    if film is not None:
                        film.add(episode)
                        episode.images, episode.overlays = {}, {}  # gigabytes in a long run
            except KeyboardInterrupt:
                if not record.episodes:
                    raise
                console.print(f"stopped by hand after {len(record.episodes)} episodes")
    finally:
        executor.shutdown()
        recorder.destroy_node()
        rclpy.try_shutdown()
    return _write(options, record, twin_summary, _policy_title(checkpoint), console)


class _Demo:
    """One pair of running nodes, and the episodes that they are taken through."""

    def __init__(
        self,
        executor: SingleThreadedExecutor,
        recorder: RunRecorder,
        processes: dict[str, subprocess.Popen[bytes]],
        out: Path,
        console: Console,
    ) -> None:
        self._executor = executor
        self._recorder = recorder
        self._processes = processes
        self._out = out
        self._console = console
        self._client = EpisodeClient(recorder, executor, POLICY, TWIN)

    def wait_for_policy(self) -> None:
        """Until the policy node is active: it holds the arms, its model is warm."""
        begun_s = time.monotonic()
        log = self._out / _LOGS[POLICY]
        with Live(console=self._console, refresh_per_second=4, transient=True) as live:
            while self._recorder.control is None:
                self._executor.spin_once(timeout_sec=0.1)
                self._check_alive()
                waited_s = time.monotonic() - begun_s
                if "configure failed" in log.read_text(errors="replace"):
                    raise DemoError(_last_line(log))
                if waited_s > _START_TIMEOUT_S:
                    raise DemoError(f"no policy after {waited_s:.0f} s: {_last_line(log)}")
                live.update(Text(f"starting, {waited_s:4.1f} s: {_last_line(log)[-100:]}"))
        self._console.print(f"policy ready after {time.monotonic() - begun_s:.1f} s")
        self._client.deactivate()

    def episodes(self, plans: Sequence[EpisodePlan]) -> Iterator[EpisodeRecord]:
        """Runs the episodes with a live status line; one line stays of each."""
        progress = Progress(TextColumn("episodes"), BarColumn(), MofNCompleteColumn())
        bar = progress.add_task("", total=len(plans))
        for plan in plans:
            with Live(console=self._console, refresh_per_second=4, transient=True) as live:

                def show(line: str, live: Live = live) -> None:
                    live.update(Group(progress, Text(line, no_wrap=True)))

                show(f"{plan.task}, seed {plan.seed}")
                episode = self._episode(plan, show)
            self._console.print(_episode_line(episode), highlight=False)
            progress.advance(bar)
            yield episode

    def _episode(self, plan: EpisodePlan, show: Callable[[str], None]) -> EpisodeRecord:
        recorder, client = self._recorder, self._client
        recorder.begin()
        client.place(plan.task, plan.seed)
        if not client.spin(lambda: _is_of(recorder.task, plan), _TAKE_OVER_TIMEOUT_S):
            raise DemoError(f"the twin does not say that it is at {plan.task}, seed {plan.seed}")
        assert recorder.task is not None  # noqa: S101 - just seen
        client.start(recorder.task.prompt)
        if not client.spin(lambda: recorder.taken_over, _TAKE_OVER_TIMEOUT_S):
            self._check_alive()
            why = recorder.control.hold_reason if recorder.control else "no control state"
            raise DemoError(f"the policy does not take the arms: {why}")
        while recorder.simulated_s < plan.limit_s:
            self._executor.spin_once(timeout_sec=0.1)
            self._check_alive()
            show(_status_line(recorder, plan))
            done_s = recorder.done_s
            if done_s is not None and recorder.simulated_s > done_s + LINGER_S:
                break
        recorder.stop()
        client.stop()
        client.deactivate()
        client.spin(lambda: False, _LAST_MESSAGES_S)
        try:
            return recorder.end(plan.limit_s)
        except ValueError as error:
            raise DemoError(str(error)) from None

    def _check_alive(self) -> None:
        for name, process in self._processes.items():
            if process.poll() is not None:
                line = _last_line(self._out / _LOGS[name])
                raise DemoError(f"{name} ended with status {process.returncode}: {line}")


@contextmanager
def _processes(specs: list[NodeSpec], out: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The nodes as processes; each is asked to end by SIGINT, in reverse order, then killed."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for spec in specs:
            with (out / _LOGS[spec.name]).open("wb") as log:
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


def _camera_topics() -> dict[str, str]:
    """Camera to topic, of the robot file that bringup takes."""
    robot = load_robot_config(resource("config/astribot_s1.yaml"))
    return {camera.name: camera.topic for camera in robot.cameras}


def _policy_title(checkpoint: Path) -> str:
    """First heading of the checkpoint's model card; the folder's name without one."""
    card = checkpoint / "README.md"
    if card.exists():
        for line in card.read_text(encoding="utf-8").splitlines():
            if line.startswith("# "):
                return line[2:].strip()
    return checkpoint.name


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "(nothing in its log)"


def _is_of(task: Any, plan: EpisodePlan) -> bool:  # noqa: ANN401 - a generated message
    return task is not None and (task.task, task.seed) == (plan.task, plan.seed)


def _status_line(recorder: RunRecorder, plan: EpisodePlan) -> str:
    control, step, task = recorder.control, recorder.last_step, recorder.task
    line = f"{plan.task} {recorder.simulated_s:4.1f} / {plan.limit_s:.0f} s"
    if task is not None:
        line += f"  progress {task.progress:.0f}"
    if control is not None:
        line += f"  {control.mode_name} {control.rate_hz:.0f} Hz"
        line += f"  period max {control.period_max_ms:.1f} ms  starved {control.starved_ticks}"
    if step is not None:
        line += f"  step {step.query}: {step.step_ms:.0f} ms"
        line += f"  kept {step.kept_tokens}/{step.visual_tokens}"
        line += f"  kappa {step.kappa:.3f}  keyframes {recorder.keyframes}"
    return line


def _episode_line(episode: EpisodeRecord) -> str:
    outcome = f"[yellow]progress {episode.progress:.0f}[/yellow]"
    if episode.success:
        outcome = "[green]success[/green]"
    return f"“{episode.prompt}”, seed {episode.seed}: {outcome} in {episode.seconds:.1f} s"


def _write(
    options: DemoOptions,
    record: RunRecord,
    twin_summary: Path,
    policy: str,
    console: Console,
) -> dict[str, Any]:
    """The summary and the figure."""
    if not twin_summary.exists():
        raise DemoError(f"the twin left no {twin_summary}")
    stamps_ns = json.loads(twin_summary.read_text(encoding="utf-8"))["camera_stamps_ns"]
    frames = camera_frames(record.episodes, stamps_ns)
    root = Path(__file__).resolve().parent.parent
    summary = {"policy": policy, "split": options.split}
    summary |= summarise(record, frames, git_revision(root))
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    title = f"{policy} ({record.checkpoint}), {record.pruner}, {summary['git']}"
    latency_figure(record, options.out / "latency.png", title)
    film = ", rollout.mp4" if options.video else ""
    console.print(f"wrote {options.out}/summary.json, latency.png{film} and the logs")
    return summary


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """The tables a person reads, and one last line."""
    console.print(_episode_table(summary))
    console.print(_figure_table(summary))
    if len(summary["episodes"]) > len(summary["success"]):
        console.print(_success_table(summary))
    done = sum(episode["success"] for episode in summary["episodes"])
    console.print(
        f"{done} of {len(summary['episodes'])} episodes succeeded, {summary['split']} seeds, at "
        f"{summary['real_time_factor']:.2f} x real time; policy: {summary['policy']}",
        highlight=False,
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    return table


def _episode_table(summary: dict[str, Any]) -> Table:
    table = _table(
        "Episodes on the twin", "task", "seed", "result", "progress", "s", "steps", "keyframes"
    )
    for episode in summary["episodes"]:
        table.add_row(
            episode["task"],
            str(episode["seed"]),
            "success" if episode["success"] else "not done",
            f"{episode['progress']:.0f}",
            f"{episode['seconds']:.1f} of {episode['time_limit_s']:.0f}",
            str(episode["policy_steps"]),
            str(episode["keyframes"]),
        )
    return table


def _success_table(summary: dict[str, Any]) -> Table:
    table = _table("Success", "task", "episodes", "rate", "95 % (Wilson)")
    for task, count in summary["success"].items():
        low, high = count["wilson_95"]
        table.add_row(
            task,
            f"{count['successes']} of {count['episodes']}",
            f"{100 * count['successes'] / count['episodes']:.0f} %",
            f"{100 * low:.0f} to {100 * high:.0f} %",
        )
    return table


def _figure_table(summary: dict[str, Any]) -> Table:
    table = _table("Closed loop", "what", "figure", "meaning")
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
        "ticks, ticks, times (the stop at an episode's end is one)",
    )
    table.add_row("largest joint step", f"{summary['max_joint_step_rad']:.4f} rad", "per tick")
    return table


if __name__ == "__main__":
    sys.exit(main())
