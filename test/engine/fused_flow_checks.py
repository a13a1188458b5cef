"""The flow in fused kernels against the plain one, as plain functions: a GPU may have no pytest.

python test/engine/fused_flow_checks.py            times it on CUDA at full size
python test/engine/fused_flow_checks.py --check    compares it before
python test/engine/fused_flow_checks.py --tune     searches block sizes before
"""

import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from safe_pruner_node.engine.flow import ActionFlow, DeepProbe, DeepSettings, FlowSchedule
from safe_pruner_node.engine.fused_flow import FusedFlow
from safe_pruner_node.engine.kernels.tiles import (
    AttentionTiles,
    FlowTiles,
    PairTiles,
    SplitTiles,
)
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.pi05.checkpoint import mixed_dtype
from safe_pruner_node.pi05.config import PI05, TINY
from safe_pruner_node.pi05.model import Pi05

SMALL = replace(
    TINY,
    vision=replace(TINY.vision, image=56),  # 16 tokens
    expert=replace(TINY.expert, width=64, mlp=128, depth=2, heads=2, kv_heads=1, head_dim=32),
    vlm=replace(TINY.vlm, depth=2, heads=2, kv_heads=1, head_dim=32),
    flow_steps=2,
)
SMALL_TILES = FlowTiles(
    qkv=PairTiles(16, 32),
    attention=AttentionTiles(rows=16, keys=16, joined=4),
    o=SplitTiles(16, 2, 16),
    gate_up=PairTiles(16, 32),
    down=SplitTiles(32, 4, 16),
)
UNSPLIT_TILES = replace(SMALL_TILES, o=SplitTiles(16, 1, 16), down=SplitTiles(32, 1, 16))


def random_expert(config, device="cpu", seed=0):
    """A model whose expert is random and lively: norms, gates and attention all matter."""
    random = torch.Generator(device).manual_seed(seed)
    with torch.device(device):
        model = Pi05(config).eval().requires_grad_(requires_grad=False)
    for name, parameter in model.named_parameters():
        fan = parameter.shape[-1] if parameter.dim() > 1 else 1
        std = 0.3 if "norm" in name else (1.5 / fan**0.5 if parameter.dim() > 1 else 0.1)
        if "norm" in name and parameter.dim() > 1:
            std = 0.5 / fan**0.5
        parameter.normal_(0.0, std, generator=random)
    return model


def random_cache(config, lengths, device="cpu", dtype=torch.float32, seed=1):
    random = torch.Generator(device).manual_seed(seed)
    g, d = config.vlm.kv_heads, config.vlm.head_dim
    return [
        tuple(torch.randn(1, g, n, d, generator=random, device=device).to(dtype) for _ in range(2))
        for n in lengths
    ]


def plain(model, schedule, n_visual, deep, cache, noise, n_text, slots):
    """`ActionFlow` on the cache without its padding."""
    trimmed = [tuple(t[:, :, : t.shape[2] - (slots - n_text)] for t in pair) for pair in cache]
    watch = None if deep is None else DeepProbe(deep, len(schedule))
    text = Prompt(torch.zeros(1, n_text, dtype=torch.long, device=noise.device))
    actions = ActionFlow(model, schedule, n_visual, text, noise).run(trimmed, None, watch)
    return actions, None if watch is None else watch.saliency()


def off(a, b):
    """|a - b| / |b|."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


def expert_of_pi05():
    """π0.5's expert at full size, beside a language model that is only there for its depth."""
    return replace(
        PI05,
        vision=replace(TINY.vision, image=PI05.vision.image),
        vlm=replace(PI05.vlm, width=64, mlp=64),
        vocab_size=64,
    )


def bf16_copy(model):
    """The model in openpi's mixed precision."""
    other = deepcopy(model)
    for name, parameter in other.named_parameters():
        parameter.data = parameter.data.to(mixed_dtype(name))
    return other


def check_full_size(device="cuda"):
    """Errors against fp32, beside those of plain bf16, and the saliency's."""
    watch = DeepSettings((0, 16, 17), 768, "visual", "mean")
    for seed, horizon, n_text, slots, pruned in (
        (0, 50, 120, 128, False),
        (1, 50, 128, 128, True),
        (2, 10, 37, 64, True),
        (3, 64, 200, 224, False),
        (4, 100, 20, 32, True),
    ):
        deep = None if pruned else watch
        compare(FusedFlow, seed, horizon, n_text, slots, pruned=pruned, deep=deep, device=device)


