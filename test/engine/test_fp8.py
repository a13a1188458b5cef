"""FP8: what is quantised and how, what the kernels make of it, which files and GPUs it takes."""

import copy
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("triton", reason="the kernels need Triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels on CPU tensors, which Triton's interpreter runs", allow_module_level=True)

import triton_interpreter  # noqa: F401
from cuda_graph_checks import METHODS
from fused_prefix_checks import SMALL, Case, off, off_by_layer, random_policy, random_query
from small_policy import Frames
from test_fused import POLICY

from safe_pruner_node.engine.build import check_fp8, load_policy
from safe_pruner_node.engine.e4m3 import E4M3, LARGEST, Scales, scaled_linear, to_e4m3
from safe_pruner_node.engine.fp8 import (
    HEADROOM,
    Fp8Linear,
    is_fp8,
    layer_groups,
    quantise,
    watch_inputs,
)
from safe_pruner_node.engine.fp8_calibration import FILE, Calibration, read_calibration
from safe_pruner_node.engine.fused import FusedRunner
from safe_pruner_node.engine.fused_prefix import FusedPrefix
from safe_pruner_node.engine.kernels.activation import gelu_mul, glu_linear
from safe_pruner_node.engine.kernels.norms import Residual, rms_norm
from safe_pruner_node.engine.prefix import prefill_early, prefill_late
from safe_pruner_node.engine.products import MANY_ROWS
from safe_pruner_node.engine.session import PolicySession
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.checkpoint import checkpoint_id

LAYER = 2


def policy(config=SMALL, seed=0):
    return random_policy(config, "cpu", lambda _: torch.float32, seed)


@torch.no_grad()
def plain(model, case):
    """Visual tokens and cache by the plain model."""
    images, prompt, keep = random_query(model.config, case, "cpu")
    z = model.embed_images(images).flatten(0, 1)  # [N_vis, D]
    x = torch.cat([z[None], model.embed_text(prompt.tokens)], 1)  # [1, N, D]
    if keep is None:
        return z, model.prefill(x)
    return z, prefill_late(model, prefill_early(model, x, len(z), LAYER), keep)


def in_fp8(model, case=None):
    """The same policy in FP8, with what its inputs are on one query."""
    model = copy.deepcopy(model)
    with watch_inputs(model) as largest:
        plain(model, case or Case(2, 6, None, None))
    quantise(model, {name: float(value) for name, value in largest.items()})
    return model


def bits(x):
    return x.view(torch.uint8)


# --- the layers -----------------------------------------------------------------------------------


def test_only_the_language_models_mlps_are_replaced():
    model = in_fp8(policy())
    found = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert len(found) == 3 * (SMALL.vlm.depth - 1)
    assert all(".language_model.layers." in name and ".mlp." in name for name in found)
    assert found == {path for paths in layer_groups(model).values() for path in paths}
    assert is_fp8(model)
    assert not is_fp8(policy())


def test_a_layer_is_as_exact_as_its_numbers():
    random = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=False)
    linear.weight.data.normal_(generator=random)
    x = torch.randn(2, 5, 64, generator=random)
    scales = Scales(HEADROOM * 4 / LARGEST, 4 / LARGEST, torch.float32, x.device)
    ours = Fp8Linear(linear, scales)(x)
    assert ours.shape == (2, 5, 48)
    numbers = [to_e4m3(t, s).float() * s for t, s in ((x, scales.input), (linear.weight, 4 / 448))]
    torch.testing.assert_close(ours, numbers[0] @ numbers[1].T)
    assert 0.01 < off(ours, linear(x)) < 0.05  # 3 bits of mantissa, two operands


def test_inputs_have_room_above_the_largest_seen():
    case = Case(2, 6, None, None)
    model = policy()
    with watch_inputs(model) as largest:
        plain(model, case)
    ours = in_fp8(model, case)
    layer = ours.vlm.blocks()[1].mlp.down_proj
    assert layer.scales.input * LARGEST == pytest.approx(HEADROOM * float(largest["vlm.1.down"]))
    with watch_inputs(model) as again:
        pass
    assert again == {}  # and nothing is watched afterwards
    plain(model, case)
    assert again == {}


