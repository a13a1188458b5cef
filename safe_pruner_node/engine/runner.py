"""How the stages of a policy step are run: as they are written, or (`graphs.py`) as replays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import TypeVar

Result = TypeVar("Result")


class Runner(ABC):
    """Runs stages, see `stages.py`, and the pruners' functions, which are stages too.

    It may keep what it learns about their shapes.

    Attributes:
        path: Name of this way, for reports, as in `EngineSettings.path`.
        prompt_bucket: Text tokens per bucket: prompts are padded to a multiple of it, so that those
            of one bucket share what depends on shapes. None: shapes cost nothing, nothing is
            padded.
        notes: What whoever starts an engine may want to know about this way here, a line each.
        capture_ms: Time spent so far on kinds of calls that were new, milliseconds.
    """

    path: str
    prompt_bucket: int | None = None
    notes: tuple[str, ...] = ()
    capture_ms: float = 0.0

    @abstractmethod
    def run(
        self, stage: Callable[..., Result], fixed: tuple[Hashable, ...], *inputs: object
    ) -> Result:
        """Give ``stage(*fixed, *inputs)``.

        Args:
            stage: A function of this call's arguments alone, with no effect but its result; what
                it computes depends on `fixed`, on the shapes of the tensors in `inputs` and on
                their values, and it branches on the first two only.
            fixed: What is the same for every query of a kind: the model, a layer, a schedule.
            inputs: Tensors, or tuples, lists and dataclasses of them; they come from outside
                or are the result of another stage, whole.

        Returns:
            The result, valid until the same stage runs again: who keeps it copies it.
        """


class EagerRunner(Runner):
    """Calls the function: any device, one kernel after the other."""

    path = "eager"

    def run(
        self, stage: Callable[..., Result], fixed: tuple[Hashable, ...], *inputs: object
    ) -> Result:
        """Call it; see `Runner.run`."""
        return stage(*fixed, *inputs)
