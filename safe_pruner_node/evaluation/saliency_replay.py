"""SAFE's memory replayed over a recorded episode: matching, kappa, keyframes, forecasts.

The same functions as in operation, on the maps of the full-token episode. What a pruned step would
have done to later scenes is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safe_pruner_node.evaluation.saliency_record import SaliencyRecord
from safe_pruner_node.pruning.forecast import deep_forecast, kappa, transfer
from safe_pruner_node.pruning.matching import match, unit_rows
from safe_pruner_node.pruning.settings import PrunerSettings
from safe_pruner_node.types import FloatArray


@dataclass(frozen=True)
class KeyframeTrace:
    """Which queries were keyframes.

    Attributes:
        kappa: Eq. 6 against the reference before the decision; NaN at the first query, [Q].
        keyframe: True where the reference is renewed, [Q].
        reference: The query whose maps are in force: of a keyframe, its own, [Q].
    """

    kappa: FloatArray
    keyframe: NDArray[np.bool_]
    reference: NDArray[np.int64]

    @property
    def rate(self) -> float:
        """Keyframes per query, the first included."""
        return float(self.keyframe.mean())


class Replay:
    """One episode under one pruner's settings.

    Args:
        record: The episode.
        settings: Deep set, matching, early mode, gamma.
    """

    def __init__(self, record: SaliencyRecord, settings: PrunerSettings) -> None:
        settings.check_depth(record.deep.shape[1])
        self.record = record
        self.settings = settings
        self.cameras = tuple(record.camera_slices.values())
        self.early = {name: torch.from_numpy(maps) for name, maps in record.early.items()}
        self.layers = torch.from_numpy(record.deep)  # [Q, L, N]
        self._set = list(settings.deep_layers(record.deep.shape[1]))
        self.deep = self.layers[:, self._set].mean(1)  # [Q, N]
        self._z_hat = [unit_rows(torch.from_numpy(z)) for z in record.z_hat]
        self._pi: dict[tuple[int, int, bool], Tensor] = {}

    def __len__(self) -> int:
        return self.record.queries

    @property
    def n_visual(self) -> int:
        """N_vis."""
        return int(self.deep.shape[1])

    def pi(self, reference: int, current: int, *, within: bool | None = None) -> Tensor:
        """Reference token of every current token; `within` overrides the settings' camera rule."""
        within = self.settings.match_within_camera if within is None else within
        key = (reference, current, within)
        if key not in self._pi:
            cameras = self.cameras if within else None
            self._pi[key] = match(self._z_hat[current], self._z_hat[reference], cameras)
        return self._pi[key]

    def pi_from(self, other: Replay, reference: int, current: int) -> Tensor:
        """The same with a reference from another episode."""
        cameras = self.cameras if self.settings.match_within_camera else None
        return match(self._z_hat[current], other._z_hat[reference], cameras)

    def forecast(self, reference: int, current: int, *, within: bool | None = None) -> Tensor:
        """Deep saliency of the current query forecast from a reference (Eq. 4), [N]."""
        pi = self.pi(reference, current, within=within)
        return deep_forecast(self.layers[reference, self._set], pi)

    def kappa(self, reference: int, current: int, mode: str) -> float:
        """Eq. 6 with an early mode."""
        early = self.early[mode]
        pi = self.pi(reference, current)
        return float(kappa(early[current], transfer(early[reference], pi)))

    def keyframes(self, gamma: float | None = None, mode: str | None = None) -> KeyframeTrace:
        """Decide query by query as SAFE does.

        Args:
            gamma: Threshold; None takes the settings'.
            mode: Early mode; None takes the settings'.
        """
        settings = self.settings
        gamma = settings.gamma if gamma is None else gamma
        mode = settings.query_rows if mode is None else mode
        kappas, reference, last = [float("nan")], [0], 0
        for query in range(1, len(self)):
            value = self.kappa(last, query, mode)
            renew = not value >= gamma
            if settings.division == "fixed":
                renew = query - last >= settings.interval
            if settings.max_age is not None:
                renew = renew or query - last >= settings.max_age
            last = query if renew else last
            kappas.append(value)
            reference.append(last)
        references = np.array(reference)
        return KeyframeTrace(np.array(kappas), references == np.arange(len(self)), references)


def keyframe_rate(replays: Sequence[Replay], gamma: float, mode: str | None = None) -> float:
    """Keyframes per query over several episodes, the first query of each left out: it always is."""
    traces = [replay.keyframes(gamma, mode) for replay in replays]
    keyframes = sum(int(trace.keyframe[1:].sum()) for trace in traces)
    return keyframes / max(sum(len(replay) - 1 for replay in replays), 1)


def gamma_for_rate(replays: Sequence[Replay], target: float, mode: str | None = None) -> float:
    """The threshold at which so many queries after the first are keyframes; halving, to 1e-5."""
    low, high = -1.0, 1.0
    while high - low > 1e-5:
        gamma = (low + high) / 2
        if keyframe_rate(replays, gamma, mode) < target:
            low = gamma
        else:
            high = gamma
    return round((low + high) / 2, 5)
