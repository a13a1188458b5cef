"""The pruner's fused arithmetic against the plain one; no pytest here.

python test/engine/fused_pruner_checks.py           errors at full size on CUDA, then medians
python test/engine/fused_pruner_checks.py --tune    block sizes of the two products as well
TRITON_INTERPRET=1 python test/engine/fused_pruner_checks.py --device cpu    errors only
"""

import argparse
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from graph_time import graph_us

from safe_pruner_node.engine import fused_pruner
from safe_pruner_node.engine.kernels import early_votes, token_match
from safe_pruner_node.pruning import judgement, matching
from safe_pruner_node.pruning.early import Vote
from safe_pruner_node.pruning.forecast import deep_forecast, fuse
from safe_pruner_node.pruning.selection import Selection

HEADS, DIM, WIDTH, CAMERA = 8, 256, 2048, 256
"""π0.5's query heads (one key head), head_dim and VLM width, and SigLIP's tokens per image."""

SCORE_BAR = 1e-5
"""Relative error of a saliency that is allowed, greatest one."""


@dataclass(frozen=True)
class Problem:
    """What `judge` is given, by name, in order."""

    vote: Vote
    selection: Selection
    lambda_: float
    query: torch.Tensor
    keys: torch.Tensor
    n_text: torch.Tensor | None
    pi: torch.Tensor
    reference_early: torch.Tensor
    reference_deep: torch.Tensor | None

    def __call__(self, function):
        return function(*(getattr(self, name) for name in self.__dataclass_fields__))


def tokens(
    cameras, noise, device, common=1.0, dtype=torch.bfloat16, width=WIDTH, camera=CAMERA, seed=0
):
    """Projector outputs now and at the keyframe, [N, D] each: the same, moved about, and noise.

    Args:
        cameras: How many.
        noise: Its size; what tells one token from another is 0.5.
        device: Where.
        common: Size of what all tokens have in common: the greater, the more alike they are.
        dtype: Theirs.
        width: D.
        camera: Tokens of each.
        seed: Of all of it.
    """
    random = torch.Generator(device).manual_seed(seed)
    n = cameras * camera
    shared = common * torch.randn(width, generator=random, device=device)
    reference = shared + torch.randn(n, width, generator=random, device=device) / 2
    moved = torch.cat(
        [
            c * camera + torch.randperm(camera, generator=random, device=device)
            for c in range(cameras)
        ]
    )
    z = reference[moved] + noise * torch.randn(n, width, generator=random, device=device)
    lengths = torch.rand(n, 1, generator=random, device=device) + 0.5
    return (z * lengths).to(dtype), (reference * lengths).to(dtype)


def problem(
    cameras=3,
    *,
    rows="text",
    over="visual",
    text=100,
    slots=128,
    padded=True,
    lambda_=0.5,
    floor=16,
    share=0.25,
    camera=CAMERA,
    heads=HEADS,
    kv_heads=1,
    dim=DIM,
    suffix=50,
    device="cpu",
    dtype=torch.bfloat16,
    seed=0,
):
    """One of `judge`'s problems with saliency far from uniform."""
    random = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, device=device)

    n = cameras * camera
    slots = slots if padded else text
    probe = rows == "action_probe"
    # A transposed view, as the prefill leaves its queries.
    n_rows = suffix if probe else slots
    query = normal(n_rows, heads, dim).to(dtype).transpose(0, 1)[None]
    keys = normal(1, kv_heads, n + slots + probe * suffix, dim).to(dtype)
    maps = normal(4, n).exp().softmax(-1)
    return Problem(
        Vote(rows, over, n, slots),
        Selection(max(1, round(share * n)), floor, (camera,) * cameras),
        lambda_,
        query,
        keys,
        torch.full((), text, device=device) if padded else None,
        torch.randint(n, (n,), generator=random, device=device),
        maps[0],
        maps[1:] if lambda_ > 0 else None,
    )


def wide(p):
    """The same problem in fp32."""
    values = {name: getattr(p, name) for name in p.__dataclass_fields__}
    values |= {"query": p.query.float(), "keys": p.keys.float()}
    return Problem(**values)


def check_match(z, reference, cameras):
    """How many tokens match the nearest one in fp64, and what similarity the others lose."""
    pi = fused_pruner.correspond(cameras, z, reference)
    unit = torch.nn.functional.normalize(reference.double(), dim=-1)
    own = torch.nn.functional.normalize(z.double(), dim=-1)
    best = matching.match(own, unit, None if cameras is None else matching.camera_slices(cameras))
    same = float((pi == best).float().mean())
    lost = float(((own * unit[best]).sum(-1) - (own * unit[pi]).sum(-1)).max())
    plain = matching.correspond(cameras, z, reference)
    theirs = float((plain == best).float().mean())
    assert same >= theirs - 0.01, (same, theirs)
    assert lost < 1e-6, lost
    return f"exact nearest {same:.2%} (plain {theirs:.2%}), similarity lost {lost:.1e}"


def check_judge(p):
    """Greatest errors of early saliency and kappa against fp32; keep of our own scores."""
    ours, theirs = p(fused_pruner.judge), wide(p)(judgement.judge)
    early = float(((ours.early - theirs.early).abs() / theirs.early).max())
    kappa = float((ours.kappa - theirs.kappa).abs())
    scores = theirs.early
    if p.reference_deep is not None:
        scores = fuse(scores, deep_forecast(p.reference_deep, p.pi), p.lambda_)
    lost = float(scores[theirs.keep].sum() - scores[ours.keep].sum()) / float(scores.sum())
    same = len(set(ours.keep.tolist()) & set(theirs.keep.tolist())) / len(theirs.keep)
    assert early < SCORE_BAR, early
    assert kappa < SCORE_BAR, kappa
    assert abs(lost) < SCORE_BAR, lost
    assert torch.equal(ours.keep, ours.keep.unique())
    again = p(fused_pruner.judge)
    for name in ("early", "kappa", "keep"):
        assert torch.equal(getattr(ours, name), getattr(again, name)), f"{name} is not repeatable"
    return f"early {early:.1e}, kappa {kappa:.1e}, kept alike {same:.2%}, score lost {lost:.1e}"


