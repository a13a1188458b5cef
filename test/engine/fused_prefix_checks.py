"""Fused vision tower and prefill against the plain model; no pytest here.

python test/engine/fused_prefix_checks.py              errors at full size on CUDA, then times
python test/engine/fused_prefix_checks.py --kernels    times of single kernels and GEMMs too
TRITON_INTERPRET=1 python test/engine/fused_prefix_checks.py --small --device cpu    errors only
"""

import argparse
import copy
import itertools
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from safe_pruner_node.engine.fused_prefix import FusedPrefix, PrefixTuning
from safe_pruner_node.engine.fused_vision import FusedVision, VisionTuning
from safe_pruner_node.engine.kernels.activation import GluTiles, gelu_mul, glu_linear
from safe_pruner_node.engine.kernels.attention import AttentionTiles, attention
from safe_pruner_node.engine.kernels.norms import Residual, layer_norm, rms_norm
from safe_pruner_node.engine.kernels.patches import patch_tokens
from safe_pruner_node.engine.kernels.rotary import rotate_split
from safe_pruner_node.engine.prefix import prefill_early, prefill_late
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.engine.split_linear import split_linear
from safe_pruner_node.pi05.checkpoint import mixed_dtype
from safe_pruner_node.pi05.config import PI05, TINY
from safe_pruner_node.pi05.model import Pi05

SMALL = replace(
    TINY,
    vision=replace(TINY.vision, width=48, mlp=40, image=56),  # heads of 24 channels, 16 patches
    vlm=replace(TINY.vlm, width=48, mlp=80, heads=4, head_dim=16),
    expert=replace(TINY.expert, heads=4, head_dim=16),
)
SMALL_TILES = AttentionTiles(rows=16, keys=16)
SMALL_VISION = VisionTuning(SMALL_TILES)
SMALL_GLU = GluTiles(rows=16, columns=32, depth=16)
BAR = 1.5
"""Error against fp32 that is allowed, in those of the plain model in bf16."""

VISION_TILES = [
    AttentionTiles(rows, keys, stages, warps)
    for rows, keys, stages, warps in (
        (64, 64, 2, 4),
        (64, 32, 2, 4),
        (64, 128, 2, 4),
        (128, 64, 2, 8),
        (128, 128, 2, 8),
    )
]
PREFIX_TILES = [
    AttentionTiles(rows, keys, stages, warps)
    for rows, keys, stages, warps in (
        (64, 64, 2, 4),
        (64, 32, 2, 4),
        (64, 32, 3, 4),
        (64, 64, 2, 8),
        (128, 64, 2, 8),
    )
]
GLU_TILES = [
    GluTiles(rows, columns, depth, stages, warps, persistent=persistent)
    for rows, columns, depth, stages, warps, persistent in (
        (128, 256, 64, 3, 8, True),
        (128, 256, 64, 3, 8, False),
        (128, 128, 64, 4, 8, True),
        (128, 128, 64, 4, 4, True),
        (64, 256, 64, 4, 4, True),
    )
]


@dataclass(frozen=True)
class Case:
    """A query: cameras, text tokens, slots per bucket (None: no padding), visual tokens kept."""

    cameras: int
    text: int
    bucket: int | None
    kept: int | None

    def __str__(self):
        kept = "all" if self.kept is None else self.kept
        padded = "" if self.bucket is None else f", padded to {self.bucket}s"
        return f"{self.cameras} cameras, {self.text} text tokens{padded}, keeps {kept}"


def random_policy(config, device, dtype_of=mixed_dtype, seed=0):
    """Random weights that keep activations near 1; openpi's mixed precision by default."""
    with torch.device(device):
        model = Pi05(config).eval().requires_grad_(requires_grad=False)
    random = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "layer_norm" in name or "post_layernorm" in name:  # SigLIP's: centred on one
            parameter.normal_(float(name.endswith("weight")), 0.1, generator=random)
        elif parameter.ndim == 1:
            parameter.normal_(0.0, 0.1, generator=random)
        else:
            fan_in = parameter[0].numel()
            parameter.normal_(0.0, fan_in**-0.5, generator=random)
        parameter.data = parameter.data.to(dtype_of(name))
    return model