def compare(
    make_flow, seed, horizon, n_text, slots, *, pruned, deep, steps=10, n_visual=768, device="cuda"
):
    """A flow of full size against fp32, beside plain bf16, in a line of its own.

    Args:
        make_flow: Of a model in bf16: what has `denoise`, as `stages.denoise` is.
        seed: Of weights, cache and noise.
        horizon: Action rows.
        n_text: Tokens of the prompt.
        slots: The same with padding, which holds what nobody may read.
        pruned: Three quarters of the visual tokens are gone from layer 3 on.
        deep: What to watch; None: nothing.
        steps: Euler steps.
        n_visual: Visual tokens.
        device: Where.

    Returns:
        Actions of fp32, plain bf16, the flow and the flow again; saliency of the first three.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    config = replace(expert_of_pi05(), horizon=horizon)
    exact = random_expert(config, device, seed)
    half = bf16_copy(exact)
    late = n_visual // 4 if pruned else n_visual
    lengths = [n_visual + slots] * 3 + [late + slots] * 15
    cache = random_cache(config, lengths, device, seed=seed)
    for pair in cache:
        for tensor in pair:
            tensor[:, :, tensor.shape[2] - (slots - n_text) :] = 1e4
    half_cache = [tuple(t.bfloat16() for t in pair) for pair in cache]
    exact_cache = [tuple(t.float() for t in pair) for pair in half_cache]
    random = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(1, horizon, 32, device=device, generator=random)
    schedules = {model: FlowSchedule(model, steps) for model in (exact, half)}
    with torch.inference_mode():
        a, s = plain(exact, schedules[exact], n_visual, deep, exact_cache, noise, n_text, slots)
        b, t = plain(half, schedules[half], n_visual, deep, half_cache, noise, n_text, slots)
        valid = None if n_text == slots else torch.tensor(n_text, device=device)
        prompt = Prompt(torch.zeros(1, slots, dtype=torch.long, device=device), valid)
        flow = make_flow(half)
        arguments = (schedules[half], n_visual, deep, half_cache, noise, None, prompt)
        c, u = flow.denoise(*arguments)
        again, _ = flow.denoise(*arguments)
    line = f"H {horizon}, {n_text}/{slots} text, {'pruned' if pruned else 'full'}:"
    line += f" plain bf16 off by {off(b, a):.2e}, {type(flow).__name__} {off(c, a):.2e}"
    if deep is not None:
        line += f"; saliency {off(t, s):.2e}, {type(flow).__name__} {off(u, s):.2e}"
    line += f"; moved {float((a - noise).norm() / noise.norm()):.2f} of the noise"
    line += "" if torch.equal(c, again) else "; NOT THE SAME TWICE"
    print(line, flush=True)
    return (a, b, c, again), (s, t, u)


class Timed:
    """Denoising in a CUDA graph.

    Args:
        tiles: Block sizes.
        pruned: Three quarters of the visual tokens are gone from layer 3 on.
        deep: With the saliency of a keyframe.
        steps: Euler steps.
    """

    def __init__(self, model, tiles, pruned=False, deep=False, steps=10, horizon=50, slots=128):
        device, config = model.device, model.config
        late = 192 if pruned else 768
        lengths = [768 + slots] * 3 + [late + slots] * 15
        cache = random_cache(config, lengths, device, torch.bfloat16)
        noise = torch.randn(1, horizon, 32, device=device)
        tokens = torch.zeros(1, slots, dtype=torch.long, device=device)
        prompt = Prompt(tokens, torch.tensor(slots - 8, device=device))
        watch = DeepSettings((0, 16, 17), 768, "visual", "mean") if deep else None
        flow = FusedFlow(model, tiles)
        schedule = FlowSchedule(model, steps)

        @torch.inference_mode()
        def run():
            return flow.denoise(schedule, 768, watch, cache, noise, None, prompt)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.result = run()
        self.kept = (cache, noise, prompt, flow)

    def ms(self, n=15):
        """Median of n replays."""
        for _ in range(3):
            self.graph.replay()
        times = []
        for _ in range(n):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return sorted(times)[n // 2]


def kernels(timed):
    """Print where a replay's time is."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            timed.graph.replay()
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda e: -e.device_time_total)[:12]
    for e in rows:
        ms, us = e.device_time_total / 3e3, e.device_time_total / e.count
        print(f"    {ms:7.3f} ms {e.count // 3:5d} x {us:6.2f} us  {e.key[:70]}")


