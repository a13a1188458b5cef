"""Stages as CUDA graphs: captured once per kind of call, then replayed with one launch.

A small policy is bound by Python and kernel launches, not by the GPU: a replay has neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, Generic

import torch
from torch import Tensor

from safe_pruner_node.engine.runner import Result, Runner
from safe_pruner_node.pruning.unchanging import Unchanging

PROMPT_BUCKET = 32
"""Text tokens per bucket. The state in the prompt moves its length by tens of tokens, so two or
three buckets hold every prompt of a task; the padding is on average 16 rows of several hundred."""

WARM_UP_RUNS = 2
"""Runs before a capture: kernels are loaded and libraries make their workspaces, which a capture
must not do."""


class GraphRunner(Runner):
    """Captures every stage for every kind of call at its first, and replays it from then on.

    A kind is the stage, what is fixed, the shapes of the inputs (number of cameras, prompt bucket,
    K, horizon and so on), and the calls of the same step before it; a call that reads no other
    stage's result begins a step. All kinds are kept as long as this object lives, so methods and
    prompts may alternate at no cost; the first step of a new kind takes a few eager steps' time.

    A stage reads another's result where it is, without a copy. All captures share one memory
    pool, which is safe because a stage is captured after those before it in its step, while their
    results are held: held memory is given to no later capture, so no stage writes over what an
    earlier one of the same step left.

    On a CPU nothing is captured: the function is called on the same fixed buffers, and its result
    is copied over the last one. That is there for tests of what captures rely on.

    Args:
        device: Where the model is.
    """

    path = "graphs"
    prompt_bucket: int | None = PROMPT_BUCKET

    def __init__(self, device: torch.device) -> None:
        self._calls: dict[Hashable, _Call[Any]] = {}
        # Ids of results that `_calls` keeps alive: of each as a whole, and of the tensors in it.
        self._results: set[int] = set()
        self._before: _Call[Any] | None = None  # the call before this one in the step
        self._recorder = _CudaRecorder(device) if device.type == "cuda" else None

    @property
    def captures(self) -> int:
        """Kinds of calls there have been."""
        return len(self._calls)

    def run(
        self, stage: Callable[..., Result], fixed: tuple[Hashable, ...], *inputs: object
    ) -> Result:
        """Replay the stage, or capture it first; see `Runner.run`."""
        leaves = list(_leaves(inputs, self._results))
        before = self._before if any(id(leaf) in self._results for leaf in leaves) else None
        kind = (stage, fixed, tuple(self._kind(leaf) for leaf in leaves), before)
        call: _Call[Result] | None = self._calls.get(kind)
        if call is None:
            started_s = time.perf_counter()
            own = [self._own(leaf) for leaf in leaves]
            rebuilt = _rebuild(inputs, iter(own), self._results)
            function = partial(self._prepared(stage), *fixed, *rebuilt)
            call = _Call(function, own, self._recorder)
            self._calls[kind] = call
            parts = (call.result, *_tensors(call.result))
            self._results.update(id(part) for part in parts if part is not None)
            self.capture_ms += (time.perf_counter() - started_s) * 1e3
        else:
            call(leaves)
        self._before = call
        return call.result

    def _prepared(self, stage: Callable[..., Result]) -> Callable[..., Result]:
        """What is captured in the stage's place."""
        return stage

    def _kind(self, leaf: object) -> Hashable:
        """What a capture depends on: whose result, or which shape and type; or the value."""
        if id(leaf) in self._results:
            return id(leaf)
        return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf

    def _own(self, leaf: object) -> object:
        """A buffer for a tensor from outside; a stage's result is read where it is."""
        if isinstance(leaf, Tensor) and id(leaf) not in self._results:
            return leaf.clone()
        return leaf


class _CudaRecorder:
    """The side stream and the memory pool that all captures of one runner share."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        """The graph of a function and where it writes its result; nothing has been written yet."""
        here = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP_RUNS):
                function()
        here.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may go on using CUDA meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            result = function()
        return graph, result


class _Call(Generic[Result]):
    """One kind of call: fixed buffers in, one fixed result.

    Args:
        function: The stage on its buffers; they and what else it reads live as long as this.
        leaves: The buffers, in the order in which a call brings the values.
        recorder: Captures it; None calls it every time.

    Attributes:
        result: The tensors that every call writes; the first call has been made.
    """

    def __init__(
        self,
        function: Callable[[], Result],
        leaves: list[object],
        recorder: _CudaRecorder | None,
    ) -> None:
        self._function = function
        self._leaves = leaves
        self._there: list[Unchanging | None] = [None] * len(leaves)  # what each buffer is a copy of
        self._graph: torch.cuda.CUDAGraph | None = None
        if recorder is None:
            self.result = function()
        else:
            self._graph, self.result = recorder.record(function)
            self._graph.replay()

    def __call__(self, leaves: list[object]) -> None:
        """Bring the values into the buffers and write the result."""
        for i, (own, value) in enumerate(zip(self._leaves, leaves, strict=True)):
            if not (isinstance(own, Tensor) and isinstance(value, Tensor)) or own is value:
                continue
            if isinstance(value, Unchanging) and value is self._there[i]:
                continue
            own.copy_(value, non_blocking=True)
            self._there[i] = value if isinstance(value, Unchanging) else None
        if self._graph is not None:
            self._graph.replay()
            return
        fresh = _tensors(self._function())
        for own, value in zip(_tensors(self.result), fresh, strict=True):
            own.copy_(value)


def _leaves(value: object, whole: AbstractSet[int] = frozenset()) -> Iterator[object]:
    """What is inside tuples, lists and dataclasses, in order.

    Args:
        value: Anything.
        whole: Ids of what is not looked into: another stage's result is one thing, and a cache of
            all layers is many.
    """
    if id(value) in whole:
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item, whole)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name), whole)
    else:
        yield value


def _tensors(value: object) -> Iterator[Tensor]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, Tensor))


def _rebuild(
    value: Any,  # noqa: ANN401 - any structure
    leaves: Iterator[object],
    whole: AbstractSet[int],
) -> Any:  # noqa: ANN401
    """The same structure around other leaves, as `_leaves` gives them."""
    if id(value) in whole:
        return next(leaves)
    if isinstance(value, tuple | list):
        return type(value)(_rebuild(item, leaves, whole) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _rebuild(getattr(value, f.name), leaves, whole) for f in fields(value)}
        return replace(value, **parts)
    return next(leaves)
