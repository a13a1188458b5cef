"""The fused vision tower and prefill are the plain ones, on a GPU or in Triton's interpreter."""

# ruff: noqa: E402 - what follows the skips needs Triton

import copy
import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

import triton_interpreter  # noqa: F401
from fused_prefix_checks import (
    BAR,
    SMALL,
    Case,
    check,
    off,
    off_by_layer,
    random_policy,
    random_query,
)
from torch.nn.functional import gelu, scaled_dot_product_attention

from safe_pruner_node.engine.fused_prefix import MAX_TOKENS, FusedPrefix
from safe_pruner_node.engine.fused_vision import FusedVision
from safe_pruner_node.engine.kernels import norms, prefill_attention
from safe_pruner_node.engine.kernels.activation import COLUMNS, GROUP, ROWS, gelu_mul, glu_linear
from safe_pruner_node.engine.kernels.attention import TILES, attention
from safe_pruner_node.engine.kernels.norms import Residual, layer_norm
from safe_pruner_node.engine.kernels.rotary import rotate_split
from safe_pruner_node.engine.packed_weights import interleave, stack
from safe_pruner_node.engine.prefix import prefill_early, prefill_late
from safe_pruner_node.engine.products import LONG, MANY_ROWS, Products
from safe_pruner_node.engine.projection import Projection
from safe_pruner_node.engine.prompt import Prompt

DEVICE = "cpu" if INTERPRETED else "cuda"
LAYER = 2
VISION_TOLERANCE = 1e-5 if INTERPRETED else 2e-3  # a GPU multiplies pixels in TF32


def policy(config=SMALL):
    return random_policy(config, DEVICE, lambda _: torch.float32)


def heads(kv_heads, head_dim):
    change = {"kv_heads": kv_heads, "head_dim": head_dim}
    return replace(SMALL, vlm=replace(SMALL.vlm, **change), expert=replace(SMALL.expert, **change))


def query(model, text=5, kept=9, cameras=1):
    """Visual tokens, the prompt, and what to keep."""
    case = Case(cameras, text, None, kept)
    images, prompt, keep = random_query(model.config, case, DEVICE)
    return model.embed_images(images).flatten(0, 1), prompt, keep


def embedded(model, z, prompt):
    return torch.cat([z[None], model.embed_text(prompt.tokens)], 1)


@pytest.mark.parametrize("n_heads", [2, 3, 6])  # 24, 16 and 8 channels each
def test_vision_is_the_plain_one(n_heads):
    model = policy(replace(SMALL, vision=replace(SMALL.vision, heads=n_heads)))
    images, _, _ = random_query(model.config, Case(2, 1, None, None), DEVICE)
    expected = model.embed_images(images).flatten(0, 1)
    assert off(FusedVision(model)(images), expected) < VISION_TOLERANCE


@pytest.mark.parametrize("bucket", [None, 32])
@pytest.mark.parametrize("text", [5, 70])
def test_read_is_the_plain_prefill(text, bucket):
    model = policy()
    z, prompt, _ = query(model, text)
    expected = model.prefill(embedded(model, z, prompt))
    given = prompt if bucket is None else prompt.padded(bucket)
    cache = FusedPrefix(model).read(z, given)
    assert max(off_by_layer(cache, expected)) < 1e-5
    n = len(z) + given.slots
    shape = (1, 1, n, model.config.vlm.head_dim)
    assert all(t.shape == shape and t.is_contiguous() for pair in cache for t in pair)


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 8), (2, 16), (4, 24)])
def test_other_heads(kv_heads, head_dim):
    model = policy(heads(kv_heads, head_dim))
    z, prompt, keep = query(model)
    fused = FusedPrefix(model)
    x = embedded(model, z, prompt)
    assert max(off_by_layer(fused.read(z, prompt), model.prefill(x))) < 1e-5
    expected = prefill_late(model, prefill_early(model, x, len(z), LAYER), keep)
    cache = fused.late(fused.read_early(LAYER, z, prompt.padded(8)), keep)
    assert max(off_by_layer(cache, expected)) < 1e-5


