"""`wrap` on live policies: openpi's own class in its environment, LeRobot's face on a stand-in."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import safe_pruner_node
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.checkpoint import save_openpi
from safe_pruner_node.pi05.config import TINY
from safe_pruner_node.pi05.model import Pi05
from safe_pruner_node.pi05.nano import s1_norm_stats
from safe_pruner_node.pruning.settings import PrunerSettings

ROOT = Path(__file__).resolve().parents[2]
PARITY_PYTHON = ROOT / ".venv-parity/bin/python"
OPENPI_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


def random_model(config):
    random = torch.Generator().manual_seed(0)
    model = Pi05(config).eval().requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.2, generator=random)
    return model


def test_openpi_live(tmp_path):
    """vanilla and rho = 0 equal openpi's own sample_actions, rho = 0.75 prunes, nothing copied."""
    assert PARITY_PYTHON.is_file(), "`tools/setup.sh parity` installs openpi's own model"
    config = replace(TINY, vision=replace(TINY.vision, image=224))
    model = random_model(config)
    case = tmp_path / "case_0"
    save_openpi(case, model, s1_norm_stats(), "robot")
    (case / "sizes.json").write_text(json.dumps({**config.to_json(), "dtype": "float32"}))
    random = np.random.default_rng(0)
    images = {c: random.uniform(-1, 1, (1, 3, 224, 224)).astype("float32") for c in OPENPI_CAMERAS}
    images["left_wrist_0_rgb"][:] = -1.0  # an empty slot
    np.savez(
        case / "query.npz",
        noise=random.normal(size=(1, config.horizon, 32)).astype("float32"),
        tokens=np.pad(random.integers(0, 64, (1, 9)), ((0, 0), (0, 15))),
        token_mask=np.arange(24)[None] < 9,
        **{f"image_{c}": image for c, image in images.items()},
        **{f"mask_{c}": np.array([c != "left_wrist_0_rgb"]) for c in OPENPI_CAMERAS},
    )
    done = subprocess.run(
        [PARITY_PYTHON, Path(__file__).with_name("wrap_side.py"), tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "wrap.json").read_text())
    for name in ("vanilla None", "paper 0.0"):
        assert max(answer[name]["errors"]) <= 1e-5
        assert answer[name]["kept"] == [512, 512, 512]
    pruned = answer["paper 0.75"]
    assert (pruned["visual"], pruned["text"]) == (512, 9)  # trimmed: two cameras, no padding
    assert pruned["keyframes"] == [True, False, False]
    assert pruned["kept"] == [512, 128, 128]
    assert pruned["errors"][0] <= 1e-5
    assert min(pruned["errors"][1:]) > 1e-5
    assert all(case["copied"] == 0 for case in answer.values())


class LerobotLike(nn.Module):
    """The face of LeRobot's PI05Policy around a network with openpi's parameter names."""

    def __init__(self, model):
        super().__init__()
        config = model.config
        self.model = nn.Module()
        self.model.paligemma_with_expert = model.paligemma_with_expert
        for name in ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out"):
            setattr(self.model, name, getattr(model, name))
        self.model.config = SimpleNamespace(
            chunk_size=config.horizon,
            num_inference_steps=config.flow_steps,
            tokenizer_max_length=config.max_prompt_tokens,
        )
        self.model.paligemma_with_expert.paligemma.config = SimpleNamespace(
            text_config=SimpleNamespace(num_key_value_heads=config.vlm.kv_heads),
            vision_config=SimpleNamespace(num_attention_heads=config.vision.heads),
        )
        self.config = SimpleNamespace(
            n_action_steps=2, output_features={"action": SimpleNamespace(shape=(7,))}
        )

    def _preprocess_images(self, batch):
        images = [batch["observation.images.a"], batch["observation.images.b"]]
        empty = -torch.ones_like(images[0])
        present = torch.ones(1, dtype=torch.bool)
        return [*images, empty], [present, present, ~present]

    def predict_action_chunk(self, _batch):
        raise AssertionError("the wrapped policy is to answer")


