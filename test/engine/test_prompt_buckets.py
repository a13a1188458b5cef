"""Padding a prompt changes nothing, whatever is in it."""

from dataclasses import replace

import pytest
import torch
from cuda_graph_checks import METHODS
from hypothesis import given, settings
from hypothesis import strategies as st
from small_policy import SMALL, Frames

from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.engine.session import PolicySession

CLOSE = 2e-5  # another number of keys: sums in another order
PADDED = ["safe", "safe, all keys, action probe", "safe, last text row", "fastv", "vanilla"]


class PaddedSession(PolicySession):
    """Fills the prompt up with given tokens."""

    filling: torch.Tensor | None = None  # [n] int64

    def _prompt(self, tokens):
        n = tokens.shape[1]
        whole = torch.cat([tokens, self.filling[None]], 1)
        return Prompt(whole, torch.tensor(n))


class Unmasked(PaddedSession):
    """Takes the padding for text: what the masks are there against."""

    def _prompt(self, tokens):
        return Prompt(super()._prompt(tokens).tokens)


def play(session, frames):
    return [frames.step(session, t) for t in range(5)]


def filled(model, method, filling, kind=PaddedSession):
    session = kind(model, METHODS[method])
    session.filling = filling
    return session


@pytest.mark.parametrize("method", METHODS)
def test_a_padded_prompt_takes_the_same_decisions_and_actions(model, frames, method):
    ours = play(filled(model, method, torch.zeros(25, dtype=torch.long)), frames)
    theirs = play(PolicySession(model, METHODS[method]), frames)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.decision.reason, a.n_text) == (b.decision.reason, b.n_text)
        assert a.decision.kappa == pytest.approx(b.decision.kappa, abs=1e-5, nan_ok=True)
        kept = (None if s.decision.keep is None else s.decision.keep.tolist() for s in (a, b))
        assert next(kept) == next(kept)
        torch.testing.assert_close(a.actions, b.actions, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("method", PADDED)
def test_padding_that_is_taken_for_text_would_be_seen(model, frames, method):
    tokens = torch.arange(25)
    ours = play(filled(model, method, tokens, Unmasked), frames)
    theirs = play(PolicySession(model, METHODS[method]), frames)
    differences = [a.actions - b.actions for a, b in zip(ours, theirs, strict=True)]
    assert max(difference.abs().max() for difference in differences) > 1e-2


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(PADDED), st.integers(1, 40), st.integers(1, 33), st.integers(0, 1000))
def test_what_the_padding_holds_changes_nothing(model, method, n_text, n_padding, seed):
    frames = Frames(n=4, n_text=n_text, seed=seed)
    garbage = torch.randint(
        0, SMALL.vocab_size, (n_padding,), generator=torch.Generator().manual_seed(seed)
    )
    zeros = torch.zeros(n_padding, dtype=torch.long)
    one, other = (filled(model, method, filling) for filling in (garbage, zeros))
    plain = PolicySession(model, METHODS[method])
    for t in range(2):
        a, b, c = (frames.step(session, t) for session in (one, other, plain))
        assert torch.equal(a.actions, b.actions)
        if a.decision.keep is not None:
            assert torch.equal(a.decision.keep, b.decision.keep)
        if c.decision.keep is None or torch.equal(a.decision.keep, c.decision.keep):
            torch.testing.assert_close(a.actions, c.actions, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("over", ["visual", "all"])
def test_deep_saliency_of_a_padded_prompt(model, frames, over):
    asked = replace(METHODS["safe"], softmax_over=over, gamma=1.01)
    plain, padded = PolicySession(model, asked), PaddedSession(model, asked)
    padded.filling = torch.arange(9)
    for session in (plain, padded):
        frames.step(session, 0)
    ours, theirs = padded.pruner.reference, plain.pruner.reference
    torch.testing.assert_close(ours.deep, theirs.deep, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.early, theirs.early, rtol=0, atol=1e-6)


@given(st.integers(1, 200), st.integers(1, 64))
def test_a_bucket_is_the_next_multiple(n_text, multiple):
    tokens = torch.arange(1, n_text + 1)[None]
    padded = Prompt(tokens).padded(multiple)
    assert padded.slots % multiple == 0
    assert 0 <= padded.slots - n_text < multiple
    assert int(padded.n_valid) == n_text
    assert torch.equal(padded.tokens[:, :n_text], tokens)
    with pytest.raises(ValueError, match="padded once"):
        padded.padded(multiple)