def test_gate_and_up_share_their_scales_and_the_larger_fits():
    model = policy()
    exact = model.vlm.blocks()[0].mlp
    exact.up_proj.weight.data *= 8
    ours = in_fp8(model).vlm.blocks()[0].mlp
    assert ours.gate_proj.scales is ours.up_proj.scales
    for a, b in ((ours.gate_proj, exact.gate_proj), (ours.up_proj, exact.up_proj)):
        assert off(a.weight.float() * a.scales.weight, b.weight) < 0.04


def test_a_size_that_gpus_do_not_multiply_is_refused():
    model = policy(replace(SMALL, vlm=replace(SMALL.vlm, mlp=40)))
    with pytest.raises(ConfigError, match=r"dtype: found fp8, and a layer .*gate_.* of \[40, 48\]"):
        quantise(model, dict.fromkeys(layer_groups(model), 1.0))
    assert not is_fp8(model)


# --- the kernels ----------------------------------------------------------------------------------


def rows(n=6, width=80, seed=0):
    x = 3 * torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    x[0, 0], x[1, 1], x[2, 2] = 1e6, -1e6, float("nan")
    return x


def check_numbers(ours, exact, scale):
    """As `to_e4m3` but for ties that a kernel's last bit decides; NaN where there was NaN."""
    assert ours.dtype == E4M3
    assert torch.equal(ours.isnan(), exact.isnan())
    there = ~exact.isnan()
    off_by = bits(ours)[there].int() - bits(to_e4m3(exact, scale))[there].int()
    assert off_by.abs().max() <= 1
    assert (off_by != 0).float().mean() < 0.01


def test_the_norm_quantises_what_it_gives():
    x, weight = rows(), torch.randn(80)
    x[:2] = x[3]  # a norm makes any row as large as its weight
    weight[7] = 1e4
    complete, exact = rms_norm(Residual(x, x[None]), weight)
    same, ours = rms_norm(Residual(x, x[None]), weight, 0.02)
    torch.testing.assert_close(same, complete, equal_nan=True)
    assert exact.nan_to_num().abs().max() > 0.02 * LARGEST  # something is cut off
    check_numbers(ours, exact, 0.02)


def test_the_activation_quantises_what_it_gives():
    x = rows()
    check_numbers(gelu_mul(x, 0.02), gelu_mul(x), 0.02)


def test_gate_and_up_in_one_product_are_the_two_steps():
    x, weight = rows(300, 96), torch.randn(2 * 176, 96) / 10
    x[:3] = x[3:6]
    scales = Scales(0.03, 0.001, torch.float32, x.device)
    numbers = to_e4m3(x, 0.03), to_e4m3(weight, 0.001)
    exact = gelu_mul(scaled_linear(*numbers, scales))  # [N, F]
    check_numbers(glu_linear(*numbers, scales, 0.001), exact, 0.001)


# --- the stages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [Case(2, 6, None, None), Case(2, 6, 8, 9), Case(1, MANY_ROWS, None, None)],
    ids=str,
)
def test_the_fused_prefill_is_the_plain_model_in_fp8(case):
    exact = policy()
    model = in_fp8(exact)
    z, cache = plain(model, case)
    _, prompt, keep = random_query(SMALL, case, "cpu")
    padded = prompt if case.bucket is None else prompt.padded(case.bucket)
    prefix = FusedPrefix(model)
    if keep is None:
        ours = prefix.read(z, padded)
    else:
        ours = prefix.late(prefix.read_early(LAYER, z, padded), keep)
    assert max(off_by_layer(ours, cache)) < 1e-2  # a tie that goes the other way is 6 %
    exact_z, exact_cache = plain(exact, case)
    torch.testing.assert_close(z, exact_z)
    assert 1e-2 < off_by_layer(ours, exact_cache)[-1] < 0.1


def test_packing_again_is_the_same_matrix():
    model = in_fp8(policy())
    first, second = FusedPrefix(model), FusedPrefix(model)
    a, b = (prefix._layers[0].gate_up for prefix in (first, second))
    assert a.weight.dtype == E4M3
    assert a.weight.data_ptr() == b.weight.data_ptr()
    assert a.weight.data_ptr() == model.vlm.blocks()[0].mlp.gate_proj.weight.data_ptr()


