import pytest
import torch

from safe_pruner_node.pruning.forecast import fuse, kappa
from safe_pruner_node.pruning.saliency import visual_saliency


def explicit(query, keys, n_visual, over):
    """Head by head, with the shared key heads repeated."""
    heads, rows, dim = query.shape
    keys = keys.repeat_interleave(heads // len(keys), 0)
    maps = []
    for h in range(heads):
        for r in range(rows):
            logits = keys[h].float() @ query[h, r].float() / dim**0.5
            if over == "visual":
                logits = logits[:n_visual]
            maps.append(logits.softmax(-1)[:n_visual])
    return torch.stack(maps).mean(0)


@pytest.mark.parametrize("over", ["visual", "all"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_is_the_mean_over_heads_and_rows(over, kv_heads):
    random = torch.Generator().manual_seed(0)
    query = torch.randn(4, 3, 8, generator=random)
    keys = torch.randn(kv_heads, 20, 8, generator=random)
    ours = visual_saliency(query, keys, 15, over)
    torch.testing.assert_close(ours, explicit(query, keys, 15, over), rtol=0, atol=1e-6)


def test_a_map_over_visual_keys_sums_to_1_and_over_all_keys_to_less():
    random = torch.Generator().manual_seed(1)
    query, keys = torch.randn(2, 3, 8, generator=random), torch.randn(1, 20, 8, generator=random)
    assert visual_saliency(query, keys, 15).sum() == pytest.approx(1.0, abs=1e-6)
    assert visual_saliency(query, keys, 15, "all").sum() < 0.99


def test_is_computed_in_fp32_from_bf16():
    random = torch.Generator().manual_seed(2)
    query, keys = torch.randn(2, 3, 8, generator=random), torch.randn(1, 20, 8, generator=random)
    query, keys = query.bfloat16(), keys.bfloat16()
    ours = visual_saliency(query, keys, 20)
    assert ours.dtype == torch.float32
    theirs = visual_saliency(query.float(), keys.float(), 20)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_kappa_is_the_cosine_and_stays_in_its_range():
    a = torch.tensor([3.0, 4.0])
    assert float(kappa(a, torch.tensor([4.0, 3.0]))) == pytest.approx(24 / 25)
    many = torch.rand(768, generator=torch.Generator().manual_seed(3)).softmax(0)
    assert 1.0 - 1e-6 < float(kappa(many, 7 * many)) <= 1.0


def test_fusion_weighs_the_forecast_by_lambda():
    early, forecast = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert fuse(early, forecast, 0.25).tolist() == [0.75, 0.25]


@pytest.mark.parametrize("over", ["visual", "all"])
def test_rows_and_keys_of_padding_do_not_count(over):
    random = torch.Generator().manual_seed(4)
    query, keys = torch.randn(4, 5, 8, generator=random), torch.randn(2, 22, 8, generator=random)
    valid = torch.ones(22, dtype=torch.bool)
    valid[17:20] = False  # between the text and what comes after it
    query[:, 3:] = float("nan")
    keys[:, 17:20] = 1e30
    ours = visual_saliency(query, keys, 15, over, n_rows=torch.tensor(3), valid=valid)
    theirs = visual_saliency(query[:, :3], keys[:, valid], 15, over)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
