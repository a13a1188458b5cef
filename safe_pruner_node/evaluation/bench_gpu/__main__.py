"""Command line of ``make bench-gpu``.

    python -m safe_pruner_node.evaluation.bench_gpu [--minutes 9] [--quick] ...

First whether every path of the engine computes what fp32 eager does, then what it costs: stage
by stage, against ceilings measured in the same run, over rho, and end to end through the node's
own worker. See docs/performance.md.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from safe_pruner_node.engine.build import choose_device
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.bench_gpu.bars import is_right
from safe_pruner_node.evaluation.bench_gpu.figures import draw
from safe_pruner_node.evaluation.bench_gpu.findings import Findings
from safe_pruner_node.evaluation.bench_gpu.policy import SIZES
from safe_pruner_node.evaluation.bench_gpu.report import markdown, print_report
from safe_pruner_node.evaluation.bench_gpu.section import read_results
from safe_pruner_node.evaluation.bench_gpu.tasks import ALL_PATHS, Run, make_console, run_tasks
from safe_pruner_node.evaluation.run_record import git_revision

REPORT_S = 15.0
"""Kept of the time for tables and figures."""


@dataclass(frozen=True)
class BenchGpuOptions:
    """Checks and times every path of the engine on a policy with random weights."""

    out: Path = Path("runs/bench-gpu")
    """Where the JSON of every section, report.md and the figures go, instead of the last run's."""
    minutes: float = 9.0
    """Time for all of it; the least important sections are left out when it is over."""
    quick: bool = False
    """A twentieth of the steps, half of the seeds: to see that everything runs."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA where there is one."""
    paths: tuple[str, ...] = ALL_PATHS
    """Paths of the engine; one that cannot run here is left out with a line."""
    size: Literal["full", "small"] = "full"
    """small is for tests on a CPU."""

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ConfigError("parameter", "minutes", self.minutes, "above 0")
        for path in self.paths:
            if path not in ALL_PATHS:
                expected = "one of " + ", ".join(ALL_PATHS)
                raise ConfigError("parameter", "paths", path, expected)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 when a section failed or a path is wrong."""
    console = make_console()
    try:
        options = tyro.cli(BenchGpuOptions, args=arguments)
        device = _device(options)
        _clear(options.out)
    except ConfigError as error:
        console.print(f"[red]bench-gpu failed:[/red] {error}")
        return 1
    end_s = time.time() + 60 * options.minutes - REPORT_S
    run = Run(options.paths, options.size, device.type, options.out, end_s, options.quick)
    interrupted = False
    try:
        run_tasks(run, console)
    except KeyboardInterrupt:
        interrupted = True
        console.print("interrupted: what there is so far")
    findings = Findings(_about(options, device), SIZES[options.size], read_results(options.out))
    write_report(findings, options.out, console)
    return 0 if is_right(findings) and not interrupted else 1


def write_report(findings: Findings, out: Path, console: Console) -> None:
    """Print the tables; write report.md, about.json and the figures.

    Args:
        findings: The run.
        out: Folder to write to.
        console: Where to print.
    """
    print_report(findings, console)
    (out / "about.json").write_text(json.dumps(dict(findings.about), indent=1) + "\n")
    (out / "report.md").write_text(markdown(findings), encoding="utf-8")
    files = [out / "report.md", *draw(findings, out)]
    console.print("written: " + ", ".join(map(str, files)), highlight=False)


def _device(options: BenchGpuOptions) -> torch.device:
    device = choose_device(options.device)
    if options.size == "full" and device.type == "cpu":
        expected = "a CUDA build of torch and a GPU; to try the command out, --size small"
        raise ConfigError("parameter", "device", "a CPU for a full-size policy", expected)
    return device


def _clear(out: Path) -> None:
    """Make the folder, without another run's results: they would look like this one's."""
    out.mkdir(parents=True, exist_ok=True)
    for pattern in ("*-*.json", "*.partial", "*.npz", "about.json", "report.md", "*.png"):
        for file in out.glob(pattern):
            file.unlink()


def _about(options: BenchGpuOptions, device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "date": date.today().isoformat(),  # noqa: DTZ011 - the day where the machine is
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "model": options.size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": _version("triton"),
        "torchvision": _version("torchvision"),
        "python": platform.python_version(),
        "git": git_revision(Path(__file__).parent),
        "minutes": options.minutes,
        "quick": options.quick,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    sys.exit(main())
