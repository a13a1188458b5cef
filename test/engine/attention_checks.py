"""Attention, norms and patches of vision and prefill: errors and times; no pytest here.

python test/engine/attention_checks.py                                     a GPU of SM 9.0
TRITON_INTERPRET=1 python test/engine/attention_checks.py --device cpu     errors of Triton's only
"""

import argparse
import sys
from pathlib import Path

import torch
import triton
from torch.nn.functional import conv2d, pad, scaled_dot_product_attention, unfold

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from graph_time import graph_us

from safe_pruner_node.engine.cuda import image_attention
from safe_pruner_node.engine.kernels import patches, prefill_attention
from safe_pruner_node.engine.kernels.attention import Tiles, attention
from safe_pruner_node.engine.kernels.norms import Residual, layer_norm, rms_norm
from safe_pruner_node.pi05.config import PI05

BAR = 4e-3
"""Of the relative error: bf16 rounds probabilities and results."""
CALLS = 27


def off(a, expected):
    """Relative error, Frobenius."""
    return float((a.double() - expected.double()).norm() / expected.double().norm())


def report(name, found, expected, call=None):
    """Print an error, and microseconds where there is a GPU to measure them."""
    error = off(found.reshape(expected.shape), expected)
    time = "" if call is None or not found.is_cuda else f"{graph_us([call] * CALLS):7.2f} us"
    mark = "" if error < BAR else "  WRONG"
    print(f"  {name:46} error {error:.1e} {time}{mark}", flush=True)
    return error < BAR


def random(*shape, device, scale=1.0):
    """The same numbers every time, bf16."""
    generator = torch.Generator(device).manual_seed(0)
    numbers = torch.randn(*shape, device=device, generator=generator) * scale
    return numbers.to(torch.bfloat16)


# ---- vision -------------------------------------------------------------------------------------


