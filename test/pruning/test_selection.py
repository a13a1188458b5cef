from itertools import combinations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_pruner_node.pruning.selection import top_k_with_floors

bounded = settings(deadline=None, max_examples=50)


@st.composite
def problems(draw, max_tokens=8):
    """(scores, k, cameras, floor) with ties, unequal cameras and feasible floors."""
    tokens = draw(st.lists(st.integers(1, max_tokens), min_size=1, max_size=3))
    n = sum(tokens)
    scores = draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    floor = draw(st.integers(0, max(tokens)))
    k = draw(st.integers(max(1, sum(min(floor, t) for t in tokens)), n))
    ends = torch.tensor(tokens).cumsum(0).tolist()
    cameras = [slice(end - t, end) for t, end in zip(tokens, ends, strict=True)]
    return torch.tensor(scores, dtype=torch.float32), k, cameras, floor


def sorted_selection(scores, k, cameras, floor):
    """The same by sorting."""
    order = scores.argsort(descending=True, stable=True)
    owed = torch.zeros(len(scores), dtype=torch.uint8)
    for camera in cameras:
        owed[camera.start + scores[camera].argsort(descending=True, stable=True)[:floor]] = 1
    order = order[owed[order].argsort(descending=True, stable=True)]
    return order[:k].sort().values


@settings(deadline=None, max_examples=300)
@given(problems(max_tokens=12), st.data())
def test_is_what_sorting_gives(problem, data):
    scores, k, cameras, floor = problem
    unordered = data.draw(st.sets(st.integers(0, len(scores) - 1)))
    scores[list(unordered)] = float("nan")
    assert torch.equal(
        top_k_with_floors(scores, k, cameras, floor), sorted_selection(scores, k, cameras, floor)
    )


def inside(keep, camera):
    return [i for i in keep if camera.start <= i < camera.stop]


@bounded
@given(problems())
def test_exactly_k_ascending_distinct_and_floors_respected(problem):
    scores, k, cameras, floor = problem
    keep = top_k_with_floors(scores, k, cameras, floor).tolist()
    assert len(keep) == k
    assert keep == sorted(set(keep))
    for camera in cameras:
        assert len(inside(keep, camera)) >= min(floor, camera.stop - camera.start)


@bounded
@given(problems(max_tokens=4))
def test_no_other_choice_within_the_floors_scores_more(problem):
    scores, k, cameras, floor = problem
    keep = top_k_with_floors(scores, k, cameras, floor)
    best = max(
        float(scores[list(choice)].sum())
        for choice in combinations(range(len(scores)), k)
        if all(
            len(inside(choice, camera)) >= min(floor, camera.stop - camera.start)
            for camera in cameras
        )
    )
    assert float(scores[keep].sum()) == best


@bounded
@given(problems())
def test_ties_go_to_the_lower_index(problem):
    scores, k, cameras, floor = problem
    keep = top_k_with_floors(scores, k, cameras, floor).tolist()
    for camera in cameras:  # within a camera the floor cannot be what decides
        for i in set(range(camera.start, camera.stop)) - set(keep):
            assert not any(j > i and scores[j] == scores[i] for j in inside(keep, camera))


@bounded
@given(problems(), st.data())
def test_a_kept_token_that_scores_more_stays_kept(problem, data):
    scores, k, cameras, floor = problem
    keep = top_k_with_floors(scores, k, cameras, floor).tolist()
    token = data.draw(st.sampled_from(keep))
    raised = scores.clone()
    raised[token] += data.draw(st.integers(1, 5))
    assert token in top_k_with_floors(raised, k, cameras, floor).tolist()


@bounded
@given(problems())
def test_more_tokens_keep_all_that_fewer_kept(problem):
    scores, k, cameras, floor = problem
    keep = set(top_k_with_floors(scores, k, cameras, floor).tolist())
    if k < len(scores):
        assert keep < set(top_k_with_floors(scores, k + 1, cameras, floor).tolist())


def test_without_floors_it_is_the_plain_top_k():
    scores = torch.rand(768, generator=torch.Generator().manual_seed(0))
    keep = top_k_with_floors(scores, 192, [slice(0, 768)])
    assert keep.tolist() == scores.topk(192).indices.sort().values.tolist()
    assert keep.dtype == torch.int64
