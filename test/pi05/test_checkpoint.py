import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.checkpoint import (
    EMBED_TOKENS,
    EXPERT_LM_HEAD,
    LM_HEAD,
    OWN_SIZES,
    VISION_TOWER,
    WEIGHTS,
    checkpoint_id,
    load_checkpoint,
    save_lerobot,
    save_openpi,
)
from safe_pruner_node.pi05.config import PI05, TINY, Pi05Config
from safe_pruner_node.pi05.stats_files import write_openpi
from safe_pruner_node.pi05.transforms import FeatureStats


def query(seed=0):
    random = torch.Generator().manual_seed(seed)
    size = TINY.vision.image
    images = [torch.rand(1, 3, size, size, generator=random) * 2 - 1 for _ in range(2)]
    tokens = torch.randint(0, TINY.vocab_size, (1, 9), generator=random)
    noise = torch.randn(1, TINY.horizon, TINY.action_dim, generator=random)
    return images, tokens, noise


def rewrite(directory, change):
    """Change the tensors of a checkpoint on disk."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / WEIGHTS)


def edit(path, **changes):
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


@pytest.fixture
def openpi(tmp_path, tiny_model, norm_stats, tokenizer_file):
    save_openpi(tmp_path / "openpi", tiny_model(1), norm_stats, "astribot_s1", tokenizer_file)
    return tmp_path / "openpi"


@pytest.fixture
def lerobot(tmp_path, tiny_model, norm_stats):
    save_lerobot(tmp_path / "lerobot", tiny_model(1), norm_stats)
    return tmp_path / "lerobot"


def test_both_layouts_give_the_same_actions(openpi, lerobot, tiny_model, norm_stats):
    expected = tiny_model(1).sample_actions(*query())
    one, other = load_checkpoint(openpi), load_checkpoint(lerobot)
    assert torch.equal(one.model.sample_actions(*query()), expected)
    assert torch.equal(other.model.sample_actions(*query()), expected)
    assert one.config == other.config == TINY
    assert (one.origin, other.origin) == ("openpi", "lerobot")
    assert (one.norm_stats.origin, other.norm_stats.origin) == ("openpi", "lerobot")
    assert one.asset_id == "astribot_s1"
    assert one.tokenizer_path == openpi / "tokenizer.model"
    assert other.tokenizer_path is None
    np.testing.assert_array_equal(one.norm_stats.state.q01, norm_stats.state.q01)
    np.testing.assert_allclose(other.norm_stats.actions.q99, norm_stats.actions.q99, atol=1e-6)
    assert set(load_file(lerobot / WEIGHTS)) > {f"model.{LM_HEAD}", f"model.{EMBED_TOKENS}"}


def test_newer_exports_without_vision_model_load(lerobot, tiny_model):
    def drop(tensors):
        for name in [n for n in tensors if "vision_tower.vision_model." in n]:
            short = name.replace("vision_tower.vision_model.", "vision_tower.")
            tensors[short] = tensors.pop(name)

    rewrite(lerobot, drop)
    assert any(n.startswith(f"model.{VISION_TOWER}encoder") for n in load_file(lerobot / WEIGHTS))
    actions = load_checkpoint(lerobot).model.sample_actions(*query())
    assert torch.equal(actions, tiny_model(1).sample_actions(*query()))


def test_embed_tokens_wins_over_lm_head(lerobot):
    rewrite(lerobot, lambda tensors: tensors[f"model.{LM_HEAD}"].fill_(7.0))
    assert load_checkpoint(lerobot).model.vlm.embed_tokens.weight.abs().max() < 7.0


def test_openpi_file_has_the_tied_name_only(openpi):
    names = set(load_file(openpi / WEIGHTS))
    assert LM_HEAD in names
    assert EXPERT_LM_HEAD in names
    assert EMBED_TOKENS not in names


def test_identity_follows_the_content(openpi, lerobot):
    before = checkpoint_id(openpi)
    assert before == load_checkpoint(openpi).identity != checkpoint_id(lerobot)
    rewrite(openpi, lambda tensors: tensors["action_out_proj.bias"].add_(1e-3))
    assert checkpoint_id(openpi) != before


def test_published_variants_need_no_sizes_of_ours(openpi, lerobot):
    """openpi's and lerobot's own config.json mean the published sizes."""
    for directory in (openpi, lerobot):
        config = json.loads((directory / "config.json").read_text())
        del config[OWN_SIZES]
        config |= {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
        (directory / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match="expected the 811 tensors of a pi05 model"):
            load_checkpoint(directory)


def test_one_of_several_assets_must_be_named(openpi, norm_stats):
    shifted = replace(
        norm_stats, state=FeatureStats(q01=norm_stats.state.q01 - 1, q99=norm_stats.state.q99)
    )
    write_openpi(openpi / "assets/lab/other/norm_stats.json", shifted)
    with pytest.raises(ConfigError, match=r"asset_id: found \['astribot_s1', 'lab/other'\]"):
        load_checkpoint(openpi)
    chosen = load_checkpoint(openpi, asset_id="lab/other")
    np.testing.assert_array_equal(chosen.norm_stats.state.q01, norm_stats.state.q01 - 1)


def test_a_checkpoint_without_statistics_says_so(openpi, lerobot):
    shutil.rmtree(openpi / "assets")  # openpi's converter leaves them behind
    (lerobot / "policy_preprocessor.json").unlink()
    assert load_checkpoint(openpi).norm_stats is None
    assert load_checkpoint(lerobot).norm_stats is None


def truncate(directory):
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[: len(data) // 2])


def retype(name, **changes):
    return lambda directory: edit(directory / name, **changes)


def resize(section, key, value):
    def change(directory):
        config = json.loads((directory / "config.json").read_text())
        target = config[OWN_SIZES][section] if section else config[OWN_SIZES]
        target[key] = value
        (directory / "config.json").write_text(json.dumps(config))

    return change


def tensors(change):
    return lambda directory: rewrite(directory, change)


def stats(key, name, values):
    def change(directory):
        path = directory / "assets/astribot_s1/norm_stats.json"
        data = json.loads(path.read_text())
        data["norm_stats"][key][name] = values
        path.write_text(json.dumps(data))

    return change


def pi0(tensors):
    tensors["state_proj.weight"] = torch.zeros(1)


WRONG = {
    "no folder": (shutil.rmtree, "parameter: checkpoint: .*existing directory"),
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json: .*No such file"),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json: .*invalid JSON"),
    "a list": (lambda d: (d / "config.json").write_text("[]"), r"config\.json: found list"),
    "no horizon": (retype("config.json", action_horizon=None), "action_horizon: found None"),
    "bad horizon": (retype("config.json", action_horizon=-5), "action_horizon: found -5"),
    "another policy": (retype("config.json", type="act"), r"config\.json: type: found act"),
    "extra size": (resize("", "extra", 1), "extra: found an unknown key"),
    "size as text": (resize("vlm", "width", "16"), "vlm.width: found '16', expected int"),
    "uneven heads": (resize("vision", "heads", 3), r"config\.json: vision.heads: found 3"),
    "depths differ": (resize("expert", "depth", 5), r"config\.json: expert.depth: found 5"),
    "other width": (resize("vlm", "mlp", 48), r"tensors: found mis-shaped 12: .* and 9 more"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), r"model\.safetensors: found no such file"),
    "no safetensors": (
        lambda d: (d / WEIGHTS).write_bytes(b"no"),
        r"model\.safetensors: found 2 bytes",
    ),
    "truncated": (truncate, r"safetensors: found \d+ bytes \(.*, expected a complete safetensors"),
    "missing": (
        tensors(lambda t: (t.pop("action_out_proj.bias"), t.pop("time_mlp_in.bias"))),
        r"found missing 2: action_out_proj\.bias, time_mlp_in\.bias,",
    ),
    "unexpected": (
        tensors(lambda t: t.update(stray=torch.zeros(1))),
        "found unexpected 1: stray",
    ),
    "π0": (tensors(pi0), "looks like π0, not π0.5"),
    "q01 = q99": (stats("state", "q99", [0.0] * 16), r"state\[\d+\]: .*q01 < q99"),
    "sizes": (stats("actions", "q99", [9.0] * 15), r"norm_stats\.actions: found sizes"),
    "not finite": (stats("state", "mean", [float("nan")] * 16), "state.mean: .*non-finite"),
    "no numbers": (stats("state", "q01", "abc"), "state.q01: .*a list of numbers"),
    "no quantiles": (stats("state", "q01", None), "state.q01: found nothing"),
    "stats too wide": (
        lambda d: [
            stats(key, name, ([0.0] if name in {"q01", "mean"} else [1.0]) * 33)(d)
            for key in ("state", "actions")
            for name in ("mean", "std", "q01", "q99")
        ],
        "norm_stats: found state 33, actions 33, expected at most 32",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_every_mistake_is_one_line(openpi, mistake):
    spoil, complaint = WRONG[mistake]
    spoil(openpi)
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_checkpoint(openpi)
    assert "\n" not in str(caught.value)


LEROBOT_WRONG = {
    "mode": (
        lambda step: step["config"]["norm_map"].update(STATE="MIN_MAX"),
        r"norm_map\.STATE: found MIN_MAX",
    ),
    "no step": (lambda step: step.update(registry_name="other"), "found no normalizer_processor"),
    "no file named": (lambda step: step.pop("state_file"), "state_file: found nothing"),
    "file absent": (lambda step: step.update(state_file="x.safetensors"), r"x\.safetensors"),
}


@pytest.mark.parametrize("mistake", LEROBOT_WRONG)
def test_every_mistake_in_a_preprocessor_is_one_line(lerobot, mistake):
    spoil, complaint = LEROBOT_WRONG[mistake]
    path = lerobot / "policy_preprocessor.json"
    data = json.loads(path.read_text())
    spoil(data["steps"][0])
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_checkpoint(lerobot)
    assert "\n" not in str(caught.value)


def test_wrong_dtype_is_refused(openpi):
    with pytest.raises(ConfigError, match="dtype: found fp8"):
        load_checkpoint(openpi, dtype="fp8")


def test_config_round_trip():
    for config in (PI05, TINY):
        assert Pi05Config.from_json("round trip", config.to_json()) == config
