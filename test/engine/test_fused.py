"""Which models and GPUs get the fused kernels, and whole sessions in them."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

import triton_interpreter  # noqa: F401
from cuda_graph_checks import METHODS
from fused_flow_checks import SMALL as SMALL_FLOW
from fused_flow_checks import plain, random_cache, random_expert
from fused_prefix_checks import random_policy
from small_policy import SMALL, Frames

from safe_pruner_node.engine.flow import FlowSchedule
from safe_pruner_node.engine.fused import FusedRunner, unsupported
from safe_pruner_node.engine.fused_denoise import FusedDenoise
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.engine.session import PolicySession
from safe_pruner_node.pi05.config import PI05

POLICY = replace(
    SMALL,
    vlm=replace(SMALL.vlm, depth=4, head_dim=32),
    expert=replace(SMALL.expert, width=32, mlp=64, depth=4, head_dim=32),
    flow_steps=2,
)

LONG_HEADS = replace(
    PI05,
    vlm=replace(PI05.vlm, head_dim=512),
    expert=replace(PI05.expert, head_dim=512),
)


@pytest.mark.parametrize(
    ("kib", "change", "why"),
    [
        (227, {}, None),
        (163, {}, "163 KiB"),  # A100
        (99, {}, "99 KiB"),  # RTX 4090
        (227, {"dtype": torch.float32}, "float32"),
        (227, {"device": torch.device("cpu")}, "device cpu"),
        (227, {"config": replace(PI05, expert=replace(PI05.expert, width=1000))}, "width 1000"),
        (227, {"config": LONG_HEADS}, "head_dim 512"),
    ],
)
def test_what_the_kernels_are_for(monkeypatch, kib, change, why):
    gpu = SimpleNamespace(name="a GPU", shared_memory_per_block_optin=kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    fits = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "config": PI05}
    reason = unsupported(SimpleNamespace(**fits | change))
    assert reason is None if why is None else why in reason


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU this is what make bench-gpu does"
)
def test_sessions_are_the_eager_ones():
    model, frames = random_policy(POLICY, "cpu", lambda _: torch.float32), Frames(3)
    ours = PolicySession(model, METHODS["safe"], runner=FusedRunner(model))
    theirs = PolicySession(model, METHODS["safe"])
    for method, queries in (("vanilla", 1), ("safe", 3)):
        ours.set_pruner(METHODS[method])
        theirs.set_pruner(METHODS[method])
        kept = []
        for t in range(queries):
            a, b = frames.step(ours, t), frames.step(theirs, t)
            torch.testing.assert_close(a.actions, b.actions, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(a.decision.keep, b.decision.keep)
            kept.append(a.decision.keep)
    assert kept[0] is None  # a keyframe, then pruned steps on what it left
    assert not torch.equal(kept[1], kept[2])


def test_a_model_that_our_own_kernels_are_not_for_says_so():
    model = random_policy(POLICY, "cpu", lambda _: torch.float32)
    products, flow = FusedRunner(model).notes
    assert "cuBLAS" in products
    assert "no SM 9.0 GPU" in products
    assert "Triton" in flow
    assert "device cpu" in flow


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU this is what make bench-gpu does"
)
@pytest.mark.parametrize(("horizon", "resident"), [(4, True), (65, False)])
def test_a_call_goes_to_the_resident_kernel_only_where_it_fits(monkeypatch, horizon, resident):
    model = random_expert(replace(SMALL_FLOW, horizon=horizon))
    denoise = FusedDenoise(model)

    def refuse(*_):
        raise RuntimeError("a GPU")

    monkeypatch.setattr(denoise, "_resident", SimpleNamespace(denoise=refuse))
    schedule, cache = FlowSchedule(model, 1), random_cache(model.config, [40, 40])
    noise = torch.randn(1, horizon, model.config.action_dim)
    prompt = Prompt(torch.zeros(1, 8, dtype=torch.long))
    if resident:
        with pytest.raises(RuntimeError, match="a GPU"):
            denoise(schedule, 32, None, cache, noise, None, prompt)
        return
    actions, _ = denoise(schedule, 32, None, cache, noise, None, prompt)
    expected, _ = plain(model, schedule, 32, None, cache, noise, 8, 8)
    torch.testing.assert_close(actions, expected, rtol=1e-4, atol=1e-4)
