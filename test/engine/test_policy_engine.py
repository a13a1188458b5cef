"""The engine as the worker uses it: real images and words in, actions and a report out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from safe_pruner_node.engine.build import build_engine
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.checkpoint import load_checkpoint
from safe_pruner_node.pi05.tokenizer import PromptTokenizer
from safe_pruner_node.pi05.transforms import resize_with_pad, to_model_images
from safe_pruner_node.pruning.settings import PrunerSettings, load_preset
from safe_pruner_node.types import DeviceImage, PolicyInput

ROBOT = load_preset(None, "robot")
SAFE = replace(ROBOT, gamma=-1.0, camera_floor=4)
STAGES = {
    "vanilla": ["resize", "vision", "tokenize", "prefill", "denoise", "postprocess"],
    "safe": [
        "resize",
        "vision",
        "tokenize",
        "match",
        "prefill_early",
        "select",
        "prefill_late",
        "denoise",
        "postprocess",
    ],
}


@pytest.fixture
def build(small_checkpoint):
    def build(pruner=SAFE, **settings):
        return build_engine(
            EngineSettings(
                small_checkpoint, pruner=pruner, threads=1, **{"device": "cpu", **settings}
            )
        )

    return build


def view(t=0, prompt="pick up the red cube", state=0.1):
    random = np.random.default_rng(t)
    images = {
        name: random.integers(0, 256, (90, 160, 3), np.uint8)
        for name in ("head", "left_wrist", "right_wrist")
    }
    return PolicyInput(images, np.full(16, state), prompt)


def test_a_step_is_preprocessing_the_plain_model_and_postprocessing(build, small_checkpoint):
    checkpoint = load_checkpoint(small_checkpoint)
    inputs, stats = view(), checkpoint.norm_stats
    tokenizer = PromptTokenizer(checkpoint.tokenizer_path, 200)
    tokens = tokenizer.encode(inputs.prompt, stats.normalize_state(inputs.state))
    noise = np.random.default_rng(5).standard_normal((50, 32))
    plain = checkpoint.model.sample_actions(
        [to_model_images(torch.from_numpy(i)[None], 112) for i in inputs.images.values()],
        torch.from_numpy(tokens)[None],
        torch.from_numpy(noise).float()[None],
    )
    expected = stats.unnormalize_actions(plain[0].double().numpy())
    for pruner in (load_preset(None, "vanilla"), SAFE):  # SAFE's first step is a keyframe
        actions, report = build(pruner).step(inputs, noise)
        assert actions.shape == (50, 16)
        assert actions.dtype == np.float64
        np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-4)
        assert report.text_tokens == len(tokens)


def test_images_may_be_read_only_and_views(build):
    """As raw camera frames and slices are."""
    inputs, noise = view(), np.random.default_rng(5).standard_normal((50, 32))
    flipped = {name: image[:, ::-1].copy()[:, ::-1] for name, image in inputs.images.items()}
    for image in flipped.values():
        image.flags.writeable = False
    expected, _ = build().step(inputs, noise)
    actions, _ = build().step(replace(inputs, images=flipped), noise)
    np.testing.assert_array_equal(actions, expected)


def test_placed_images_are_the_images(build):
    """Whichever of them were placed before the step."""
    inputs, noise = view(), np.random.default_rng(5).standard_normal((50, 32))
    expected, _ = build().step(inputs, noise)
    for cameras in ((), (0,), (0, 1, 2)):
        engine = build()
        engine.step(view(1))  # what was placed for it is in the way
        engine.reset()
        images = {
            name: engine.place(camera, image) if camera in cameras else image
            for camera, (name, image) in enumerate(inputs.images.items())
        }
        actions, _ = engine.step(replace(inputs, images=images), noise)
        np.testing.assert_array_equal(actions, expected)


def test_images_may_be_on_the_device_already(build):
    """As a decoder there leaves them: planes behind each other; among others that are here."""
    inputs, noise = view(), np.random.default_rng(5).standard_normal((50, 32))
    expected, _ = build().step(inputs, noise)
    images = dict(inputs.images)
    for name in ("head", "right_wrist"):
        planes = torch.from_numpy(images[name]).permute(2, 0, 1).contiguous()
        images[name] = DeviceImage(planes.permute(1, 2, 0))
    actions, _ = build().step(replace(inputs, images=images), noise)
    np.testing.assert_array_equal(actions, expected)


def test_cameras_of_any_sizes_keep_their_places(build):
    """Those of a size go to the device together; the prefix has them in the order they came."""
    random, shapes = np.random.default_rng(1), ((90, 160), (45, 80), (90, 160), (90, 160))
    images = {str(i): random.integers(0, 256, (*s, 3), np.uint8) for i, s in enumerate(shapes)}
    engine, noise = build(load_preset(None, "vanilla")), np.zeros((50, 32))
    small = {name: resize_with_pad(image, 112) for name, image in images.items()}
    actions, report = engine.step(replace(view(), images=images), noise)
    expected, _ = engine.step(replace(view(), images=small), noise)
    np.testing.assert_array_equal(actions, expected)
    assert list(report.visual_tokens) == list(images)


def test_report_of_a_pruned_step(build):
    engine = build()
    _, keyframe = engine.step(view(0))
    _, pruned = engine.step(view(1))
    assert (keyframe.keyframe, keyframe.keyframe_reason) == (True, "first")
    assert math.isnan(keyframe.kappa)
    assert keyframe.kept_tokens == keyframe.visual_tokens
    assert (pruned.pruner, pruned.query, pruned.keyframe) == ("safe", 1, False)
    assert (pruned.rho, pruned.gamma) == (0.75, -1.0)
    assert -1.0 <= pruned.kappa <= 1.0
    assert pruned.visual_tokens == {"head": 64, "left_wrist": 64, "right_wrist": 64}
    assert sum(pruned.kept_tokens.values()) == 48
    assert min(pruned.kept_tokens.values()) >= 4
    for name, indices in pruned.kept_indices.items():
        assert len(indices) == pruned.kept_tokens[name]
        assert (np.diff(indices) > 0).all()
        assert indices.min() >= 0
        assert indices.max() < 64
    assert list(pruned.stage_ms) == STAGES["safe"]
    assert pruned.engine == "eager cpu fp32, 1 thread"
    for kind in ("paper_padded", "paper_trimmed", "exact"):
        assert 0 < getattr(pruned.flops, kind) < getattr(keyframe.flops, kind)


def test_a_step_does_not_look_through_the_model_to_say_what_it_ran_on(build, monkeypatch):
    engine = build()
    name = engine.describe()
    assert name == "eager cpu fp32, 1 thread"

    def refuse(_self):
        raise AssertionError("it takes longer than a stage")

    monkeypatch.setattr(torch.nn.Module, "modules", refuse)
    _, report = engine.step(view())
    assert report.engine == name


def test_report_of_a_vanilla_step(build):
    _, report = build(load_preset(None, "vanilla")).step(view())
    assert (report.pruner, report.keyframe, report.rho) == ("vanilla", False, 0.0)
    assert math.isnan(report.gamma)
    assert [len(i) for i in report.kept_indices.values()] == [64, 64, 64]
    assert list(report.stage_ms) == STAGES["vanilla"]


def test_the_probe_is_booked_as_denoising(build):
    _, report = build(replace(SAFE, query_rows="action_probe")).step(view())
    assert sorted(report.stage_ms) == sorted(STAGES["safe"])


def test_noise_is_the_same_per_episode_and_query_for_every_method(build):
    """rho = 0 prunes nothing, so equal actions mean equal noise."""
    vanilla, safe = build(load_preset(None, "vanilla")), build(replace(SAFE, rho=0.0))
    episodes = []
    for _ in range(2):
        for _ in range(2):
            ours, theirs = vanilla.step(view(0))[0], safe.step(view(0))[0]
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
            episodes.append(ours)
        vanilla.reset()
        safe.reset()
        safe.reset()  # nothing ran: no new episode
        safe.warm_up(lambda *_: None)
    for i in range(3):
        assert np.abs(episodes[i] - episodes[i + 1]).max() > 1e-6  # fresh for every query


def test_prompt_change_reset_and_warm_up(build):
    engine = build()
    told = []
    engine.warm_up(lambda text, fraction: told.append((text, fraction)))
    assert told[-1] == ("warm", 1.0)
    assert engine.step(view(0))[1].keyframe_reason == "first"
    assert engine.step(view(0, state=0.3))[1].keyframe_reason == ""  # the state is no prompt
    assert engine.step(view(0, prompt="put it down"))[1].keyframe_reason == "prompt"
    engine.reset()
    report = engine.step(view(0, prompt="put it down"))[1]
    assert (report.keyframe_reason, report.query) == ("first", 0)
    engine.set_pruner(PrunerSettings(method="vanilla", rho=0.0))
    assert engine.step(view(0))[1].pruner == "vanilla"


def test_the_state_is_in_the_prompt_unless_the_checkpoint_wants_it_out(build):
    vanilla = load_preset(None, "vanilla")
    noise = np.zeros((50, 32))
    told, untold = build(vanilla), build(vanilla, state_in_prompt=False)

    def effect(engine):
        a, b = (engine.step(view(0, state=s), noise) for s in (0.0, 0.3))
        return np.abs(a[0] - b[0]).max(), a[1].text_tokens

    assert effect(untold)[0] == 0.0
    assert effect(told)[0] > 0.0
    assert effect(told)[1] > effect(untold)[1]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"prompt": " "}, r"parameter: prompt: found ' ', expected the task in words"),
        ({"images": {}}, r"observation: images: found none"),
        (
            {"images": {"head": np.zeros((4, 4), np.uint8)}},
            r"observation: images\.head: found uint8 \[4, 4\], expected uint8 \[h, w, 3\]",
        ),
        (
            {"images": {"head": np.zeros((4, 4, 3))}},
            r"observation: images\.head: found float64 \[4, 4, 3\]",
        ),
        ({"state": np.zeros(14)}, r"observation: state: found \[14\], expected \[16\]"),
        ({"state": np.full(16, np.nan)}, r"observation: state: found \[nan, .*finite numbers"),
    ],
)
def test_a_wrong_observation_is_one_line_and_the_session_goes_on(build, change, complaint):
    engine = build()
    engine.step(view(0))
    with pytest.raises(ConfigError, match=complaint) as error:
        engine.step(replace(view(1), **change))
    assert "\n" not in str(error.value)
    assert engine.step(view(1))[1].query == 1


def test_noise_of_another_shape_is_refused(build):
    with pytest.raises(ConfigError, match=r"noise: shape: found \[50, 16\], expected \[50, 32\]"):
        build().step(view(), np.zeros((50, 16)))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"state_dim": 25}, r"norm_stats.*state: found 16 channels, expected 25"),
        ({"action_dim": 14}, r"norm_stats.*actions: found 16 channels, expected 14"),
        ({"pruner": replace(ROBOT, layer=5)}, r"pruners\.yaml: robot\.layer: found 5, .*1\.\.4"),
        (
            {"path": "graphs"},
            r"parameter: path: found graphs, on device cpu, expected auto",
        ),
        (
            {"image_decoder": "nvjpeg"},
            r"parameter: image_decoder: found nvjpeg, on device cpu, expected auto or cpu",
        ),
        ({"device": "cuda"}, r"parameter: device: found cuda, but torch sees no CUDA device"),
    ],
)
def test_what_does_not_fit_the_checkpoint_fails_the_build(build, settings, complaint):
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match=complaint):
        build(**{**settings, "pruner": settings.get("pruner", SAFE)})


def test_a_checkpoint_without_statistics_fails_the_build(small_checkpoint, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        (tmp_path / name).symlink_to(small_checkpoint / name)
    with pytest.raises(ConfigError, match=r"norm_stats.*: found no(thing| such file)"):
        build_engine(EngineSettings(tmp_path, device="cpu"))


def test_a_tokenizer_with_more_pieces_than_the_embedding_fails_the_build(build, monkeypatch):
    monkeypatch.setattr(PromptTokenizer, "vocab_size", property(lambda _: 257_152))
    with pytest.raises(ConfigError, match=r"tokenizer: found 257152 pieces, .*at most 1024"):
        build()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("device", "gpu"),
        ("dtype", "float16"),
        ("path", "graph"),
        ("image_decoder", "gpu"),
        ("flow_steps", 0),
        ("threads", -1),
        ("seed", 1.5),
        ("state_dim", 0),
        ("action_dim", True),
    ],
)
def test_engine_settings_are_validated(tmp_path, key, value):
    with pytest.raises(ConfigError, match=rf"^parameter: {key}: found {value}, expected"):
        EngineSettings(tmp_path, **{key: value})
