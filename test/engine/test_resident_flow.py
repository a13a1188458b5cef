"""What the resident flow's kernel is given, and when it is asked: all that needs no GPU."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from image_reference import in_chunk

from safe_pruner_node.engine import resident_flow
from safe_pruner_node.engine.cuda import expert_flow
from safe_pruner_node.engine.expert_weights import ExpertLayer
from safe_pruner_node.engine.flow import DeepProbe, DeepSettings
from safe_pruner_node.engine.resident_flow import fits, unsupported
from safe_pruner_node.engine.resident_images import layer_images
from safe_pruner_node.pi05.config import PI05

WIDTH, HEADS, HEAD_DIM, MLP = 128, 8, 256, 4096
SHARES = 8


def numbered(*shape):
    """A tensor whose every number is its place."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)


def test_every_program_finds_its_rows_of_a_projection():
    layer = ExpertLayer(
        qkv=numbered((HEADS + 2) * HEAD_DIM, WIDTH),
        o=numbered(WIDTH, HEADS * HEAD_DIM),
        gate_up=numbered(2 * MLP, WIDTH),
        down=numbered(WIDTH, MLP),
    )
    images = layer_images(layer, HEAD_DIM)
    k = torch.randint(WIDTH, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    qkv, gate_up = images.qkv.flatten(), images.gate_up.flatten()
    for tile in (0, 7, 8, 63, 70, 79):
        head, eighth = divmod(tile, 8)
        for row in range(32):
            channel = head * HEAD_DIM + row // 16 * HEAD_DIM // 2 + eighth * 16 + row % 16
            at = tile * 32 * WIDTH + k[row] // 64 * 32 * 64 + in_chunk(row, k[row] % 64)
            assert qkv[at] == layer.qkv[channel, k[row]]
    for program in (0, 1, 64, 127):
        for row in range(64):
            channel = row // 32 * MLP + program * 32 + row % 32
            at = program * 64 * WIDTH + k[row] // 64 * 64 * 64 + in_chunk(row, k[row] % 64)
            assert gate_up[at] == layer.gate_up[channel, k[row]]


@pytest.mark.parametrize(("name", "depth"), [("o", HEADS * HEAD_DIM), ("down", MLP)])
def test_every_program_finds_its_share_of_a_split_product(name, depth):
    weight = numbered(WIDTH, depth)
    nothing = torch.zeros(2 * MLP, 64, dtype=torch.int32)
    others = {"qkv": nothing[: 2 * HEAD_DIM], "gate_up": nothing, "o": weight, "down": weight}
    image = getattr(layer_images(ExpertLayer(**others), HEAD_DIM), name).flatten()
    own = depth // SHARES  # columns of a share
    for program in (0, 1, 7, 8, 15):
        tile, share = divmod(program, SHARES)
        for row in range(64):
            column = (37 * row + 11) % own
            at = program * 64 * own + column // 64 * 64 * 64 + in_chunk(row, column % 64)
            assert image[at] == weight[tile * 64 + row, share * own + column]


def test_layers_with_as_many_keys_take_turns():
    assert expert_flow.kinds([900, 900, 300, 900, 300]) == [(0, 3), (1, 3), (0, 2), (2, 3), (1, 2)]


def test_all_that_programs_share_is_made_zero_and_nothing_lies_in_two_places():
    groups = [resident_flow._buffers(50), resident_flow._parts(200, 50)]
    whole, found = resident_flow._room(groups, torch.device("cpu"))
    assert [set(group) for group in found] == [set(group) for group in groups]
    sizes = [size for group in groups for size in group.values()]
    buffers = [buffer for group in found for buffer in group.values()]
    end = whole.data_ptr()
    for size, buffer in zip(sizes, buffers, strict=True):
        assert buffer.data_ptr() == end  # so no two overlap
        assert len(buffer) >= size
        end += len(buffer)
        assert (end - whole.data_ptr()) % 256 == 0
    assert end == whole.data_ptr() + len(whole)
    assert len(whole) % expert_flow.WORD == 0


@pytest.mark.parametrize("steps", ["mean", "first", "last"])
@pytest.mark.parametrize("layers", [(0, 16, 17), (16, 0, 17), (3,)])
def test_saliency_is_in_the_order_of_the_settings(layers, steps):
    n_steps, horizon, n_visual = 4, 10, 64
    deep = DeepSettings(layers, n_visual, "all", steps)
    flow = expert_flow.Flow()
    size = resident_flow._watch(flow, deep, n_steps, horizon)["saliency"]
    room = torch.zeros(len(layers), expert_flow.PROGRAMS, n_visual)
    assert size == room.numel() * room.element_size()
    # As the kernel: a program adds its share of the mean in a layer's place, step after step.
    counted = flow.last_watched - flow.first_watched + 1
    seen = set()
    for step in range(flow.first_watched, flow.last_watched + 1):
        seen.add(step)
        for layer in range(PI05.expert.depth):
            if flow.watched[layer] >= 0:
                room[flow.watched[layer]] += (100.0 * layer + step) / expert_flow.PROGRAMS / counted
    assert seen == set(DeepProbe(deep, n_steps)._steps)
    means = [100.0 * layer + sum(seen) / len(seen) for layer in layers]
    found = resident_flow._by_layer(room.flatten(), len(layers), n_visual)
    torch.testing.assert_close(found, torch.tensor(means)[:, None].expand(-1, n_visual))


def test_calls_that_the_kernel_cannot_do():
    def cache(*lengths):
        return [(torch.empty(1, 1, n, 8), torch.empty(1, 1, n, 8)) for n in lengths]

    watched = DeepSettings((0,), 768, "visual", "mean")
    assert fits(watched, cache(896, 896), 50)
    assert fits(None, cache(896, 320), 64)
    assert not fits(None, cache(896, 320), 65)
    assert not fits(replace(watched, n_visual=761), cache(896), 50)
    assert fits(None, cache(32 * 64 - 50, 320), 50)
    assert not fits(None, cache(320, 32 * 64 - 49), 50)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"multi_processor_count": 114}, "128 multiprocessors"),  # H100 PCIe
        ({"major": 10, "multi_processor_count": 148}, "SM 9.0"),  # B200
        ({"device": torch.device("cpu")}, "device cpu"),
        ({"dtype": torch.float32}, "bf16"),
        ({"actions": torch.bfloat16}, "projections in fp32"),
        ({"config": replace(PI05, action_dim=36)}, "action_dim 36"),
        ({"config": replace(PI05, action_dim=30)}, "action_dim 30"),
        ({"config": replace(PI05, expert=replace(PI05.expert, mlp=2048))}, "expert of π0.5"),
        ({"missing": "cuda"}, "cuda-bindings"),
        ({"missing": "cuda.bindings"}, "cuda-bindings"),
    ],
)
def test_what_the_kernel_is_for(monkeypatch, change, why):
    of_gpu = {"name": "a GPU", "major": 9, "minor": 0, "multi_processor_count": 132}
    gpu = SimpleNamespace(**of_gpu | {k: v for k, v in change.items() if k in of_gpu})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    missing = change.get("missing")
    monkeypatch.setattr(resident_flow, "find_spec", lambda name: None if name == missing else name)
    projection = SimpleNamespace(weight=torch.empty(1, dtype=change.get("actions", torch.float32)))
    fitting = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "config": PI05}
    model = SimpleNamespace(
        **fitting | {k: v for k, v in change.items() if k in fitting},
        action_in_proj=projection,
        action_out_proj=projection,
    )
    reason = unsupported(model)
    assert reason is None if why is None else why in reason
