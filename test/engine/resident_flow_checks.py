"""The flow in one launch against the plain one, and its time: needs a GPU of SM 9.0, and no pytest.

python test/engine/resident_flow_checks.py
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fused_flow_checks import (
    bf16_copy,
    compare,
    expert_of_pi05,
    kernels,
    off,
    random_cache,
    random_expert,
)
from graph_time import captured, replays_ms
from image_reference import images_of, prefixes

from safe_pruner_node.engine.cuda import expert_flow
from safe_pruner_node.engine.cuda.available import ARCH
from safe_pruner_node.engine.cuda.source import read_source
from safe_pruner_node.engine.flow import DeepSettings, FlowSchedule
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.engine.resident_flow import ResidentFlow, fits, unsupported
from safe_pruner_node.engine.resident_images import point_prefix

BAR = 1.5
"""Error against fp32 that is allowed, in those of the plain flow in bf16."""


def supported_flow(model):
    assert unsupported(model) is None
    return ResidentFlow(model)


def check(device="cuda"):
    """Compare with fp32, beside plain bf16; also that the same call gives the same bits."""
    for seed, horizon, n_text, slots, pruned, steps, deep in (
        (0, 50, 120, 128, False, 10, DeepSettings((0, 16, 17), 768, "visual", "mean")),
        (1, 50, 128, 128, True, 10, None),
        (2, 10, 37, 64, True, 10, None),
        (3, 64, 200, 224, False, 4, DeepSettings((9, 2), 768, "all", "last")),
    ):
        keys = torch.empty(1, 1, 768 + slots, 256)
        assert fits(deep, [(keys, keys)], horizon)
        (a, b, c, again), (s, t, u) = compare(
            supported_flow,
            seed,
            horizon,
            n_text,
            slots,
            pruned=pruned,
            deep=deep,
            steps=steps,
            device=device,
        )
        if deep is not None:
            assert off(u, s) <= BAR * off(t, s)
        assert off(c, a) <= BAR * off(b, a)
        assert torch.equal(c, again)


def check_prepare(horizon=50, device="cuda"):
    """Compare the prefix's images, bit by bit, and that all else is zero and nothing beyond it."""
    from safe_pruner_node.engine.cuda.compile import CudaKernel

    cache = prefixes(device)
    lengths = [keys.shape[2] for keys, _ in cache]
    flow = expert_flow.Flow()
    *_, images = point_prefix(flow, cache, horizon)
    images.fill_(float("nan"))
    zeros, behind = torch.ones(2, 1 << 23, dtype=torch.uint8, device=device).unbind()
    flow.zeros, flow.n_zeros = zeros.data_ptr(), len(zeros) // expert_flow.WORD
    defines = expert_flow.defines(10, horizon, 32)
    source = read_source(expert_flow.SOURCE)
    kernel = CudaKernel(source, expert_flow.PREPARE, ARCH, defines, 0)
    kernel.launch(expert_flow.preparing(lengths, horizon), expert_flow.THREADS, flow)
    assert torch.equal(images, images_of(cache, horizon))
    assert not zeros.any()
    assert behind.all()
    print("the prefix is laid out, and all else is zero", flush=True)


def flow_graph(policy, pruned=False, deep=False, horizon=50, slots=128):
    """Ten steps as a function, and the CUDA graph of them with its results."""
    late = 192 if pruned else 768
    lengths = [768 + slots] * 3 + [late + slots] * 15
    cache = random_cache(policy.config, lengths, "cuda", torch.bfloat16)
    noise = torch.randn(1, horizon, 32, device="cuda")
    tokens = torch.zeros(1, slots, dtype=torch.long, device="cuda")
    prompt = Prompt(tokens, torch.tensor(slots - 8, device="cuda"))
    watch = DeepSettings((16, 0, 17), 768, "visual", "mean") if deep else None
    flow, schedule = ResidentFlow(policy), FlowSchedule(policy, 10)

    @torch.inference_mode()
    def run():
        return flow.denoise(schedule, 768, watch, cache, noise, None, prompt)

    graph, (kept,) = captured([run])
    return run, graph, kept


@torch.inference_mode()
def check_replays(policy):
    """Every replay of a keyframe's graph gives the same bits as a call without one."""
    run, graph, kept = flow_graph(policy, deep=True)
    expected = run()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        for found, should in zip(kept, expected, strict=True):
            assert torch.equal(found, should)
            found.fill_(float("nan"))
    print("replays are the same bits", flush=True)


def milliseconds(policy, n=50, **which):
    """Median and 99th percentile of replays of ten steps."""
    _run, graph, _kept = flow_graph(policy, **which)
    times = sorted(replays_ms(graph, n))
    return times[n // 2], times[int(n * 0.99)]


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    check_prepare()
    check()
    policy = bf16_copy(random_expert(expert_of_pi05(), "cuda"))
    check_replays(policy)
    for which in ({}, {"pruned": True}, {"deep": True}, {"horizon": 10}):
        p50, p99 = milliseconds(policy, **which)
        print(which, f"p50 {p50:.3f} p99 {p99:.3f} ms", flush=True)
    for which in ({"pruned": True}, {"deep": True}):
        print("kernels of", which, flush=True)
        _run, graph, _kept = flow_graph(policy, **which)
        kernels(SimpleNamespace(graph=graph))
