"""Known figures of the full-size model (width 2048, 18 layers, mlp 16384, one key head of 256)."""

import pytest

from safe_pruner_node.pruning.flops import (
    PrefillSize,
    executed_prefill,
    layer_macs,
    paper_layer,
    paper_prefill,
)

PI05 = PrefillSize(width=2048, mlp=16384, depth=18, heads=8, kv_heads=1, head_dim=256)


@pytest.mark.parametrize(
    ("n", "tera"),
    [
        (968, 2.1154),  # the paper's own figure: three camera slots and 200 text slots
        (712, 1.5425),  # two cameras and 200 text slots
        (532, 1.1455),  # two cameras and 20 text tokens
    ],
)
def test_paper_formula(n, tera):
    assert paper_prefill(n, PI05) / 1e12 == pytest.approx(tera, abs=5e-5)


def test_paper_formula_overstates_multi_query_projections():
    """By 6.4 % at N = 968; so one key/value head costs 6.0 % less than the formula says."""
    ratio = paper_layer(968, 2048, 16384) / layer_macs(968, PI05)
    assert ratio == pytest.approx(1.064, abs=5e-4)


def test_pruned_is_full_below_ls_and_short_from_there():
    full, short = paper_layer(968, 2048, 16384), paper_layer(392, 2048, 16384)
    assert paper_prefill(968, PI05, 3, 392) == 3 * full + 15 * short
    assert paper_prefill(968, PI05, 3, 968) == paper_prefill(968, PI05)


def test_executed_leaves_out_what_nobody_reads():
    """2 per multiply-add; last layer: keys and values only; layer ls-1: rows that go on."""
    full, keys_values = layer_macs(532, PI05), 2 * 532 * 2048 * 256
    assert layer_macs(532, PI05, n_rows=0) == keys_values
    assert executed_prefill(532, PI05) == 2 * (17 * full + keys_values)
    short = layer_macs(148, PI05)
    boundary = keys_values + 148 * (2 * 2048 * 2048 + 2 * 532 * 2048 + 3 * 2048 * 16384)
    last = 2 * 148 * 2048 * 256
    assert executed_prefill(532, PI05, 3, 148) == 2 * (2 * full + boundary + 14 * short + last)