def image_heads(qkv, vision):
    """Queries, keys and values as Triton's attention takes them, of [N, 3D]."""
    heads = qkv.view(-1, vision.tokens, 3, vision.heads, 1, vision.width // vision.heads)
    q, k, v = heads.unbind(2)  # [C, P, h, 1, d] each
    return q, *(t.squeeze(3).transpose(1, 2) for t in (k, v))  # [C, h, P, d] each


def check_vision(device, images):
    """CUDA's with one and two warpgroups, and Triton's."""
    vision, fine = PI05.vision, True
    print(f"vision, {images} images")
    for scale in (1.0, 6.0):
        qkv = random(images * vision.tokens, 3 * vision.width, device=device, scale=scale)
        q, k, v = image_heads(qkv, vision)
        exact = scaled_dot_product_attention(
            q.squeeze(3).transpose(1, 2).float(), k.float(), v.float()
        )  # [C, h, P, d]
        exact = exact.transpose(1, 2).reshape(len(qkv), -1)  # [N, D]
        timed = device == "cuda" and scale == 1.0
        if device == "cuda":
            chosen = image_attention.warpgroups_for
            for n in (1, 2):
                image_attention.warpgroups_for = lambda *_, n=n: n
                ours = image_attention.ImageAttention(vision.heads)
                call = (lambda f=ours, x=qkv: f(x)) if timed else None
                name = f"CUDA, {n} warpgroups, values up to {4 * scale:.0f}"
                fine &= report(name, ours(qkv), exact, call)
            image_attention.warpgroups_for = chosen
        call = (lambda a=(q, k, v): attention(*a)) if timed else None
        fine &= report("Triton", attention(q, k, v), exact, call)
    return fine


# ---- prefill ------------------------------------------------------------------------------------


def check_prefill(device, tokens, dim):
    """The kernel in several tiles, with padding too, and a candidate."""
    heads, fine = PI05.vlm.heads, True
    print(f"prefill, {tokens} x {heads} rows, {tokens} keys")
    q, k, v = random(heads + 2, tokens, dim, device=device, scale=2.0).split((heads, 1, 1))
    query = q.transpose(0, 1).contiguous()  # [N, h, d]
    keys, values = k[None], v[None]  # [1, 1, N, d] each
    for valid in (1, 20):
        n = tokens - 33 + valid
        exact = scaled_dot_product_attention(q.float(), k[:, :n].float(), v[:, :n].float())
        given = torch.tensor(valid, device=device)
        found = prefill_attention.prefill_attention(query, keys, values, given, 33)
        found = found.unflatten(1, (heads, dim)).transpose(0, 1)  # [h, N, d]
        fine &= report(f"{valid} of the last 33 keys", found, exact)
    exact = scaled_dot_product_attention(q.float(), k.float(), v.float()).transpose(0, 1)
    chosen = prefill_attention.TILES
    for variant in ((64, 64, 4, 3), (64, 64, 8, 3), (64, 32, 4, 4)):
        prefill_attention.TILES = Tiles(*variant)
        call = lambda: prefill_attention.prefill_attention(query, keys, values, None, 0)  # noqa: E731
        fine &= guarded(f"kernel {variant}", call, exact)
    prefill_attention.TILES = chosen
    return fine


def guarded(name, call, exact):
    """`report`, but tiles that do not fit into shared memory are only said to be so."""
    try:
        return report(name, call().view_as(exact), exact, call)
    except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
        print(f"  {name:46} {type(error).__name__}: {str(error)[:60]}", flush=True)
        return True


# ---- norms --------------------------------------------------------------------------------------


def check_norms(device):
    """Both norms, adding one term."""
    print("norms")
    fine = True
    for rows, width, centred in ((768, 1152, True), (320, 2048, False), (896, 2048, False)):
        x, term = random(2, rows, width, device=device)
        weight, bias, added = random(3, width, device=device)
        value = (x.float() + term.float() + (added.float() if centred else 0.0)).to(x.dtype).float()
        if centred:
            residual = Residual(x, term[None], added)
            call = lambda r=residual, w=weight, b=bias: layer_norm(r, w, b)[1]  # noqa: E731
            exact = torch.nn.functional.layer_norm(
                value, (width,), weight.float(), bias.float(), 1e-6
            )
        else:
            residual = Residual(x, term[None])
            call = lambda r=residual, w=weight: rms_norm(r, w)[1]  # noqa: E731
            exact = torch.nn.functional.rms_norm(value, (width,), weight.float() + 1, 1e-6)
        name = f"{'layer' if centred else 'RMS'} norm {rows} x {width}"
        fine &= report(name, call(), exact, call)
    return fine


# ---- patches ------------------------------------------------------------------------------------


def check_patches(device, images):
    """Both kernels in several tiles, the first alone, and torch's convolution."""
    vision, fine = PI05.vision, True
    print(f"patches, {images} images")
    generator = torch.Generator(device).manual_seed(0)
    make = lambda *shape: torch.randn(*shape, device=device, generator=generator)  # noqa: E731
    pictures = make(images, 3, vision.image, vision.image).tanh()
    weight, bias = make(vision.width, 3, vision.patch, vision.patch) / 24, make(vision.width) / 8
    position = make(vision.tokens, vision.width) / 8
    convolved = conv2d(pictures.double(), weight.double(), bias.double(), stride=vision.patch)
    exact = (convolved.flatten(2).transpose(1, 2) + position).flatten(0, 1)  # [N, D]
    packed = patches.patch_weights(weight, torch.bfloat16)
    call = lambda: patches.patch_tokens(pictures, packed, bias, position, torch.bfloat16)  # noqa: E731
    report("(the result's rounding alone)", exact.bfloat16(), exact)
    names = ("ROWS", "COLUMNS", "DEPTH", "STAGES")
    before = [getattr(patches, name) for name in names]
    variants = [
        (64, 64, 64, 4),
        (64, 64, 64, 6),
        (64, 64, 128, 3),
        (64, 128, 64, 4),
        (128, 64, 64, 4),
        (128, 64, 128, 3),
        (128, 128, 64, 4),
    ]
    for variant in variants if device == "cuda" else variants[:1]:
        for name, value in zip(names, variant, strict=True):
            setattr(patches, name, value)
        fine &= guarded(f"kernels, product in {variant}", call, exact)
    for name, value in zip(names, before, strict=True):
        setattr(patches, name, value)
    if device != "cuda":
        return fine
    rows = lambda: patches._patch_rows(pictures, vision.image // vision.patch, packed)  # noqa: E731
    unfolded = pad(unfold(pictures, vision.patch, stride=vision.patch).transpose(1, 2), (0, 4))
    chosen = patches.PIXELS
    for patches.PIXELS in (512, 1024, 2048):
        fine &= report(f"rows, {patches.PIXELS} a program", rows(), unfolded.flatten(0, 1), rows)
    patches.PIXELS = chosen
    plain = lambda: conv2d(pictures, weight, bias, stride=vision.patch)  # noqa: E731
    report("torch's convolution, no positions", plain(), convolved, plain)
    return fine


@torch.inference_mode()
def main():
    """Errors and times; fails where an error is too large."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    if device == "cpu":
        import triton_interpreter  # noqa: F401

        results = [
            check_vision(device, 1),
            check_prefill(device, 40, 256),
            check_norms(device),
            check_patches(device, 1),
        ]
    else:
        print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, flush=True)
        results = [
            *(check_vision(device, images) for images in (3, 1)),
            *(check_prefill(device, tokens, 256) for tokens in (320, 896)),
            check_norms(device),
            *(check_patches(device, images) for images in (3, 1)),
        ]
    if not all(results):
        sys.exit("an error is too large")


if __name__ == "__main__":
    main()
