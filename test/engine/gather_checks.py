"""Gathered rows against torch's own, and times of both in CUDA graphs; no pytest here.

python test/engine/gather_checks.py                                        full size on CUDA
TRITON_INTERPRET=1 python test/engine/gather_checks.py --device cpu        equality only
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from graph_time import graph_us

from safe_pruner_node.engine.kernels.gather import embed_rows, kept_rows

VISUAL, TEXT, KEPT, WIDTH, VOCABULARY = 768, 128, 192, 2048, 50_000
SCALE = math.sqrt(WIDTH)
CALLS = 20
"""In one graph."""


@torch.inference_mode()
def main():
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    if device == "cpu":
        import triton_interpreter  # noqa: F401
    torch.manual_seed(0)
    x, normed = torch.randn(2, VISUAL + TEXT, WIDTH, device=device).bfloat16()
    table = torch.randn(VOCABULARY, WIDTH, device=device).bfloat16()
    tokens = torch.randint(VOCABULARY, (TEXT,), device=device)
    text, z = normed[VISUAL:], x[:VISUAL]
    keep = torch.randperm(VISUAL, device=device)[:KEPT].sort().values
    query, expected = torch.zeros(2, KEPT + TEXT, WIDTH, device=device).bfloat16()
    last = torch.arange(VISUAL, len(x), device=device)

    def kept_by_torch():
        rows = torch.cat([keep, last])
        expected[KEPT:].copy_(text)
        return x.index_select(0, rows), normed.index_select(0, keep), rows

    cases = {
        "embed_rows": (
            lambda: (embed_rows(z, tokens, table, SCALE),),
            lambda: (torch.cat([z, torch.nn.functional.embedding(tokens, table) * SCALE]),),
        ),
        "kept_rows": (lambda: kept_rows(x, normed, text, keep, query), kept_by_torch),
    }
    for name, (ours, by_torch) in cases.items():
        for a, b in zip(ours(), by_torch(), strict=True):
            assert torch.equal(a, b), name
        print(f"{name}: equal", flush=True)
        if device != "cpu":
            us, torch_us = graph_us([ours] * CALLS), graph_us([by_torch] * CALLS)
            print(f"  {us:.2f} us, torch {torch_us:.2f} us", flush=True)
    assert torch.equal(query, expected)


if __name__ == "__main__":
    main()
