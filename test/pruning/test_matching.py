import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_pruner_node.pruning.forecast import deep_forecast, transfer
from safe_pruner_node.pruning.matching import match, unit_rows

sizes = st.lists(st.integers(1, 6), min_size=1, max_size=4)  # tokens per camera
seeds = st.integers(0, 10_000)
bounded = settings(deadline=None, max_examples=50)


def spans(tokens):
    ends = torch.tensor(tokens).cumsum(0).tolist()
    return [slice(end - n, end) for n, end in zip(tokens, ends, strict=True)]


def embeddings(n, seed, dim=8):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@bounded
@given(sizes, seeds)
def test_every_token_gets_its_most_similar_reference_token(tokens, seed):
    n = sum(tokens)
    z, ref = unit_rows(embeddings(n, seed)), unit_rows(embeddings(n, seed + 1))
    pi = match(z, ref)
    similarity = torch.nn.functional.cosine_similarity(z[:, None], ref[None], dim=-1)
    best = similarity.max(1).values
    torch.testing.assert_close(similarity[torch.arange(n), pi], best, rtol=0, atol=1e-6)


@bounded
@given(sizes, seeds)
def test_within_a_camera_stays_within_it_and_is_the_best_there(tokens, seed):
    n = sum(tokens)
    z, ref = unit_rows(embeddings(n, seed)), unit_rows(embeddings(n, seed + 1))
    cameras = spans(tokens)
    pi = match(z, ref, cameras)
    for camera in cameras:
        assert ((pi[camera] >= camera.start) & (pi[camera] < camera.stop)).all()
        alone = match(z[camera], ref[camera])
        assert (pi[camera] - camera.start).tolist() == alone.tolist()


@bounded
@given(sizes, seeds, st.floats(0.1, 10.0))
def test_the_same_tokens_match_themselves_whatever_their_length(tokens, seed, scale):
    z = embeddings(sum(tokens), seed)
    for cameras in (None, spans(tokens)):
        pi = match(unit_rows(z * scale), unit_rows(z), cameras)
        assert pi.tolist() == list(range(len(z)))


@bounded
@given(st.integers(2, 12), seeds)
def test_moved_tokens_are_found_and_many_may_share_one(n, seed):
    random = torch.Generator().manual_seed(seed)
    ref = embeddings(n, seed)
    source = torch.randint(0, n, (n,), generator=random)  # with repetitions
    moved = ref[source] + 1e-4 * torch.randn(n, 8, generator=random)
    pi = match(unit_rows(moved), unit_rows(ref))
    assert pi.tolist() == source.tolist()
    saliency = torch.rand(3, n, generator=random)
    torch.testing.assert_close(transfer(saliency, pi), saliency[:, source], rtol=0, atol=0)
    torch.testing.assert_close(deep_forecast(saliency, pi), saliency[:, source].mean(0))


def test_ties_go_to_the_lowest_index():
    ref = unit_rows(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [2.0, 0.0]]))
    z = unit_rows(torch.tensor([[5.0, 0.0]] * 4))
    assert match(z, ref).tolist() == [1, 1, 1, 1]
    assert match(z, ref, [slice(0, 2), slice(2, 4)]).tolist() == [1, 1, 2, 2]


def test_bf16_tokens_are_normalised_in_fp32():
    z = embeddings(4, 0).bfloat16()
    assert unit_rows(z).dtype == torch.float32
    assert unit_rows(z).norm(dim=-1) == pytest.approx(1.0, abs=1e-6)