def test_sessions_are_the_eager_ones():
    model, frames = random_policy(POLICY, "cpu", lambda _: torch.float32), Frames(3)
    exact = PolicySession(copy.deepcopy(model), METHODS["vanilla"])
    with watch_inputs(model) as largest:
        frames.step(PolicySession(model, METHODS["vanilla"]), 0)
    quantise(model, {name: 1.5 * float(value) for name, value in largest.items()})
    ours = PolicySession(model, METHODS["safe"], runner=FusedRunner(model))
    theirs = PolicySession(model, METHODS["safe"])
    for t in range(3):
        a, b = frames.step(ours, t), frames.step(theirs, t)
        torch.testing.assert_close(a.actions, b.actions, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(a.decision.keep, b.decision.keep)
    ours.set_pruner(METHODS["vanilla"])
    assert 1e-4 < off(frames.step(ours, 1).actions, frames.step(exact, 1).actions) < 0.1


# --- the file -------------------------------------------------------------------------------------


GROUPS = ("vlm.0.gate_up", "vlm.0.down")


@pytest.fixture
def known(tmp_path, small_checkpoint):
    """A copy of a checkpoint, and a calibration that fits it."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in small_checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    values = Calibration(checkpoint_id(folder), dict.fromkeys(GROUPS, 2.0), 16, 50, 0.9996)
    values.write(folder)
    return folder, values


def test_a_calibration_is_read_as_it_was_written(known):
    folder, values = known
    assert read_calibration(folder, GROUPS) == values
    assert checkpoint_id(folder) == values.checkpoint  # which the file does not change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"checkpoint": "0123456789ab"}, "checkpoint: found 0123456789ab, expected "),
        ({"cosine": 0.9989}, "cosine: found 0.9989, expected at least 0.999"),
        ({"cosine": float("nan")}, "cosine: found nan, expected at least 0.999"),
        ({"largest": {"vlm.0.down": 1.0}}, "vlm.0.gate_up: found missing"),
        ({"largest": dict.fromkeys((*GROUPS, "other"), 1.0)}, "other: found unexpected"),
        ({"largest": {GROUPS[0]: 1.0, GROUPS[1]: 0.0}}, "vlm.0.down: found 0.0, expected one"),
        ({"largest": {GROUPS[0]: float("inf"), GROUPS[1]: 1.0}}, "vlm.0.gate_up: found inf"),
    ],
)
def test_a_calibration_that_does_not_fit_is_one_line(known, change, complaint):
    folder, values = known
    replace(values, **change).write(folder)
    with pytest.raises(ConfigError) as error:
        read_calibration(folder, GROUPS)
    assert str(error.value).startswith(f"{folder / FILE}: {complaint}")


def test_a_file_that_is_no_calibration_is_one_line(known):
    folder, _ = known
    (folder / FILE).write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match="calibrate_fp8"):
        read_calibration(folder, GROUPS)
    save_file({name: torch.ones(1) for name in GROUPS}, folder / FILE)
    with pytest.raises(ConfigError, match="checkpoint: found nothing"):
        read_calibration(folder, GROUPS)
    (folder / FILE).unlink()
    with pytest.raises(ConfigError, match=r"fp8\.safetensors: found no such file"):
        read_calibration(folder, GROUPS)


# --- where it runs --------------------------------------------------------------------------------


def test_a_cpu_is_refused_before_anything_is_read(tmp_path):
    settings = EngineSettings(tmp_path / "nothing", device="cpu", dtype="fp8")
    with pytest.raises(ConfigError, match="dtype: found fp8, on device cpu"):
        load_policy(settings)


@pytest.mark.parametrize(("capability", "fits"), [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_which_gpus(monkeypatch, capability, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    device = SimpleNamespace(type="cuda")
    if fits:
        check_fp8(device)
        return
    with pytest.raises(ConfigError, match=r"found fp8, on a GPU of compute capability 8\.6"):
        check_fp8(device)
