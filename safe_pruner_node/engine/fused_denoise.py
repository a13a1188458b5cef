"""The flow in the kernels that fit a call: the resident one where it can, else Triton's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from safe_pruner_node.engine.cuda.expert_flow import MOST_KEYS, MOST_ROWS
from safe_pruner_node.engine.flow import DeepSettings, FlowProbe, FlowSchedule
from safe_pruner_node.engine.fused_flow import FusedFlow
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.engine.resident_flow import ResidentFlow, fits, unsupported
from safe_pruner_node.pi05.model import KeyValue, Pi05


class FusedDenoise:
    """Denoises chunks of one model.

    Args:
        model: The policy; its expert's projections become views of packed ones.

    Attributes:
        note: Which kernels the flow runs in here, and why not in the fastest.
    """

    def __init__(self, model: Pi05) -> None:
        self._by_steps = FusedFlow(model)
        reason = unsupported(model)
        self._resident = ResidentFlow(model) if reason is None else None
        self.note = f"flow: one resident kernel, up to {MOST_ROWS} actions and {MOST_KEYS} keys"
        if reason is not None:
            self.note = f"flow: Triton's kernels; no resident kernel: {reason}"

    def __call__(
        self,
        schedule: FlowSchedule,
        n_visual: int,
        deep: DeepSettings | None,
        cache: Sequence[KeyValue],
        noise: Tensor,
        probed: FlowProbe | None,
        prompt: Prompt,
    ) -> tuple[Tensor, Tensor | None]:
        """Integrate the flow; arguments and results are those of `stages.denoise`."""
        flow: ResidentFlow | FusedFlow = self._by_steps
        if self._resident is not None and fits(deep, cache, noise.shape[1]):
            flow = self._resident
        return flow.denoise(schedule, n_visual, deep, cache, noise, probed, prompt)