def random_query(config, case, device, seed=0):
    """Images [C, 3, S, S], the prompt without padding, and which tokens to keep [K]."""
    random = torch.Generator(device).manual_seed(seed)
    size, n_visual = config.vision.image, case.cameras * config.vision.tokens
    images = torch.rand(case.cameras, 3, size, size, generator=random, device=device) * 2 - 1
    tokens = torch.randint(
        config.vocab_size, (1, case.text), generator=random, device=device
    )  # [1, T]
    if case.kept is None:
        return images, Prompt(tokens), None
    order = torch.randperm(n_visual, generator=random, device=device)
    return images, Prompt(tokens), order[: case.kept].sort().values


def off(a, expected):
    """Relative error, Frobenius."""
    return float((a.float() - expected.float()).norm() / expected.float().norm())


def off_by_layer(cache, expected):
    """Greater relative error of keys and of values, per layer; padding is not compared."""
    return [
        max(off(a[:, :, : b.shape[2]], b) for a, b in zip(pair, other, strict=True))
        for pair, other in zip(cache, expected, strict=True)
    ]


def plain_cache(model, layer, z, prompt, keep):
    """Keys and values the plain way: everything, or pruned after `layer`."""
    x = torch.cat([z[None].to(model.dtype), model.embed_text(prompt.tokens)], 1)  # [1, N, D]
    if keep is None:
        return model.prefill(x)
    return prefill_late(model, prefill_early(model, x, len(z), layer), keep)


def fused_cache(fused, layer, z, prompt, keep):
    """The same of `FusedPrefix`."""
    if keep is None:
        return fused.read(z, prompt)
    return fused.late(fused.read_early(layer, z, prompt), keep)


@torch.inference_mode()
def check(model, reference, case, tuning, vision_tuning, *, layers=False):
    """Print errors against the fp32 reference, ours and those of the plain bf16 model.

    Returns:
        Greatest ratio of ours to theirs.
    """
    vision, prefix = FusedVision(model, vision_tuning), FusedPrefix(model, tuning)
    images, prompt, keep = random_query(model.config, case, model.device)
    exact = reference.embed_images(images).flatten(0, 1)  # [N_vis, D]
    seen = off(vision(images), exact), off(model.embed_images(images).flatten(0, 1), exact)
    z, layer = exact.to(model.dtype), min(3, model.config.vlm.depth - 1)
    expected = plain_cache(reference, layer, z, prompt, keep)
    padded = prompt if case.bucket is None else prompt.padded(case.bucket)
    ours = off_by_layer(fused_cache(prefix, layer, z, padded, keep), expected)
    theirs = off_by_layer(plain_cache(model, layer, z, prompt, keep), expected)
    ratios = [a / b for a, b in zip((seen[0], *ours), (seen[1], *theirs), strict=True)]
    print(
        f"{case}: z {seen[0]:.2e} (plain {seen[1]:.2e}), last K/V {ours[-1]:.2e} "
        f"(plain {theirs[-1]:.2e}), greatest ratio {max(ratios):.2f}"
    )
    if layers:
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            print(f"  layer {i:2}: {a:.2e} (plain {b:.2e})")
    return max(ratios)


