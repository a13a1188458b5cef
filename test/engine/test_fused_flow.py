"""The flow's kernels, in Triton's interpreter, are the plain flow."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

import triton_interpreter  # noqa: F401
from fused_flow_checks import (
    SMALL,
    SMALL_TILES,
    UNSPLIT_TILES,
    off,
    plain,
    random_cache,
    random_expert,
)

from safe_pruner_node.engine.flow import DeepSettings, FlowSchedule
from safe_pruner_node.engine.fused_flow import FusedFlow
from safe_pruner_node.engine.prompt import Prompt

N_VISUAL, SLOTS = 32, 8


@pytest.mark.parametrize("tiles", [SMALL_TILES, UNSPLIT_TILES], ids=["split", "unsplit"])
@pytest.mark.parametrize("n_text", [8, 3])
@pytest.mark.parametrize(
    "deep",
    [
        None,
        DeepSettings((0, 1), N_VISUAL, "visual", "mean"),
        DeepSettings((1,), N_VISUAL, "all", "last"),
    ],
)
def test_fused_flow_is_the_plain_one(n_text, deep, tiles):
    model = random_expert(SMALL)
    schedule = FlowSchedule(model, 2)
    kept = N_VISUAL if deep else 11
    cache = random_cache(SMALL, [N_VISUAL + SLOTS, kept + SLOTS])
    for pair in cache:
        for tensor in pair:
            tensor[:, :, tensor.shape[2] - (SLOTS - n_text) :] = 1e4  # padding: nobody may read it
    noise = torch.randn(1, SMALL.horizon, SMALL.action_dim)
    expected, saliency = plain(model, schedule, N_VISUAL, deep, cache, noise, n_text, SLOTS)
    tokens = torch.zeros(1, SLOTS, dtype=torch.long)
    prompt = Prompt(tokens, None if n_text == SLOTS else torch.tensor(n_text))
    flow = FusedFlow(model, tiles)
    actions, seen = flow.denoise(schedule, N_VISUAL, deep, cache, noise, None, prompt)
    assert off(actions, expected) < 1e-5
    if deep is not None:
        assert off(seen, saliency) < 1e-5
    again, _ = plain(model, schedule, N_VISUAL, deep, cache, noise, n_text, SLOTS)
    assert torch.equal(again, expected)  # the packed weights are still the model's
