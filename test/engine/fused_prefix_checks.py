"""Fused vision tower and prefill against the plain model; no pytest here.

python test/engine/fused_prefix_checks.py              errors at full size on CUDA, then times
TRITON_INTERPRET=1 python test/engine/fused_prefix_checks.py --small --device cpu    errors only
"""

import argparse
import copy
import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from graph_time import graph_us

from safe_pruner_node.engine.fused_prefix import FusedPrefix, _Padding
from safe_pruner_node.engine.fused_vision import FusedVision
from safe_pruner_node.engine.kernels.norms import Residual, layer_norm, rms_norm
from safe_pruner_node.engine.kernels.patches import patch_tokens
from safe_pruner_node.engine.kernels.rotary import rotate_split
from safe_pruner_node.engine.prefix import prefill_early, prefill_late
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.pi05.checkpoint import mixed_dtype
from safe_pruner_node.pi05.config import PI05, TINY
from safe_pruner_node.pi05.model import Pi05

SMALL = replace(
    TINY,
    vision=replace(TINY.vision, width=48, mlp=40, image=56),  # heads of 24 channels, 16 patches
    vlm=replace(TINY.vlm, width=48, mlp=80, heads=4, head_dim=16),
    expert=replace(TINY.expert, heads=4, head_dim=16),
)
BAR = 1.5
"""Error against fp32 that is allowed, in those of the plain model in bf16."""


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
def check(model, reference, case, *, layers=False):
    """Print errors against the fp32 reference, ours and those of the plain bf16 model.

    Returns:
        Greatest ratio of ours to theirs.
    """
    vision, prefix = FusedVision(model), FusedPrefix(model)
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
    """Every number of cameras, with and without padding and pruning."""
    reference = copy.deepcopy(model).float()
    kept = model.config.vision.tokens * 3 // 4
    text = 120 if model.config is PI05 else 5
    cases = [
        Case(cameras, text + extra, bucket, keep)
        for cameras, (extra, bucket), keep in itertools.product(
            (1, 2, 3), ((0, None), (1, 32)), (None, kept)
        )
    ]
    ratios = [check(model, reference, case, layers=case is cases[-1]) for case in cases]
    assert max(ratios) <= BAR, max(ratios)


@torch.inference_mode()
def time_stages(model, cameras=3, text=120, bucket=128, kept=192, layer=3):
    """Print the time of every stage, without padding and with."""
    vision, prefix = FusedVision(model), FusedPrefix(model)
    images, prompt, keep = random_query(model.config, Case(cameras, text, None, kept), model.device)
    print(f"{'vision':50} {graph_us([lambda: vision(images)]) / 1e3:7.3f} ms")
    z = vision(images).clone()
    for given in (prompt, prompt.padded(bucket)):
        name = f"{text} of {given.slots} text slots"
        early = prefix.read_early(layer, z, given)
        for stage, function in {
            "read": lambda: prefix.read(z, given),  # noqa: B023 - called here
            "read_early": lambda: prefix.read_early(layer, z, given),  # noqa: B023
            f"late, {kept} kept": lambda: prefix.late(early, keep),  # noqa: B023
        }.items():
            print(f"{f'{stage}, {name}':50} {graph_us([function]) / 1e3:7.3f} ms", flush=True)


def _each(name, calls, flops=0.0, n_bytes=0.0):
    """Print the mean time of one of the calls."""
    us = graph_us(calls)
    rates = f"{flops / us / 1e6:6.0f} TFLOP/s" if flops else f"{n_bytes / us / 1e6:6.2f} TB/s"
    print(f"{name:50} {us:7.1f} us {rates}", flush=True)