def check_all(model):
    """Every number of cameras, with and without padding and pruning, then every choice."""
    reference = copy.deepcopy(model).float()
    per_camera = model.config.vision.tokens
    text = 120 if model.config is PI05 else 5
    cases = [
        Case(cameras, text + extra, bucket, kept)
        for cameras, (extra, bucket), kept in itertools.product(
            (1, 2, 3), ((0, None), (1, 32)), (None, per_camera * 3 // 4)
        )
    ]
    small = model.config is not PI05
    vision = SMALL_VISION if small else VisionTuning()
    tuning = PrefixTuning(attention=SMALL_TILES) if small else PrefixTuning()
    ratios = [
        check(model, reference, case, tuning, vision, layers=case is cases[-1]) for case in cases
    ]
    choices = [replace(tuning, sdpa=True), replace(tuning, out_terms=2, down_terms=4)]
    choices += [replace(tuning, glu=t) for t in ([SMALL_GLU] if small else GLU_TILES)]
    if not small:
        choices += [replace(tuning, attention=t) for t in PREFIX_TILES[1:]]
    for choice in choices:
        print(choice)
        ratios.append(check(model, reference, cases[-4], choice, vision))
        ratios.append(check(model, reference, cases[-1], choice, vision))
    others = [replace(vision, out_terms=2, fc2_terms=2)]
    others += [] if small else [replace(vision, attention=t) for t in VISION_TILES[1:]]
    for other in others:
        print(other)
        ratios.append(check(model, reference, cases[0], tuning, other))
    assert max(ratios) <= BAR, max(ratios)


def graph_ms(function, replays=50):
    """Median milliseconds of a replayed CUDA graph of a function."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(replays + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[5:])


def vision_flops(config, images):
    """Multiply-adds counted as two, of the tower and the projector."""
    v, n = config.vision, images * config.vision.tokens
    layer = n * (4 * v.width**2 + 2 * v.width * v.mlp) + 2 * n * v.tokens * v.width
    ends = n * v.width * (3 * v.patch**2 + config.vlm.width)
    return 2 * (v.depth * layer + ends)


def layer_flops(vlm, rows, keys):
    """Of one language model layer without keys and values: `rows` queries on `keys` keys."""
    inner = vlm.heads * vlm.head_dim
    return 2 * rows * (2 * vlm.width * inner + 3 * vlm.width * vlm.mlp + 2 * keys * inner)


def kv_flops(vlm, rows):
    """Of the keys and values of one layer."""
    return 2 * rows * vlm.width * 2 * vlm.kv_heads * vlm.head_dim


def _report(name, ms, flops):
    print(f"{name:66} {ms:7.3f} ms {flops / ms / 1e9:6.0f} TFLOP/s", flush=True)


@torch.inference_mode()
def time_stages(model, cameras=3, text=120, bucket=128, kept=192, layer=3):
    """Print the time of every stage for every choice."""
    config, device = model.config, model.device
    vlm, n_visual = config.vlm, cameras * config.vision.tokens
    images, prompt, keep = random_query(config, Case(cameras, text, None, kept), device)
    tunings = {f"attention {_brief(t)}": VisionTuning(t) for t in VISION_TILES}
    for out, fc2 in ((1, 2), (2, 2)):
        tunings[f"output in {out}, fc2 in {fc2}"] = VisionTuning(out_terms=out, fc2_terms=fc2)
    for name, vision_tuning in tunings.items():
        vision = FusedVision(model, vision_tuning)
        ms = graph_ms(lambda: vision(images))  # noqa: B023 - called here
        _report(f"vision, {name}", ms, vision_flops(config, cameras))
    z = vision(images).clone()
    base = PrefixTuning()
    choices = {f"cuBLAS, {_brief(t)}": replace(base, attention=t) for t in PREFIX_TILES} | {
        "cuBLAS, SDPA": replace(base, sdpa=True)
    }
    for out, down in ((1, 2), (1, 4), (1, 8), (2, 1), (2, 4)):
        terms = replace(base, out_terms=out, down_terms=down)
        choices[f"output in {out}, down in {down}"] = terms
    choices |= {f"GELU in GEMM {_brief(t)}": replace(base, glu=t) for t in GLU_TILES}
    padded = Prompt(
        torch.cat([prompt.tokens, prompt.tokens[:, : bucket - text]], 1),
        torch.full((), text, device=device),
    )
    for name, tuning in choices.items():
        fused = FusedPrefix(model, tuning)
        for prompt_name, given in (("", prompt), (f" of {bucket} slots", padded)):
            if given is padded and tuning != base:
                continue
            n, rest = n_visual + given.slots, kept + given.slots
            early_flops = (layer - 1) * layer_flops(vlm, n, n) + layer * kv_flops(vlm, n)
            late_flops = layer_flops(vlm, rest, n)
            late_flops += (vlm.depth - layer - 1) * layer_flops(vlm, rest, rest)
            late_flops += (vlm.depth - layer) * kv_flops(vlm, rest)
            full_flops = (vlm.depth - 1) * layer_flops(vlm, n, n) + vlm.depth * kv_flops(vlm, n)
            label = f"{text}{prompt_name}, {name}"
            ms = graph_ms(lambda: fused.read(z, given))  # noqa: B023 - called here
            _report(f"read {label}", ms, full_flops)
            early_ms = graph_ms(lambda: fused.read_early(layer, z, given))  # noqa: B023
            _report(f"read_early {label}", early_ms, early_flops)
            early = fused.read_early(layer, z, given)
            late_ms = graph_ms(lambda: fused.late(early, keep))  # noqa: B023 - called here
            _report(f"late, {kept} kept {label}", late_ms, late_flops)
            print(f"  early and late {early_ms + late_ms:.3f} ms")


def _brief(tiles):
    return "x".join(str(v) for v in vars(tiles).values())


@torch.inference_mode()
def time_kernels(model):
    """Print microseconds of single kernels and GEMMs, each on another layer's weights in turn."""
    _time_vision_kernels(model)
    for n in (888, 312):
        _time_prefix_kernels(model, n)


def _each(name, calls, flops=0.0, n_bytes=0.0):
    """Print the mean time of one of the calls."""

    def run():
        for call in calls:
            call()

    us = graph_ms(run) * 1e3 / len(calls)
    rates = f"{flops / us / 1e6:6.0f} TFLOP/s" if flops else f"{n_bytes / us / 1e6:6.2f} TB/s"
    print(f"{name:66} {us:7.1f} us {rates}", flush=True)


def _time_vision_kernels(model, cameras=3):
    vision, config = FusedVision(model), model.config.vision
    n, width, mlp = cameras * config.tokens, config.width, config.mlp
    layers = vision._layers
    x, a, h = (
        torch.randn(n, w, device=model.device, dtype=model.dtype) for w in (width, width, mlp)
    )
    residual = Residual(x, a[None], layers[0].out.bias)
    size = config.image
    images = torch.rand(cameras, 3, size, size, device=model.device)
    p = vision._patches
    print(f"vision, {n} rows")
    pixels = p.weight[0].numel()
    _each(
        "patches",
        [lambda: patch_tokens(images, p.weight, p.bias, vision._position, model.dtype)] * 10,
        2 * n * width * pixels,
    )
    embed = model.get_submodule(
        "paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings"
    )
    _each("patches, plain", [lambda: embed(images).bfloat16()] * 10, 2 * n * width * pixels)
    norm = [lambda i=i: layer_norm(residual, i.norm1.weight, i.norm1.bias) for i in layers]
    _each("layer norm", norm, n_bytes=8 * n * width)
    qkv = [lambda i=i: torch.addmm(i.qkv.bias, a, i.qkv.weight.T) for i in layers]
    _each("QKV GEMM", qkv, 6 * n * width**2)
    for terms in (1, 2):
        call = [lambda i=i, t=terms: split_linear(a, i.out.weight, t) for i in layers]
        _each(f"output GEMM in {terms}", call, 2 * n * width**2)
    fc1 = [
        lambda i=i: torch._addmm_activation(i.fc1.bias, a, i.fc1.weight.T, use_gelu=True)
        for i in layers
    ]
    _each("fc1 GEMM with GELU", fc1, 2 * n * width * mlp)
    _each(
        "fc1 GEMM without",
        [lambda i=i: torch.addmm(i.fc1.bias, a, i.fc1.weight.T) for i in layers],
        2 * n * width * mlp,
    )
    for terms in (1, 2):
        call = [lambda i=i, t=terms: split_linear(h, i.fc2.weight, t) for i in layers]
        _each(f"fc2 GEMM in {terms}", call, 2 * n * width * mlp)
    packed = torch.addmm(layers[0].qkv.bias, a, layers[0].qkv.weight.T)
    heads = packed.view(cameras, config.tokens, 3, config.heads, 1, -1)
    q, k, v = heads.unbind(2)
    k, v = (t.squeeze(3).transpose(1, 2) for t in (k, v))
    flops = 4 * n * config.tokens * width
    for tiles in VISION_TILES:
        call = [lambda t=tiles: attention(q, k, v, t)] * 10
        _each(f"attention {_brief(tiles)}", call, flops)
    plain = q.squeeze(3).transpose(1, 2)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    _each("attention, SDPA", [lambda: sdpa(plain, k, v)] * 10, flops)


def _time_prefix_kernels(model, n):
    prefix, vlm = FusedPrefix(model), model.config.vlm
    layers, width, mlp = prefix._layers, vlm.width, vlm.mlp
    inner = vlm.heads * vlm.head_dim

    def rows(channels):
        return torch.randn(n, channels, device=model.device, dtype=model.dtype)

    x, a, h, both = rows(width), rows(width), rows(mlp), rows(2 * mlp)
    attended = rows(inner)
    packed = rows(inner + 2 * vlm.kv_heads * vlm.head_dim)
    positions = prefix._positions[:n]
    print(f"prefix, {n} rows")
    _each(
        "RMS norm",
        [lambda i=i: rms_norm(Residual(x, a[None]), i.input_norm) for i in layers],
        n_bytes=8 * n * width,
    )
    _each("QKV GEMM", [lambda i=i: a @ i.qkv.T for i in layers], 2 * n * width * packed.shape[1])
    _each(
        "K/V GEMM",
        [lambda i=i: a @ i.keys_values.T for i in layers],
        2 * n * width * 2 * vlm.kv_heads * vlm.head_dim,
    )
    rotate = [lambda: rotate_split(packed, prefix._rope, positions, vlm.heads, vlm.kv_heads)] * 10
    _each("rotary", rotate, n_bytes=4 * packed.numel())
    for terms in (1, 2, 4):
        call = [lambda i=i, t=terms: split_linear(attended, i.out, t) for i in layers]
        _each(f"output GEMM in {terms}", call, 2 * n * width * inner)
    _each("gate and up GEMM", [lambda i=i: a @ i.gate_up.T for i in layers], 4 * n * width * mlp)
    _each("GELU", [lambda: gelu_mul(both)] * 10, n_bytes=6 * n * mlp)
    for tiles in GLU_TILES:
        call = [lambda i=i, t=tiles: glu_linear(a, i.gate_up, t) for i in layers]
        _each(f"gate and up GEMM with GELU {_brief(tiles)}", call, 4 * n * width * mlp)
    for terms in (1, 2, 4, 8, 16):
        call = [lambda i=i, t=terms: split_linear(h, i.down, t) for i in layers]
        _each(f"down GEMM in {terms}", call, 2 * n * width * mlp)
        several = Residual(x, a.expand(terms, -1, -1).contiguous())
        norm = [lambda i=i, r=several: rms_norm(r, i.input_norm) for i in layers]
        _each(f"RMS norm of {terms}", norm, n_bytes=2 * (3 + terms) * n * width)
    q, (k, v) = rotate_split(packed, prefix._rope, positions, vlm.heads, vlm.kv_heads)
    grouped = q.unflatten(1, (vlm.kv_heads, -1))[None]
    valid = torch.full((), 100, device=model.device)
    for tiles in PREFIX_TILES:
        call = [lambda t=tiles: attention(grouped, k, v, t)] * 10
        _each(f"attention {_brief(tiles)}", call, 4 * n * n * inner)
    masked = [lambda: attention(grouped, k, v, PREFIX_TILES[0], valid, 120)] * 10
    _each(f"attention, masked {_brief(PREFIX_TILES[0])}", masked, 4 * n * n * inner)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    one_head = q.flatten(0, 1)[None, None]
    _each("attention, SDPA, one head", [lambda: sdpa(one_head, k, v)] * 10, 4 * n * n * inner)
    every_head = q.transpose(0, 1)[None]
    _each(
        "attention, SDPA, grouped",
        [lambda: sdpa(every_head, k, v, enable_gqa=True)] * 10,
        4 * n * n * inner,
    )


def main():
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny model, no times")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-check", action="store_true", help="times only")
    parser.add_argument("--kernels", action="store_true", help="times of single kernels too")
    options = parser.parse_args()
    if options.device == "cpu":
        import triton_interpreter  # noqa: F401
    torch.backends.cudnn.allow_tf32 = False  # the reference's convolution
    model = random_policy(SMALL if options.small else PI05, options.device)
    if not options.no_check:
        check_all(model)
    if options.small:
        return
    torch.cuda.empty_cache()
    time_stages(model)
    if options.kernels:
        time_kernels(model)


if __name__ == "__main__":
    main()