CHOICES = {
    "gate_up": [
        PairTiles(c, d, w, s)
        for c, d, w, s in (
            (32, 64, 4, 4),
            (32, 64, 4, 6),
            (32, 64, 4, 8),
            (32, 128, 4, 3),
            (32, 128, 4, 4),
            (32, 64, 8, 6),
            (16, 128, 4, 4),
            (16, 128, 4, 6),
            (16, 64, 4, 8),
            (64, 64, 4, 4),
            (64, 64, 8, 4),
            (64, 64, 4, 6),
            (64, 128, 4, 3),
            (64, 128, 8, 3),
            (32, 256, 4, 2),
            (32, 128, 8, 4),
        )
    ],
    "qkv": [
        PairTiles(*choice)
        for choice in (
            (16, 64, 4, 8),
            (16, 128, 4, 3),
            (16, 128, 4, 4),
            (16, 128, 4, 8),
            (16, 256, 4, 3),
            (16, 256, 4, 4),
            (32, 64, 4, 8),
            (32, 128, 4, 4),
            (32, 128, 4, 6),
            (32, 256, 4, 3),
            (16, 128, 8, 6),
        )
    ],
    "down": [
        SplitTiles(*choice)
        for choice in (
            (64, 8, 64, 4, 8),
            (64, 8, 128, 4, 3),
            (64, 8, 256, 4, 2),
            (64, 8, 128, 8, 4),
            (32, 4, 128, 4, 4),
            (32, 4, 128, 4, 8),
            (32, 4, 256, 4, 4),
            (32, 8, 128, 4, 4),
            (32, 8, 256, 4, 2),
            (64, 4, 128, 4, 6),
            (64, 16, 128, 4, 2),
            (128, 16, 128, 4, 2),
            (128, 16, 64, 4, 4),
            (16, 2, 256, 4, 4),
            (16, 4, 256, 4, 4),
            (32, 2, 256, 4, 4),
            (32, 1, 256, 4, 4),
        )
    ],
    "o": [
        SplitTiles(*choice)
        for choice in (
            (64, 8, 64, 4, 4),
            (64, 8, 128, 4, 2),
            (32, 4, 256, 4, 2),
            (32, 8, 128, 4, 2),
            (64, 4, 128, 4, 4),
            (64, 16, 128, 4, 1),
            (16, 2, 128, 4, 8),
            (16, 2, 256, 4, 4),
            (32, 2, 128, 4, 8),
            (32, 2, 256, 4, 4),
            (32, 1, 256, 4, 4),
            (16, 1, 256, 4, 4),
            (16, 4, 128, 4, 4),
            (64, 2, 128, 4, 6),
        )
    ],
    "attention": [
        AttentionTiles(r, k, w, j)
        for r, k, w, j in (
            (64, 64, 8, 4),
            (64, 64, 4, 4),
            (64, 128, 8, 4),
            (64, 32, 4, 4),
            (32, 64, 4, 4),
            (128, 64, 8, 4),
            (128, 128, 8, 4),
            (64, 64, 8, 2),
            (64, 64, 8, 1),
            (64, 64, 8, 8),
        )
    ],
}


def tune(model, seconds=240.0, pruned=False):
    """Coordinate descent over the block sizes, one kernel after the other; prints every time."""
    import time

    began = time.monotonic()
    best, least = FlowTiles(), float("inf")
    with_steps = {"pruned": pruned, "steps": 3}

    def attempt(tiles):
        nonlocal best, least
        try:
            ms = Timed(model, tiles, **with_steps).ms()
        except Exception as error:  # noqa: BLE001 - too large in one way or another: the next
            print(f"    failed: {str(error)[:80]!r}", flush=True)
            return
        better = ms < least * 0.998
        if better:
            best, least = tiles, ms
        print(f"    {ms:.4f}{' *' if better else ''}", flush=True)

    attempt(best)
    attempt(replace(best, prefetch=False))
    attempt(replace(best, dependent=False))
    for name in ("qkv", "gate_up", "down", "o", "attention", "qkv", "down"):
        for choice in CHOICES[name]:
            if time.monotonic() - began > seconds:
                break
            attempt(replace(best, **{name: choice}))
        print(f"{name}: {getattr(best, name)} {least:.4f} ms for 3 steps", flush=True)
        if name == "attention":
            for variant in (
                {"dependent": True, "prefetch": True},
                {"dependent": True, "prefetch": False},
            ):
                attempt(replace(best, **variant))
            print(f"dependent {best.dependent}, prefetch {best.prefetch}")
    for variant in (
        {"dependent": True, "prefetch": True},
        {"dependent": True, "prefetch": False},
        {"dependent": False},
    ):
        attempt(replace(best, **variant))
    return best


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    if "--check" in sys.argv:
        check_full_size()
    policy = bf16_copy(random_expert(expert_of_pi05(), "cuda"))
    tiles = FlowTiles()
    if "--tune" in sys.argv:
        tiles = tune(policy)
        print(tiles)
    for which in ({}, {"pruned": True}, {"deep": True}, {"horizon": 10}):
        print(which, f"{Timed(policy, tiles, **which).ms(50):.3f} ms", flush=True)
    print("not dependent", f"{Timed(policy, replace(tiles, dependent=False)).ms(50):.3f} ms")
    kernels(Timed(policy, replace(tiles, dependent=False)))
