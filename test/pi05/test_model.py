"""What the engine relies on: trimming, splitting a layer, pruning and masks agree."""

import pytest
import torch

from safe_pruner_node.pi05.config import NANO, TINY
from safe_pruner_node.pi05.model import Pi05, flow_schedule

CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture
def model(tiny_model):
    return tiny_model(0)


@pytest.fixture
def prefix(model):
    random = torch.Generator().manual_seed(1)
    images = torch.rand(3, 3, 28, 28, generator=random) * 2 - 1
    tokens = torch.randint(0, TINY.vocab_size, (1, 6), generator=random)
    visual = model.embed_images(images)  # [3, 4, D]
    assert visual.shape == (3, TINY.vision.tokens, TINY.vlm.width)
    return torch.cat([visual.flatten(0, 1)[None], model.embed_text(tokens)], 1)  # [1, 18, D]


@pytest.fixture
def x_t():
    return torch.randn(1, TINY.horizon, TINY.action_dim, generator=torch.Generator().manual_seed(2))


def test_padding_with_a_mask_equals_trimming(model, prefix, x_t):
    """Padding in the middle, as an empty camera makes it."""
    valid = torch.ones(1, 24, dtype=torch.bool)
    valid[:, 4:8] = valid[:, -2:] = False
    padded = torch.randn(1, 24, TINY.vlm.width, generator=torch.Generator().manual_seed(3))
    padded[:, valid[0]] = prefix
    t = torch.tensor([0.7])
    trimmed = model.denoise(x_t, t, model.prefill(prefix), prefix.shape[1])
    kv = model.prefill(padded, mask=valid[:, None, None], positions=valid.cumsum(1) - 1)
    suffix = torch.ones(1, TINY.horizon, dtype=torch.bool)
    mask = torch.cat([valid, suffix], 1)[:, None, None]
    masked = model.denoise(x_t, t, kv, valid.sum(1), mask)
    torch.testing.assert_close(masked, trimmed, **CLOSE)


def test_a_batch_equals_its_members(model, prefix, x_t):
    other = prefix.flip(1)
    t = torch.tensor([1.0, 0.3])
    kv = model.prefill(torch.cat([prefix, other]))
    both = model.denoise(torch.cat([x_t, -x_t]), t, kv, prefix.shape[1])
    for i, (x, p) in enumerate(((x_t, prefix), (-x_t, other))):
        alone = model.denoise(x, t[i : i + 1], model.prefill(p), prefix.shape[1])
        torch.testing.assert_close(both[i : i + 1], alone, **CLOSE)


def test_a_split_layer_equals_the_whole(model, prefix):
    """Queries and MLP for some tokens only: their rows are those of the whole layer."""
    rope = model.rope(torch.arange(prefix.shape[1])[None])
    layer, keep = model.vlm.blocks()[0], torch.tensor([0, 3, 4, 11, 17])
    whole, (k, v) = layer(prefix, rope)
    q, k_split, v_split, gate = layer.qkv(prefix, rope)
    part = layer.finish(prefix[:, keep], layer.attend(q[:, :, keep], k_split, v_split), gate)
    torch.testing.assert_close(part, whole[:, keep], **CLOSE)
    assert torch.equal(k, k_split)
    assert torch.equal(v, v_split)


def test_lengths_may_differ_by_layer(model, prefix, x_t):
    """Fewer keys in later layers equal a mask over them; positions stay those of all tokens."""
    keep = torch.tensor([0, 2, 5, 12, 13, 14, 15, 16, 17])
    kv, t, n = model.prefill(prefix), torch.tensor([0.5]), prefix.shape[1]
    gathered = kv[:2] + [(k[:, :, keep], v[:, :, keep]) for k, v in kv[2:]]
    one = model.denoise(x_t, t, gathered, n)

    cond, x = model.time_condition(t), model.embed_actions(x_t)
    rope = model.rope(n + torch.arange(TINY.horizon)[None])
    kept = torch.zeros(n + TINY.horizon, dtype=torch.bool)
    kept[keep] = kept[n:] = True
    for i, layer in enumerate(model.expert.blocks()):
        x, _ = layer(x, rope, kv[i], cond, kept[None, None, None] if i >= 2 else None)
    torch.testing.assert_close(one, model.velocity(x, cond), **CLOSE)
    shifted = model.denoise(x_t, t, gathered, len(keep))  # the trap: the pruned length
    assert (shifted - one).abs().max() > 1e-4


def test_sample_actions_is_its_parts(model, x_t):
    random = torch.Generator().manual_seed(4)
    images = [torch.rand(1, 3, 28, 28, generator=random) for _ in range(2)]
    tokens = torch.randint(0, TINY.vocab_size, (1, 3), generator=random)
    prefix = torch.cat([*map(model.embed_images, images), model.embed_text(tokens)], 1)
    kv, x = model.prefill(prefix), x_t
    for t in (1.0, 0.75, 0.5, 0.25):
        x = x - 0.25 * model.denoise(x, torch.tensor([t]), kv, 11)
    torch.testing.assert_close(model.sample_actions(images, tokens, x_t, 4), x, **CLOSE)


def test_schedule_runs_from_noise_to_action():
    times, dt = flow_schedule(10)
    assert times[0] == 1.0
    assert len(times) == 10
    assert dt == pytest.approx(-0.1)
    assert times == pytest.approx([1.0 - 0.1 * i for i in range(10)], abs=1e-6)


def test_sizes():
    assert TINY.vision.tokens == 4
    assert NANO.vision.tokens == 256
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Pi05(NANO).parameters())
    assert 5e6 < parameters < 24e6  # below 48 MB in bf16
