"""What a checkpoint's vectors mean: read from the robot file, used by the layout."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from safe_pruner_node.robot.strict import STRICT


@dataclass(frozen=True, config=STRICT)
class PolicyConfig:
    """How the checkpoint was trained.

    Attributes:
        action_rate_hz: Actions of a chunk per second.
        actions: ``absolute`` joint targets, or ``delta`` from the observed state.
        gripper_open: The checkpoint's number for an open gripper.
        gripper_closed: The checkpoint's number for a closed gripper.
        state_in_prompt: True when the prompt carries the binned state (openpi's
            ``discrete_state_input``).
        camera_order: Camera names in the order of the policy's image inputs.
    """

    action_rate_hz: Annotated[float, Field(gt=0)]
    actions: Literal["absolute", "delta"]
    gripper_open: float
    gripper_closed: float
    state_in_prompt: bool
    camera_order: Annotated[tuple[str, ...], Field(min_length=1)]
