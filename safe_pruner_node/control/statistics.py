"""Counters of the control side, for ``~/control``, ``/diagnostics`` and summaries."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from safe_pruner_node.types import FloatArray


@dataclass
class ControlCounters:
    """What the supervisor counted since it was made or reset.

    Attributes:
        max_joint_step: Largest change of the command in one tick, robot units, [dof].
        ticks: Calls of ``tick``.
        starved_ticks: Ticks in POLICY after the newest chunk had ended.
        clamped_ticks: Ticks in POLICY whose target had to be altered to obey the limits.
        holds: Times POLICY ended in HOLD or ESTOP.
        accepted_chunks: Chunks that were played.
        dropped_chunks: Chunks refused for whatever reason.
        dropped_states: Measured states that were not finite or of the wrong size.
        solver_errors: Ticks in which the tracker's solver failed and the joints braked.
        worker_downtime_s: Time without a policy worker after it was lost, seconds.
    """

    max_joint_step: FloatArray
    ticks: int = 0
    starved_ticks: int = 0
    clamped_ticks: int = 0
    holds: int = 0
    accepted_chunks: int = 0
    dropped_chunks: int = 0
    dropped_states: int = 0
    solver_errors: int = 0
    worker_downtime_s: float = 0.0

    @classmethod
    def zero(cls, dof: int) -> ControlCounters:
        """Counters at the beginning."""
        return cls(max_joint_step=np.zeros(dof))

    def copy(self) -> ControlCounters:
        """These counters as they are now."""
        return replace(self, max_joint_step=self.max_joint_step.copy())
