"""SAFE-Pruner: early saliency fused with late saliency forecast from a keyframe.

Paper, sections 3.3 and 3.4, algorithms 1 and 2. t counts policy queries. Two banks are kept
apart: the prefill saliency at layer ls is only ever compared with itself (kappa), the action
expert's saliency at the deep layers is only ever fused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from safe_pruner_node.pruning.base import Context, Decision, EarlyView, Pruner, Run, Scene, call
from safe_pruner_node.pruning.judgement import judge
from safe_pruner_node.pruning.matching import correspond
from safe_pruner_node.pruning.settings import PrunerSettings
from safe_pruner_node.pruning.unchanging import snapshot

_NAN = float("nan")


@dataclass(frozen=True)
class Reference:
    """What a keyframe leaves for the steps after it.

    Attributes:
        context: What it was taken for.
        query: Policy query at which it was taken.
        z: Projector outputs, in their own type, [N_vis, D].
        early: Prefill saliency at layer ls, [N_vis].
        deep: Action-to-visual saliency at the deep layers, [n_deep, N_vis]; None if unused.
    """

    context: Context
    query: int
    z: Tensor
    early: Tensor
    deep: Tensor | None


@dataclass(frozen=True)
class _Shown:
    """The step so far: `reference` is what it is compared with, `stale` why that is no use."""

    reference: Reference
    stale: str
    pi: Tensor
    early: Tensor | None = None


class SafePruner(Pruner):
    """Keyframe cache of one session, and the decisions made with it.

    Every step runs the same functions, the first one against a blank reference: so what an engine
    captures of one step serves them all.
    """

    def __init__(self, settings: PrunerSettings, depth: int, run: Run = call) -> None:
        super().__init__(settings, depth, run)
        self.reset()

    def reset(self) -> None:
        """Forget the episode: the next step is a keyframe."""
        self.reference: Reference | None = None
        self._query = 0
        self._shown: _Shown | None = None

    def begin(self, scene: Scene) -> None:
        """Match the tokens with those of the keyframe, if that still is one for this scene."""
        super().begin(scene)
        reference, stale = self.reference, "first"
        if reference is not None:
            stale = reference.context.difference(scene.context)
        if reference is None or stale:
            reference = self._blank(scene)
        cameras = scene.context.tokens if self.settings.match_within_camera else None
        pi = self._run(correspond, (cameras,), scene.z, reference.z)
        self._shown = _Shown(reference, stale, pi)

    def decide(self, early: EarlyView) -> Decision:
        """Algorithm 1, lines 9 to 20; the read-back of kappa is the step's only one."""
        shown = self._now()
        reference = shown.reference
        judgement = self._run(
            judge,
            (self._vote(early), self._selection(early.scene), self.settings.lambda_),
            early.query,
            early.keys,
            early.n_text,
            shown.pi,
            reference.early,
            reference.deep,
        )
        self._shown = replace(shown, early=judgement.early)
        if shown.stale:
            return self._keyframe(shown.stale)
        value = float(judgement.kappa)
        if reason := self._renewal(value, self._query - reference.query):
            return self._keyframe(reason, value)
        self._query += 1
        return Decision(keep=judgement.keep, kappa=value)

    def observe(self, early: EarlyView, deep: Tensor | None) -> None:
        """Keep this keyframe as the reference."""
        shown = self._now()
        if shown.early is None:
            raise RuntimeError("observe() belongs after decide() of the same step")
        # Copies: what was shown or computed may be memory that the next step writes again.
        self.reference = Reference(
            context=early.scene.context,
            query=self._query,
            z=snapshot(early.scene.z),
            early=snapshot(shown.early),
            deep=None if deep is None else snapshot(deep),
        )
        self._query += 1

    def _now(self) -> _Shown:
        if self._shown is None:
            raise RuntimeError("begin() opens a step")
        return self._shown

    def _blank(self, scene: Scene) -> Reference:
        """Something of the right shapes to compare with, of which nothing will be used."""
        n = len(scene.z)
        zeros = partial(torch.zeros, dtype=torch.float32, device=scene.z.device)
        deep = zeros(len(self.deep_layers), n) if self.settings.lambda_ > 0.0 else None
        return Reference(scene.context, self._query, torch.zeros_like(scene.z), zeros(n), deep)

    def _renewal(self, value: float, age: int) -> str:
        """Why the reference has to be renewed, empty when it need not be."""
        settings = self.settings
        if settings.max_age is not None and age >= settings.max_age:
            return "age"
        if settings.division == "fixed":
            return "interval" if age >= settings.interval else ""
        # Written so that a NaN (a model gone wrong) renews too.
        return "" if value >= settings.gamma else "kappa"

    def _keyframe(self, reason: str, value: float = _NAN) -> Decision:
        return Decision(
            keyframe=True, reason=reason, kappa=value, capture_deep=self.settings.lambda_ > 0.0
        )