@torch.inference_mode()
def time_vision_kernels(model, cameras=3):
    """Print microseconds of each kernel and GEMM, on every layer's weights in turn."""
    vision, config = FusedVision(model), model.config.vision
    n, width, mlp = cameras * config.tokens, config.width, config.mlp
    layers, dtype, p = vision._layers, model.dtype, vision._patches
    x, a, h = (torch.randn(n, w, device=model.device, dtype=dtype) for w in (width, width, mlp))
    residual = Residual(x, a[None], layers[0].out_bias)
    images = torch.rand(cameras, 3, config.image, config.image, device=model.device)
    products, gelu_linear = vision._products, vision._products.linear_gelu
    packed = products.linear(a, layers[0].qkv.weight, layers[0].qkv.bias)  # [N, 3D]
    print(f"vision, {n} rows")
    embed = [lambda: patch_tokens(images, p.weight, p.bias, vision._position, dtype)] * 10
    _each("patches", embed, 2 * n * width * p.weight[0].numel())
    norm = [lambda i=i: layer_norm(residual, i.norm1.weight, i.norm1.bias) for i in layers]
    _each("layer norm", norm, n_bytes=8 * n * width)
    qkv = [lambda i=i: products.linear(a, i.qkv.weight, i.qkv.bias) for i in layers]
    _each("QKV GEMM", qkv, 6 * n * width**2)
    _each("attention", [lambda: vision._attention(packed)] * 10, 4 * n * config.tokens * width)
    _each("output GEMM", [lambda i=i: products.terms(a, i.out) for i in layers], 2 * n * width**2)
    fc1 = [lambda i=i: gelu_linear(a, i.fc1.weight, i.fc1.bias) for i in layers]
    _each("fc1 GEMM with GELU", fc1, 2 * n * width * mlp)
    _each("fc2 GEMM", [lambda i=i: products.terms(h, i.fc2) for i in layers], 2 * n * width * mlp)


@torch.inference_mode()
def time_prefix_kernels(model, n):
    """The same of the language model, n rows."""
    prefix, vlm = FusedPrefix(model), model.config.vlm
    layers, width, mlp = prefix._layers, vlm.width, vlm.mlp
    inner, kv = vlm.heads * vlm.head_dim, 2 * vlm.kv_heads * vlm.head_dim
    sizes = (width, mlp, inner, inner + kv)
    x, h, attended, packed = (
        torch.randn(n, size, device=model.device, dtype=model.dtype) for size in sizes
    )
    positions = prefix._positions[:n]
    products = prefix._products
    query, cache = rotate_split(packed[None], prefix._rope, positions, vlm.heads, vlm.kv_heads)
    padding = _Padding(0, None)
    print(f"prefix, {n} rows")
    for terms in (1, 2):
        residual = Residual(x, x.expand(terms, -1, -1).contiguous())
        norm = [lambda i=i, r=residual: rms_norm(r, i.input_norm) for i in layers]
        _each(f"RMS norm, adds {terms}", norm, n_bytes=2 * (3 + terms) * n * width)
    qkv = [lambda i=i: products.terms(x, i.qkv) for i in layers]
    _each("QKV GEMM", qkv, 2 * n * width * (inner + kv))
    key_value = [lambda i=i: products.terms(x, i.keys_values) for i in layers]
    _each("K/V GEMM", key_value, 2 * n * width * kv)
    rotate = [
        lambda: rotate_split(packed[None], prefix._rope, positions, vlm.heads, vlm.kv_heads)
    ] * 10
    _each("rotary", rotate, n_bytes=4 * packed.numel())
    _each("attention", [lambda: prefix._attend(query, cache, padding)] * 10, 4 * n * n * inner)
    out = [lambda i=i: products.terms(attended, i.out) for i in layers]
    _each("output GEMM", out, 2 * n * width * inner)
    glu = [lambda i=i: products.gated(x, i.gate_up, None) for i in layers]
    _each("gate and up GEMM with GELU", glu, 4 * n * width * mlp)
    down = [lambda i=i: products.terms(h, i.down) for i in layers]
    _each("down GEMM", down, 2 * n * width * mlp)


def main():
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny model, no times")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.device == "cpu":
        import triton_interpreter  # noqa: F401
    torch.backends.cudnn.allow_tf32 = False  # the reference's convolution
    model = random_policy(SMALL if options.small else PI05, options.device)
    check_all(model)
    if options.small:
        return
    torch.cuda.empty_cache()
    time_stages(model)
    time_vision_kernels(model)
    for rows in (888, 312):
        time_prefix_kernels(model, rows)


if __name__ == "__main__":
    main()
