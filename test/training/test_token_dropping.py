"""What training leaves out is what the engine would leave out."""

import pytest
import torch

from safe_pruner_node.engine.flow import ActionFlow, DeepProbe, DeepSettings, FlowSchedule
from safe_pruner_node.engine.prefix import prefill_early, prefill_late
from safe_pruner_node.engine.prompt import Prompt
from safe_pruner_node.pi05.config import TINY
from safe_pruner_node.pi05.model import Pi05
from safe_pruner_node.pruning.settings import PrunerSettings
from safe_pruner_node.training.objective import Batch, best_tokens, losses, prefix
from safe_pruner_node.training.token_dropping import Kept, choose, late_saliency

LAYER = 2
DEEP = (0, 2, 3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Pi05(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


@pytest.fixture
def batch():
    torch.manual_seed(1)
    images = tuple(torch.rand(3, 3, 28, 28) * 2 - 1 for _ in range(2))
    tokens = torch.randint(0, TINY.vocab_size, (3, 6))
    return Batch(images, tokens, torch.randn(3, TINY.horizon, TINY.action_dim), None)


def embedded(model, batch, sample):
    own = [model.embed_images(images[sample : sample + 1]) for images in batch.images]
    return torch.cat([*own, model.embed_text(batch.tokens[sample : sample + 1])], 1)


@torch.no_grad()
def test_a_prefix_without_some_tokens_is_the_engines(model, batch):
    kept = torch.tensor([[0, 3, 4], [1, 2, 7], [5, 6, 7]])
    seen = prefix(model, batch, Kept(LAYER, kept))
    for sample, keep in enumerate(kept):
        early = prefill_early(model, embedded(model, batch, sample), seen.n_visual, LAYER)
        wanted = prefill_late(model, early, keep)
        for ours, theirs in zip(seen.kv, wanted, strict=True):
            for mine, its in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine[sample : sample + 1], its)


@torch.no_grad()
def test_late_saliency_is_what_the_engine_measures(model, batch):
    seen = prefix(model, batch)
    noise = torch.randn_like(batch.actions)
    found = late_saliency(
        model, seen.kv, seen.length, seen.n_visual, noise, torch.ones(3), DEEP
    )  # flow time 1: the engine's first step
    schedule = FlowSchedule(model, 1)
    for sample in range(3):
        probe = DeepProbe(DeepSettings(DEEP, seen.n_visual, "visual", "first"), 1)
        cache = model.prefill(embedded(model, batch, sample))
        prompt = Prompt(batch.tokens[sample : sample + 1])
        flow = ActionFlow(model, schedule, seen.n_visual, prompt, noise[sample : sample + 1])
        flow.run(cache, deep=probe)
        torch.testing.assert_close(found[sample], probe.saliency().mean(0))


def test_a_choice_is_k_different_tokens_in_order_and_prefers_the_salient():
    random = torch.Generator().manual_seed(0)
    saliency = torch.full((400, 20), 0.3 / 15)
    saliency[:, 3:8] = 0.7 / 5
    chosen = choose(saliency, 5, random)
    assert (chosen.diff(dim=-1) > 0).all()
    counts = torch.bincount(chosen.flatten(), minlength=20)
    assert counts[3:8].min() > 3 * counts[8:].max()  # blurred, and yet by saliency
    assert counts[8:].min() > 0


def test_the_loss_on_a_share_differs_and_reaches_the_vision_tower(model, batch):
    noise, t = torch.randn_like(batch.actions), torch.full((3,), 0.5)
    random = torch.Generator().manual_seed(0)
    pruner = PrunerSettings(layer=LAYER, camera_floor=0)
    kept = best_tokens(model, batch, pruner, 0.25, random)
    assert kept.tokens.shape == (3, 2)
    full, some = losses(model, None, batch, noise, t), losses(model, None, batch, noise, t, kept)
    assert (full.flow - some.flow).abs() > 1e-6
    some.flow.backward()
    root = "paligemma_with_expert.paligemma.model.vision_tower.vision_model"
    assert model.get_submodule(root).embeddings.patch_embedding.weight.grad.abs().sum() > 0
    assert best_tokens(model, batch, pruner, 1.0, random) is None
