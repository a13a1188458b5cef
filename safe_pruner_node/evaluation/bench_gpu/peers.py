"""Programs that time another implementation of π0.5 beside ours, in the same run.

A peer is a Python file outside this repository. It runs in a process of its own, is told on its
command line what to time, and writes a small JSON file; docs/performance.md has the contract.
Whatever goes wrong in it is said in the report, and is no fault of the run.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.bench_gpu.gpu_timing import percentiles
from safe_pruner_node.evaluation.bench_gpu.latency import STEPS, STEPS_S
from safe_pruner_node.evaluation.bench_gpu.queries import Shape
from safe_pruner_node.evaluation.bench_gpu.section import (
    CUT,
    DONE,
    LINE_MAX,
    SKIPPED,
    Result,
    fewer_steps,
)

SECTION = "peer"
"""The section that a peer's result is filed under, with the peer's name as its path."""
PEER_S = 180.0
"""A peer that loads, compiles and times for longer is ended."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Peer:
    """A program to time.

    Attributes:
        name: What its rows are called.
        program: A Python file.
    """

    name: str
    program: Path


@dataclass(frozen=True)
class Answer:
    """What a peer wrote.

    Attributes:
        version: Of the code that it timed: a release or a commit.
        covers: What one of its times begins and ends with.
        wall_ms: Each timed step.
    """

    version: str
    covers: str
    wall_ms: tuple[float, ...]


def parse_peer(text: str) -> Peer:
    """Read ``NAME=FILE``.

    Raises:
        ConfigError: It is something else, or there is no such file.
    """
    name, _, file = text.partition("=")
    if not _NAME.fullmatch(name) or not file:
        expected = "NAME=FILE, the name of letters, digits, '.', '_', '+' and '-'"
        raise ConfigError("parameter", "peer", repr(text), expected)
    if not Path(file).is_file():
        raise ConfigError("parameter", "peer", file, "a Python file")
    return Peer(name, Path(file).absolute())


def run_peer(
    peer: Peer,
    shape: Shape,
    flow_steps: int,
    device: str,
    out: Path,
    limit_s: float,
    *,
    quick: bool,
) -> Result:
    """Run a peer and read its answer.

    Args:
        peer: The program.
        shape: What it is to time.
        flow_steps: Likewise.
        device: ``cuda`` or ``cpu``.
        out: Folder for ``peer-NAME.log``, what it printed, and ``peer-NAME.answer``.
        limit_s: It is ended after these.
        quick: As in `Bench`.

    Returns:
        `DONE` with its figures; `CUT` when it ran out of time, `SKIPPED` when it broke.
    """
    answer, log = (out / f"{SECTION}-{peer.name}.{suffix}" for suffix in ("answer", "log"))
    request = {
        "cameras": shape.cameras,
        "prompt-tokens": shape.prompt,
        "horizon": shape.horizon,
        "flow-steps": flow_steps,
        "steps": fewer_steps(STEPS) if quick else STEPS,
        "seconds": STEPS_S,
        "device": device,
        "out": answer.absolute(),
    }
    arguments = [text for key, value in request.items() for text in (f"--{key}", str(value))]
    status = _run([sys.executable, str(peer.program), *arguments], log, limit_s)
    if status is None:
        return Result(SECTION, peer.name, CUT, f"ended after {limit_s:.0f} s", {})
    if status != 0:
        note = f"ended with {status}: {_last_line(log)}"
        return Result(SECTION, peer.name, SKIPPED, note, {})
    try:
        found = read_answer(answer)
    except ConfigError as error:
        return Result(SECTION, peer.name, SKIPPED, str(error), {})
    return Result(SECTION, peer.name, DONE, "", _figures(found))


def _run(command: list[str], log: Path, limit_s: float) -> int | None:
    """Exit status; None when it was ended. Compilers that it started end with it."""
    with log.open("wb") as file:
        process = subprocess.Popen(  # noqa: S603 - the file that the caller named
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also on Ctrl-C
            _end_group(process.pid)
            process.wait()


def _end_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:  # nobody of it is left
        return


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return last[:LINE_MAX]


def read_answer(path: Path) -> Answer:
    """Read what a peer wrote.

    Raises:
        ConfigError: There is no such file, or it is not as the contract says.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(path, "", error.strerror, "the peer's answer") from None
    except ValueError as error:
        raise ConfigError(path, "", error, "JSON") from None
    if not isinstance(data, dict):
        raise ConfigError(path, "", type(data).__name__, "an object")
    for key in ("version", "covers"):
        if not isinstance(data.get(key), str) or not data[key].strip():
            raise ConfigError(path, key, repr(data.get(key)), "a text")
    times = data.get("wall_ms")
    if not isinstance(times, list) or not times:
        raise ConfigError(path, "wall_ms", repr(times), "a list of milliseconds")
    for number, value in enumerate(times):
        if not _is_time(value):
            raise ConfigError(path, f"wall_ms[{number}]", repr(value), "milliseconds above 0")
    return Answer(_one_line(data["version"]), _one_line(data["covers"]), tuple(map(float, times)))


def _is_time(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < float(value) < math.inf  # type: ignore[arg-type]  # a number


def _one_line(text: str) -> str:
    return " ".join(text.split())[:LINE_MAX]


def _figures(answer: Answer) -> dict[str, Any]:
    return {
        "version": answer.version,
        "covers": answer.covers,
        "steps": len(answer.wall_ms),
        "wall_ms": percentiles(np.array(answer.wall_ms)),
    }