@pytest.mark.parametrize("kept", [None, 1, 9])
@pytest.mark.parametrize("layer", [1, 3])
def test_early_and_late_are_the_plain_ones(layer, kept):
    model = policy()
    z, prompt, keep = query(model, kept=kept)
    fused = FusedPrefix(model)
    plain = prefill_early(model, embedded(model, z, prompt), len(z), layer)
    early = fused.read_early(layer, z, prompt)
    assert (early.layer, early.n_visual, early.prompt_valid) == (layer, len(z), None)
    for name in ("x", "normed", "text_query"):
        a, b = getattr(early, name), getattr(plain, name)
        assert a.shape == b.shape, name
        assert off(a, b) < 1e-5, name
    assert all(torch.equal(a, b) for a, b in zip(early.rope, plain.rope, strict=True))
    assert max(off_by_layer(early.cache, plain.cache)) < 1e-5
    cache = fused.late(early, keep)
    assert max(off_by_layer(cache, prefill_late(model, plain, keep))) < 1e-5
    assert cache[-1][0].shape[2] == (len(z) if keep is None else len(keep)) + prompt.slots
    # A graph replays `late` on what `read_early` left: it may not change that.
    assert off(early.x, plain.x) < 1e-5
    again = fused.late(early, keep)
    assert all(torch.equal(a, b) for a, b in zip(sum(cache, ()), sum(again, ()), strict=True))


def test_padding_is_read_by_nobody():
    model = policy()
    z, prompt, keep = query(model)
    fused = FusedPrefix(model)
    padded = prompt.padded(8)
    garbage = padded.tokens.clone()
    garbage[:, prompt.slots :] = torch.arange(1, 4, device=DEVICE)
    other = Prompt(garbage, padded.n_valid)
    runs = [
        [fused.read(z, p), fused.late(fused.read_early(LAYER, z, p), keep)] for p in (padded, other)
    ]
    padding = padded.slots - prompt.slots
    for first, second in zip(*runs, strict=True):
        for a, b in zip(first, second, strict=True):
            for i, j in zip(a, b, strict=True):
                valid = i.shape[2] - padding
                assert torch.equal(i[:, :, :valid], j[:, :, :valid])
                assert not torch.equal(i[:, :, valid:], j[:, :, valid:])
    early = fused.read_early(LAYER, z, padded)
    assert early.prompt_valid is padded.n_valid


def test_a_prefix_that_is_too_long_is_refused():
    model = policy()
    tokens = torch.zeros(1, MAX_TOKENS, dtype=torch.long, device=DEVICE)
    with pytest.raises(ValueError, match=f"{MAX_TOKENS + 4} tokens"):
        FusedPrefix(model).read(torch.zeros(4, SMALL.vlm.width, device=DEVICE), Prompt(tokens))


def test_packing_changes_no_value_and_doubles_no_memory():
    model = policy()
    images, prompt, _ = random_query(model.config, Case(1, 5, None, None), DEVICE)
    before = {name: p.clone() for name, p in model.named_parameters()}
    z = model.embed_images(images).flatten(0, 1)
    FusedVision(model)
    FusedPrefix(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    storages = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
    held = sum(p.untyped_storage().nbytes() for p in storages.values())
    assert held == sum(p.nbytes for p in before.values())
    # Loading other weights the usual way reaches the packed matrices.
    fused = FusedPrefix(model)
    model.load_state_dict({name: p * 1.1 for name, p in before.items()})
    expected = model.prefill(embedded(model, z, prompt))
    assert max(off_by_layer(fused.read(z, prompt), expected)) < 1e-5


@pytest.mark.parametrize("pack", [stack, interleave])
def test_packing_again_gives_the_same_matrix(pack):
    parameters = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
    first = pack(*parameters)
    assert pack(*parameters).data_ptr() == first.data_ptr()
    assert pack(*reversed(parameters)).data_ptr() != first.data_ptr()  # another order: another one


def test_attention_of_groups_with_large_scores():
    torch.manual_seed(0)
    most = 2 * TILES.keys + 9
    q = torch.randn(2, 25, 2, 3, 24, device=DEVICE) * 40  # [B, N, g, r, d]
    k, v = torch.randn(2, 2, 2, most, 24, device=DEVICE)  # [B, g, M, d] each
    plain = q.flatten(2, 3).transpose(1, 2)  # [B, g * r, N, d]
    for valid in (None, 1, 9, 20):
        n_keys = most if valid is None else most - 20 + valid
        expected = scaled_dot_product_attention(
            plain, k[:, :, :n_keys], v[:, :, :n_keys], enable_gqa=True
        )
        limit = None if valid is None else torch.tensor(valid, device=DEVICE)
        out = attention(q, k, v, limit, 20)
        assert off(out.flatten(2, 3).transpose(1, 2), expected) < 1e-5


@pytest.mark.parametrize("valid", [None, 1, 20])
def test_prefill_attention_with_large_scores(valid):
    torch.manual_seed(0)
    most = 2 * prefill_attention.TILES.keys + 9  # the last block has padding and what is no key
    q = torch.randn(25, 3, 16, device=DEVICE) * 40  # [N, h, d]
    k, v = torch.randn(2, 1, 1, most, 16, device=DEVICE)  # [1, 1, M, d] each
    n_keys = most if valid is None else most - 20 + valid
    expected = scaled_dot_product_attention(
        q.transpose(0, 1), k[0, :, :n_keys], v[0, :, :n_keys]
    )  # [h, N, d]
    limit = None if valid is None else torch.tensor(valid, device=DEVICE)
    out = prefill_attention.prefill_attention(q, k, v, limit, 20)
    assert off(out.unflatten(1, (3, 16)), expected.transpose(0, 1)) < 1e-5


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "fit"),
    [(1, 256, True), (1, 16, True), (1, 8, False), (1, 72, False), (1, 512, False), (2, 64, False)],
)
def test_what_prefill_attention_is_for(kv_heads, head_dim, fit):
    assert prefill_attention.fits(torch.empty(1, kv_heads, 3, head_dim)) is fit


