"""SAFE-Pruner: early saliency fused with late saliency forecast from a keyframe.

Paper, sections 3.3 and 3.4, algorithms 1 and 2. t counts policy queries. Two banks are kept
apart: the prefill saliency at layer ls is only ever compared with itself (kappa), the action
expert's saliency at the deep layers is only ever fused.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from safe_pruner_node.pruning.base import Context, Decision, EarlyView, Pruner, Scene
from safe_pruner_node.pruning.forecast import deep_forecast, fuse, kappa, transfer
from safe_pruner_node.pruning.matching import match, unit_rows
from safe_pruner_node.pruning.saliency import visual_saliency
from safe_pruner_node.pruning.selection import top_k_with_floors
from safe_pruner_node.pruning.settings import PrunerSettings

_NAN = float("nan")


@dataclass(frozen=True)
class Reference:
    """What a keyframe leaves for the steps after it.

    Attributes:
        context: What it was taken for.
        query: Policy query at which it was taken.
        z_hat: Unit rows of the projector outputs, fp32, [N_vis, D].
        early: Prefill saliency at layer ls, [N_vis].
        deep: Action-to-visual saliency at the deep layers, [n_deep, N_vis]; None if unused.
    """

    context: Context
    query: int
    z_hat: Tensor
    early: Tensor
    deep: Tensor | None


class SafePruner(Pruner):
    """Keyframe cache of one session, and the decisions made with it."""

    def __init__(self, settings: PrunerSettings, depth: int) -> None:
        super().__init__(settings, depth)
        self.reset()

    def reset(self) -> None:
        """Forget the episode: the next step is a keyframe."""
        self.reference: Reference | None = None
        self._query = 0
        self._z_hat: Tensor | None = None
        self._early: Tensor | None = None
        self._pi: Tensor | None = None

    def begin(self, scene: Scene) -> None:
        """Match the tokens with those of the keyframe, if that still is one for this scene."""
        super().begin(scene)
        self._z_hat = unit_rows(scene.z)
        self._pi = None
        if self.reference is not None and self.reference.context == scene.context:
            cameras = scene.context.camera_slices if self.settings.match_within_camera else None
            self._pi = match(self._z_hat, self.reference.z_hat, cameras)

    def decide(self, early: EarlyView) -> Decision:
        """Algorithm 1, lines 9 to 20; the read-back of kappa is the step's only one."""
        settings, scene = self.settings, early.scene
        n_visual = len(scene.z)
        self._early = visual_saliency(early.query, early.keys, n_visual, settings.softmax_over)
        reference, pi = self.reference, self._pi
        if reference is None:
            return self._keyframe("first")
        if pi is None:
            return self._keyframe(reference.context.difference(scene.context))
        value = float(kappa(self._early, transfer(reference.early, pi)))
        if reason := self._renewal(value, self._query - reference.query):
            return self._keyframe(reason, value)
        scores = self._early
        if reference.deep is not None:
            scores = fuse(scores, deep_forecast(reference.deep, pi), settings.lambda_)
        keep = top_k_with_floors(
            scores, settings.kept(n_visual), scene.context.camera_slices, settings.camera_floor
        )
        self._query += 1
        return Decision(keep=keep, kappa=value)

    def observe(self, early: EarlyView, deep: Tensor | None) -> None:
        """Keep this keyframe as the reference."""
        if self._z_hat is None or self._early is None:
            raise RuntimeError("observe() belongs after begin() and decide() of the same step")
        # Copies: an engine may reuse the memory of what it shows.
        self.reference = Reference(
            context=early.scene.context,
            query=self._query,
            z_hat=self._z_hat.clone(),
            early=self._early.clone(),
            deep=None if deep is None else deep.clone(),
        )
        self._query += 1

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