def check_all(device):
    """Print every comparison; fail where one is worse than it may be."""
    small = device == "cpu"  # the interpreter is slow
    width = 256 if small else WIDTH
    for cameras, noise, common, within in itertools.product(
        (1, 3), (0.05, 1.0), (1.0, 20.0), (True, False)
    ):
        z, reference = tokens(cameras, noise, device, common, width=width)
        found = check_match(z, reference, (CAMERA,) * cameras if within else None)
        case = f"{cameras} cameras, noise {noise}, in common {common}, within {within}"
        print(f"match, {case}: {found}", flush=True)
    for rows, over, padded in itertools.product(
        ("text", "last_text", "action_probe"), ("visual", "all"), (True, False)
    ):
        p = problem(rows=rows, over=over, padded=padded, device=device)
        print(f"judge, {rows} over {over}, padded {padded}: {check_judge(p)}", flush=True)
    for change in ({"cameras": 1}, {"cameras": 2}, {"lambda_": 0.0}, {"floor": 0}, {"floor": 64}):
        print(f"judge, {change}: {check_judge(problem(device=device, **change))}", flush=True)


IN_A_ROW = 20
"""Calls in one graph."""


def show(name, function):
    """Print the time of a call."""
    alone, in_row = graph_us([function]), graph_us([function] * IN_A_ROW)
    print(f"{name:75} alone {alone:7.1f} us, in a row {in_row:7.1f} us", flush=True)


@torch.inference_mode()
def time_all():
    """Print the time of both functions, fused and plain."""
    for cameras, within in ((1, True), (3, True), (3, False)):
        z, reference = tokens(cameras, 0.3, "cuda")
        groups = (CAMERA,) * cameras if within else None
        for kind, module in (("fused", fused_pruner), ("plain", matching)):
            show(
                f"match, {kind}, {cameras} cameras, within {within}",
                lambda: module.correspond(groups, z, reference),  # noqa: B023 - called here
            )
    for change in ({"cameras": 1}, {}, {"over": "all"}, {"rows": "last_text"}, {"floor": 0}):
        p = problem(device="cuda", **change)
        for kind, module in (("fused", fused_pruner), ("plain", judgement)):
            show(f"judge, {kind}, {change}", lambda: p(module.judge))  # noqa: B023


@torch.inference_mode()
def time_kernels():
    """Print the time of each of the fused `judge`'s steps, 3 cameras."""
    p = problem(device="cuda")
    inputs = p.vote, p.query[0], p.keys[0], p.n_text
    show("judge: votes", lambda: fused_pruner._votes(*inputs))
    votes = fused_pruner._votes(*inputs)
    scored = votes, HEADS, p.n_text, p.pi, p.reference_deep, p.lambda_
    show("judge: scores", lambda: fused_pruner._scores(*scored))
    early, scores = fused_pruner._scores(*scored)
    ranked = p.selection, scores, early, p.pi, p.reference_early
    show("judge: kappa, ranks, indices", lambda: fused_pruner._choose(*ranked))


@torch.inference_mode()
def tune():
    """Print the time of both products in other block sizes, 3 cameras."""
    z, reference = tokens(3, 0.3, "cuda")
    names = ("ROWS", "REFERENCES", "DEPTH_BYTES", "STAGES", "WARPS")
    for sizes in (
        *itertools.product((32, 64), (64,), (128, 256), (3, 4, 6), (4,)),
        (16, 64, 256, 4, 4),
        (32, 32, 256, 4, 4),
        (32, 128, 256, 4, 4),
        (32, 128, 256, 4, 8),
        (64, 64, 256, 4, 8),
    ):
        for name, size in zip(names, sizes, strict=True):
            setattr(token_match, name, size)
        _try(
            f"match, {names} {sizes}", lambda: fused_pruner.correspond((CAMERA,) * 3, z, reference)
        )
    p = problem(device="cuda")
    names = ("ROWS", "DEPTH_BYTES", "STAGES", "WARPS")
    for sizes in (
        (16, 64, 3, 8),
        (16, 64, 2, 8),
        (16, 128, 1, 8),
        (16, 32, 4, 8),
        (16, 32, 6, 8),
        (16, 64, 3, 16),
        (32, 64, 2, 8),
        (32, 64, 3, 16),
        (8, 64, 3, 8),
    ):
        for name, size in zip(names, sizes, strict=True):
            setattr(early_votes, name, size)
        _try(
            f"votes, {names} {sizes}",
            lambda: fused_pruner._votes(p.vote, p.query[0], p.keys[0], p.n_text),
        )


def _try(name, function):
    try:
        show(name, function)
    except Exception as error:  # noqa: BLE001 - tiles that do not fit are no end
        print(f"{name:75} {type(error).__name__}", flush=True)


def main():
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    if options.device == "cpu":
        import triton_interpreter  # noqa: F401
    check_all(options.device)
    if options.device == "cpu":
        return
    time_all()
    time_kernels()
    if options.tune:
        tune()


if __name__ == "__main__":
    main()
