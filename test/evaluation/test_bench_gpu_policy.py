"""The random policy: one that a wrong path cannot hide behind."""

from dataclasses import replace

import pytest
import torch
from bench_gpu_side import CPU, SMALL, small_policy

from safe_pruner_node.engine.session import PolicySession
from safe_pruner_node.evaluation.bench_gpu import methods
from safe_pruner_node.evaluation.bench_gpu.policy import in_fp32, random_policy
from safe_pruner_node.evaluation.bench_gpu.queries import BASE, random_query
from safe_pruner_node.pi05.checkpoint import mixed_dtype


def test_two_processes_would_build_the_same_weights_in_mixed_precision():
    again = dict(random_policy(SMALL, CPU).named_parameters())
    for name, parameter in small_policy().named_parameters():
        assert torch.equal(parameter, again[name]), name
        assert parameter.dtype == mixed_dtype(name), name


def test_fp32_has_the_same_weights():
    exact = dict(in_fp32(small_policy()).named_parameters())
    for name, parameter in small_policy().named_parameters():
        assert exact[name].dtype == torch.float32
        assert torch.equal(parameter.float(), exact[name]), name


@pytest.fixture(scope="module")
def far():
    """How far the actions move, relatively, when a part of the query is another's."""
    model = in_fp32(small_policy())
    session = PolicySession(model, methods.full())
    query, other = (random_query(SMALL, BASE, seed, CPU) for seed in (0, 1))
    actions = query.run(session).actions

    def measure(**changes):
        changed = {
            key: change(getattr(query, key), getattr(other, key)) for key, change in changes.items()
        }
        moved = replace(query, **changed).run(session).actions
        return float((moved - actions).norm() / actions.norm())

    return measure


@pytest.mark.parametrize("part", ["images", "tokens", "noise"])
def test_every_input_has_a_say_far_above_the_error_of_bf16(far, part):
    assert far(**{part: lambda _, other: other}) > 0.1


@pytest.mark.parametrize("camera", [0, 1, 2])
def test_so_has_every_camera(far, camera):
    def swap(ours, theirs):
        mixed = ours.clone()
        mixed[camera] = theirs[camera]
        return mixed

    assert far(images=swap) > 0.05


def test_queries_of_two_seeds_share_nothing_and_of_one_everything():
    a, again, b = (random_query(SMALL, BASE, seed, CPU) for seed in (3, 3, 4))
    assert torch.equal(a.images, again.images)
    assert torch.equal(a.tokens, again.tokens)
    assert not (a.images == b.images).any()
    assert a.images.min() >= -1
    assert a.images.max() <= 1