def test_gelu_at_the_ends():
    gate = torch.tensor([-1e4, -30.0, -3.0, -1e-3, 0.0, 1e-3, 3.0, 30.0, 1e4], device=DEVICE)
    up = torch.full_like(gate, 2.0)
    both = torch.stack([gate, up], 1).flatten()[None]  # [1, 2F]
    expected = gelu(gate, approximate="tanh") * up
    torch.testing.assert_close(gelu_mul(both)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("width", "warps"), [(48, 1), (1152, 2), (1600, 2), (2048, 4)])
def test_wide_rows_are_normed_by_more_warps(width, warps):
    assert norms._warps(width) == warps  # Triton takes powers of two only


@pytest.mark.parametrize("terms", [0, 1, 3])
def test_layer_norm_completes_the_residual_first(terms):
    torch.manual_seed(0)
    x = torch.randn(3, 24, device=DEVICE) * 100 + 1e3
    weight, bias, added = torch.randn(3, 24, device=DEVICE)
    more = torch.randn(terms, 3, 24, device=DEVICE) * 100
    complete = x + more.sum(0) + added if terms else x
    before = x.clone()
    residual = Residual(x, more, added) if terms else Residual(x)
    found, y = layer_norm(residual, weight, bias)
    torch.testing.assert_close(found, complete)
    expected = torch.nn.functional.layer_norm(complete, (24,), weight, bias, 1e-6)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(x, before)


def test_gelu_in_the_gemm_is_the_gemm_and_then_gelu():
    torch.manual_seed(0)
    dtype = torch.float32 if INTERPRETED else torch.bfloat16  # fp32 tiles are too large for a GPU
    # More tiles than programs, more of rows than a group has, and the last ones not full
    rows, channels = GROUP * ROWS + 3, COLUMNS // 2 + 8
    x = torch.randn(rows, 72, device=DEVICE, dtype=dtype)  # [N, D]
    weight = torch.randn(2 * channels, 72, device=DEVICE, dtype=dtype) / 8  # [2F, D]
    expected = gelu_mul(x.float() @ weight.float().T)  # [N, F]
    assert off(glu_linear(x, weight), expected) < (1e-5 if INTERPRETED else 4e-3)


def test_a_long_projection_is_two_terms():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 80), torch.randn(80 // LONG, 80)
    terms = Products().terms(x, Projection(weight))
    torch.testing.assert_close(terms[0], x[:, :40] @ weight[:, :40].T)
    torch.testing.assert_close(terms.sum(0), x @ weight.T)
    assert len(Products().terms(x, Projection(torch.randn(80 // LONG + 1, 80)))) == 1


def test_rotation_adds_up_terms():
    torch.manual_seed(0)
    rope = tuple(torch.randn(9, 8, device=DEVICE) for _ in range(2))
    rope = tuple(torch.cat([t[:, :4]] * 2, 1) for t in rope)  # both halves are the same
    positions = torch.tensor([4, 0, 8], device=DEVICE)
    terms = torch.randn(3, 3, (2 + 2) * 8, device=DEVICE)
    query, (keys, values) = rotate_split(terms, rope, positions, 2, 1)
    whole = rotate_split(terms.sum(0, keepdim=True), rope, positions, 2, 1)
    for ours, expected in zip((query, keys, values), (whole[0], *whole[1]), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("depth", "case"),
    [
        (4, Case(1, 5, 8, 9)),
        (4, Case(2, 6, None, None)),
        (2, Case(1, MANY_ROWS, None, 9)),
    ],
    ids=str,
)
def test_bf16_is_about_as_exact_as_the_plain_model(depth, case):
    deep = {"vlm": replace(SMALL.vlm, depth=depth), "expert": replace(SMALL.expert, depth=depth)}
    model = random_policy(replace(SMALL, **deep), DEVICE)
    assert check(model, copy.deepcopy(model).float(), case) < BAR
