import pytest
import torch

from safe_pruner_node.pi05.config import TINY
from safe_pruner_node.pi05.model import Pi05
from safe_pruner_node.training.objective import (
    Batch,
    LandmarkHead,
    draw_times,
    losses,
    prefix,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Pi05(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model


@pytest.fixture
def batch():
    torch.manual_seed(1)
    images = tuple(torch.rand(3, 3, 28, 28) * 2 - 1 for _ in range(2))
    tokens = torch.randint(0, TINY.vocab_size, (3, 6))
    return Batch(images, tokens, torch.randn(3, TINY.horizon, TINY.action_dim), torch.randn(3, 4))


def test_prefix_is_the_models_own(model, batch):
    """The pass that keeps gradients gives the cache that inference would have."""
    seen = prefix(model, batch)
    tokens = [model.embed_images(images) for images in batch.images]
    wanted = model.prefill(torch.cat([*tokens, model.embed_text(batch.tokens)], 1))
    assert seen.length == 2 * TINY.vision.tokens + 6
    assert seen.text.shape == (3, 6, TINY.vlm.width)
    for ours, theirs in zip(seen.kv, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_loss_is_the_mean_squared_error_of_the_flow(model, batch):
    """Against the formula of openpi's PI0Pytorch.forward, sample by sample."""
    noise, t = torch.randn(6, *batch.actions.shape[1:]), torch.rand(6)
    found = losses(model, None, batch, noise, t)
    errors = []
    for r in range(6):
        i = r % 3
        own = [model.embed_images(images[i : i + 1]) for images in batch.images]
        x = torch.cat([*own, model.embed_text(batch.tokens[i : i + 1])], 1)
        x_t = t[r] * noise[r : r + 1] + (1 - t[r]) * batch.actions[i : i + 1]
        velocity = model.denoise(x_t, t[r : r + 1], model.prefill(x), x.shape[1])
        errors.append((velocity - (noise[r] - batch.actions[i])).square().mean())
    torch.testing.assert_close(found.flow, torch.stack(errors).mean())
    assert float(found.landmarks) == 0


def test_landmarks_teach_the_vision_tower_and_not_the_expert(model, batch):
    head = LandmarkHead(TINY.vlm.width, 4)
    noise, t = torch.randn_like(batch.actions), torch.rand(3)
    losses(model, head, batch, noise, t).landmarks.backward()
    root = "paligemma_with_expert.paligemma.model.vision_tower.vision_model"
    tower = model.get_submodule(root).embeddings.patch_embedding.weight
    assert tower.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.expert.parameters())


def test_flow_times_are_openpis():
    random = torch.Generator().manual_seed(0)
    times = draw_times(40_000, random)
    assert times.min() > 0.0009
    assert times.max() <= 1.0
    wanted = torch.distributions.Beta(1.5, 1.0).sample((40_000,)) * 0.999 + 0.001
    quantiles = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(
        times.quantile(quantiles), wanted.quantile(quantiles), atol=0.01, rtol=0
    )