@pytest.fixture
def lerobot():
    model = random_model(replace(TINY, vision=replace(TINY.vision, image=56)))
    return LerobotLike(model), model


def batch(seed, task="lift"):
    random = torch.Generator().manual_seed(seed)
    return {
        "observation.images.a": torch.rand(1, 3, 56, 56, generator=random),
        "observation.images.b": torch.rand(1, 3, 56, 56, generator=random),
        "observation.language.tokens": torch.arange(12)[None],
        "observation.language.attention_mask": torch.arange(12)[None] < 8,
        "task": [f"{task}, State: {seed} 2 3;\nAction: "],
    }


def test_lerobot_batches_go_through_the_pruned_session(lerobot):
    live, model = lerobot
    policy = safe_pruner_node.wrap(live, PrunerSettings(gamma=-1.0, camera_floor=0))
    noise = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    chunk = policy.predict_action_chunk(batch(0), noise)
    images = [batch(0)[f"observation.images.{c}"] for c in "ab"]
    plain = model.sample_actions(images, torch.arange(8)[None], noise)
    assert chunk.shape == (1, 5, 7)
    torch.testing.assert_close(chunk, plain[:, :, :7], rtol=0, atol=1e-5)
    assert policy.report.keyframe_reason == "first"
    policy.predict_action_chunk(batch(1), noise)
    assert sum(policy.report.kept_tokens.values()) == 8  # a quarter of two cameras
    policy.predict_action_chunk(batch(2, task="drop"), noise)  # the state alone is no new prompt
    assert policy.report.keyframe_reason == "prompt"


def test_lerobot_action_queue_and_reset(lerobot):
    policy = safe_pruner_node.wrap(lerobot[0], PrunerSettings(gamma=-1.0, camera_floor=0))
    queries = []
    for _ in range(5):
        assert policy.select_action(batch(0)).shape == (1, 7)
        queries.append(policy.report.query)
    assert queries == [0, 0, 1, 1, 2]  # n_action_steps = 2
    policy.reset()
    policy.select_action(batch(0))
    assert (policy.report.query, policy.report.keyframe_reason) == (0, "first")


def test_two_wraps_share_weights_and_nothing_else(lerobot):
    live, _ = lerobot
    settings = PrunerSettings(gamma=-1.0, camera_floor=0)
    one, other = safe_pruner_node.wrap(live, settings), safe_pruner_node.wrap(live, settings)
    one.predict_action_chunk(batch(0))
    other.predict_action_chunk(batch(0))
    assert other.report.keyframe_reason == "first"
    ours, theirs = dict(one.model.named_parameters()), dict(other.model.named_parameters())
    assert all(ours[name] is theirs[name] for name in ours)


def test_flow_steps_may_change_between_calls(lerobot):
    live, model = lerobot
    policy = safe_pruner_node.wrap(live, "vanilla")
    noise = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    images = [batch(0)[f"observation.images.{c}"] for c in "ab"]
    for steps in (2, 5):
        chunk = policy.predict_action_chunk(batch(0), noise, steps)
        plain = model.sample_actions(images, torch.arange(8)[None], noise, steps)
        torch.testing.assert_close(chunk, plain[:, :, :7], rtol=0, atol=1e-5)


def test_wrong_models_presets_and_batches_are_one_line(lerobot):
    live, _ = lerobot
    with pytest.raises(
        ConfigError, match=r"live model: found Linear, expected openpi's PI0Pytorch"
    ):
        safe_pruner_node.wrap(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"pruners\.yaml: pruner: found robto, expected one of"):
        safe_pruner_node.wrap(live, "robto")
    with pytest.raises(ConfigError, match=r"^parameter: rho: found 2"):
        safe_pruner_node.wrap(live, "robot", rho=2)
    policy = safe_pruner_node.wrap(live, "vanilla")
    double = {k: v if k == "task" else torch.cat([v, v]) for k, v in batch(0).items()}
    with pytest.raises(ConfigError, match=r"observation: batch size: found 2, expected 1"):
        policy.predict_action_chunk(double)
