"""The flow in one launch against the plain one, and its time: needs a GPU of SM 9.0, and no pytest.

python test/engine/resident_flow_checks.py
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fused_flow_checks import (
    bf16_copy,
    expert_of_pi05,
    off,
    plain,
    random_cache,
    random_expert,
)

from safe_pruner_node.engine.flow import DeepSettings, FlowSchedule
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.engine.resident_flow import ResidentFlow

BAR = 1.5
"""Error against fp32 that is allowed, in those of the plain flow in bf16."""


def check(device="cuda"):
    """Compare with fp32, beside plain bf16; also that the same call gives the same bits."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for seed, horizon, n_text, slots, pruned, steps, deep in (
        (0, 50, 120, 128, False, 10, DeepSettings((0, 16, 17), 768, "visual", "mean")),
        (1, 50, 128, 128, True, 10, None),
        (2, 10, 37, 64, True, 10, None),
        (3, 64, 200, 224, False, 4, DeepSettings((2, 9), 768, "all", "last")),
    ):
        config = replace(expert_of_pi05(), horizon=horizon)
        exact = random_expert(config, device, seed)
        half = bf16_copy(exact)
        n_visual = 768
        late = 192 if pruned else n_visual
        lengths = [n_visual + slots] * 3 + [late + slots] * 15
        cache = random_cache(config, lengths, device, seed=seed)
        for pair in cache:
            for tensor in pair:
                tensor[:, :, tensor.shape[2] - (slots - n_text) :] = (
                    1e4  # padding: nobody's to read
                )
        half_cache = [tuple(t.bfloat16() for t in pair) for pair in cache]
        exact_cache = [tuple(t.float() for t in pair) for pair in half_cache]
        random = torch.Generator(device).manual_seed(seed)
        noise = torch.randn(1, horizon, 32, device=device, generator=random)
        with torch.inference_mode():
            a, s = plain(
                exact, FlowSchedule(exact, steps), n_visual, deep, exact_cache, noise, n_text, slots
            )
            schedule = FlowSchedule(half, steps)
            b, t = plain(half, schedule, n_visual, deep, half_cache, noise, n_text, slots)
            valid = None if n_text == slots else torch.tensor(n_text, device=device)
            prompt = Prompt(torch.zeros(1, slots, dtype=torch.long, device=device), valid)
            flow = ResidentFlow(half)
            assert flow.fits(deep, half_cache, horizon)
            arguments = (schedule, n_visual, deep, half_cache, noise, None, prompt)
            c, u = flow.denoise(*arguments)
            again, _ = flow.denoise(*arguments)
        line = f"H {horizon}, {n_text}/{slots} text, {'pruned' if pruned else 'full'}:"
        line += f" plain bf16 off by {off(b, a):.2e}, resident {off(c, a):.2e}"
        if deep is not None:
            line += f"; saliency {off(t, s):.2e}, resident {off(u, s):.2e}"
            assert off(u, s) <= BAR * off(t, s)
        print(
            f"{line}; moved {float((a - noise).norm() / noise.norm()):.2f} of the noise", flush=True
        )
        assert off(c, a) <= BAR * off(b, a)
        assert torch.equal(c, again)


def milliseconds(policy, pruned=False, deep=False, horizon=50, slots=128, n=50):
    """Median and 99th percentile of replays of ten steps."""
    late = 192 if pruned else 768
    lengths = [768 + slots] * 3 + [late + slots] * 15
    cache = random_cache(policy.config, lengths, "cuda", torch.bfloat16)
    noise = torch.randn(1, horizon, 32, device="cuda")
    tokens = torch.zeros(1, slots, dtype=torch.long, device="cuda")
    prompt = Prompt(tokens, torch.tensor(slots - 8, device="cuda"))
    watch = DeepSettings((0, 16, 17), 768, "visual", "mean") if deep else None
    flow, schedule = ResidentFlow(policy), FlowSchedule(policy, 10)

    @torch.inference_mode()
    def run():
        return flow.denoise(schedule, 768, watch, cache, noise, None, prompt)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = run()
    times = []
    for _ in range(n + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    del kept
    times = sorted(times[3:])
    return times[n // 2], times[int(n * 0.99)]


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    check()
    policy = bf16_copy(random_expert(expert_of_pi05(), "cuda"))
    for which in ({}, {"pruned": True}, {"deep": True}, {"horizon": 10}):
        p50, p99 = milliseconds(policy, **which)
        print(which, f"p50 {p50:.3f} p99 {p99:.3f} ms", flush=True)
