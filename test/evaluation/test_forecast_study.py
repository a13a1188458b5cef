"""Known answers on made-up records, the recorder against the real pruner, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from safe_pruner_node.engine.build import load_policy, policy_engine
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation import forecast_study as command
from safe_pruner_node.evaluation.action_error import MEASURED, action_errors, difference
from safe_pruner_node.evaluation.core_loss import (
    FORECAST_ONLY,
    IDENTITY,
    ORACLE,
    RANDOM,
    SAFE,
    core_loss,
    keep_tokens,
)
from safe_pruner_node.evaluation.episode_figure import pick_moments
from safe_pruner_node.evaluation.forecast_accuracy import (
    MeanInterval,
    forecast_accuracy,
    kl_divergence,
)
from safe_pruner_node.evaluation.gripper_events import gripper_events
from safe_pruner_node.evaluation.keyframe_alignment import align
from safe_pruner_node.evaluation.layer_figure import effective_tokens
from safe_pruner_node.evaluation.letterbox import black_tokens, map_over_image
from safe_pruner_node.evaluation.saliency_record import EARLY, SaliencyRecord
from safe_pruner_node.evaluation.saliency_recorder import RecordingEngine
from safe_pruner_node.evaluation.saliency_replay import KeyframeTrace, Replay, gamma_for_rate
from safe_pruner_node.evaluation.saliency_rollout import recording_settings
from safe_pruner_node.inference.overlay import encode_jpeg
from safe_pruner_node.pruning.settings import load_preset
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import load_robot_config
from safe_pruner_node.types import PolicyInput

CAMERAS, TOKENS, LAYERS, WIDTH = ("head", "wrist"), 64, 4, 24
N = len(CAMERAS) * TOKENS
SETTINGS = replace(load_preset(None, "robot"), layer=2, camera_floor=0, gamma=0.9)


def made_up(z, deep, early=None, *, seed=1):
    """A record of unit rows [Q, N, D], deep maps [Q, L, N] and one early map for all modes."""
    queries, random = len(z), np.random.default_rng(seed)
    early = deep.mean(1) if early is None else early
    image = encode_jpeg(random.integers(0, 255, (36, 64, 3), np.uint8))
    time_s = 0.5 * np.arange(queries)
    return SaliencyRecord(
        about={
            "task": "pick_and_place",
            "index": seed,
            "seed": seed,
            "layer": 2,
            "cameras": [[name, TOKENS] for name in CAMERAS],
            "resolution": {name: [36, 64] for name in CAMERAS},
        },
        time_s=time_s,
        policy_state=np.zeros((queries, 16)),
        z_hat=z.astype(np.float16),
        early={name: early.astype(np.float32) for name in EARLY},
        deep=deep.astype(np.float32),
        prefill=deep[0, :-1].astype(np.float32),
        images={name: [image] * queries for name in CAMERAS},
        tick_time_s=time_s,
        gripper=np.zeros((queries, 2), np.float32),
        hand_speed_m_s=np.zeros((queries, 2), np.float32),
        stages=np.array([(0.0, 0.0)]),
    )


def scene(seed):
    """Unit rows [N, D] and deep maps [L, N] that sum to 1."""
    random = np.random.default_rng(seed)
    z = random.standard_normal((N, WIDTH))
    deep = random.exponential(size=(LAYERS, N)) ** 3
    return z / np.linalg.norm(z, axis=1, keepdims=True), deep / deep.sum(1, keepdims=True)


def moving(queries, shift, seed=1):
    """A scene whose tokens move by `shift` places a query within each camera."""
    z, deep = scene(seed)

    def moved(values, axis, by):
        halves = np.split(values, len(CAMERAS), axis)
        return np.concatenate([np.roll(half, by, axis) for half in halves], axis)

    return made_up(
        np.stack([moved(z, 0, shift * q) for q in range(queries)]),
        np.stack([moved(deep, 1, shift * q) for q in range(queries)]),
        seed=seed,
    )


def test_a_scene_at_rest_is_forecast_perfectly():
    replay = Replay(moving(6, 0), SETTINGS)
    trace = replay.keyframes()
    assert trace.keyframe.tolist() == [True] + 5 * [False]
    assert trace.kappa[1:] == pytest.approx(1.0)
    accuracy = forecast_accuracy([replay], horizon=8)
    assert accuracy.pairs == (5, 4, 3, 2, 1, 0, 0, 0)
    for name in ("matched", "identity"):
        assert accuracy.cosine[name][0, :5] == pytest.approx(1.0)
        assert accuracy.kl[name][0, :5] == pytest.approx(0.0, abs=1e-6)
        assert np.isnan(accuracy.cosine[name][0, 5:]).all()
    assert accuracy.in_operation == pytest.approx([1.0])
    assert np.isnan(accuracy.cosine["prior"]).all()  # there is no other episode
    scores = core_loss([replay], [trace], [0.75]).scores[0.75]
    assert scores[SAFE].core_loss.mean == scores[IDENTITY].core_loss.mean == 0.0


def test_in_a_scene_that_moves_matching_wins_over_position():
    replays = [Replay(moving(6, 5, seed), SETTINGS) for seed in (1, 2)]
    accuracy = forecast_accuracy(replays, horizon=5)
    assert accuracy.cosine["matched"] == pytest.approx(1.0)
    assert accuracy.kl["matched"] == pytest.approx(0.0, abs=1e-6)
    assert (accuracy.cosine["identity"] < 0.8).all()
    assert (accuracy.kl["identity"] > 0.5).all()
    assert (accuracy.cosine["other_frame"] < 0.8).all()
    assert (accuracy.cosine["prior"] < 0.8).all()
    traces = [replay.keyframes() for replay in replays]
    scores = core_loss(replays, traces, [0.75]).scores[0.75]
    assert scores[FORECAST_ONLY].core_loss.mean == 0.0
    blind = [replace(replay.settings, lambda_=1.0) for replay in replays]
    replays = [Replay(r.record, settings) for r, settings in zip(replays, blind, strict=True)]
    scores = core_loss(replays, traces, [0.75]).scores[0.75]
    assert scores[SAFE].core_loss.mean == 0.0
    assert scores[IDENTITY].core_loss.mean > 0.4


def test_the_oracle_loses_nothing_and_chance_loses_rho():
    scenes = [scene(seed) for seed in range(9)]
    early = np.stack([scene(100 + seed)[1].mean(0) for seed in range(9)])
    record = made_up(*(np.stack(part) for part in zip(*scenes, strict=True)), early)
    replay = Replay(record, replace(SETTINGS, gamma=-1.0))
    loss = core_loss([replay], [replay.keyframes()], [0.5, 0.9])
    assert loss.steps == 8
    assert loss.black_tokens == 2 / 8  # 16:9 on a grid of 8: one row above, one below
    for rho, scores in loss.scores.items():
        assert scores[ORACLE].core_loss.mean == 0.0
        assert scores[ORACLE].mass.mean == max(score.mass.mean for score in scores.values())
        assert scores[RANDOM].core_loss.mean == pytest.approx(rho, abs=0.12)
        assert scores[RANDOM].mass.mean == pytest.approx(1 - rho, abs=0.12)
        assert scores[SAFE].core_loss.mean > 0.25  # nothing here can be foreseen
        assert sum(scores[SAFE].cameras.values()) == pytest.approx(1.0)


def test_kappa_finds_the_turn_and_gamma_the_rate():
    before, after = moving(5, 3, seed=1), moving(5, 3, seed=2)
    record = replace(
        before,
        time_s=0.5 * np.arange(10),
        z_hat=np.concatenate([before.z_hat, after.z_hat]),
        deep=np.concatenate([before.deep, after.deep]),
        early={m: np.concatenate([before.early[m], after.early[m]]) for m in EARLY},
    )
    replay = Replay(record, SETTINGS)
    trace = replay.keyframes()
    assert np.flatnonzero(trace.keyframe).tolist() == [0, 5]
    assert trace.reference.tolist() == 5 * [0] + 5 * [5]
    gamma = gamma_for_rate([replay], 1 / 9)
    assert trace.kappa[5] < gamma + 1e-4 < 1.0
    assert replay.keyframes(gamma + 1e-4).keyframe.sum() == 2
    aged = Replay(record, replace(SETTINGS, max_age=2)).keyframes()
    assert np.flatnonzero(aged.keyframe).tolist() == [0, 2, 4, 5, 7, 9]
    fixed = Replay(record, replace(SETTINGS, division="fixed", interval=4)).keyframes()
    assert np.flatnonzero(fixed.keyframe).tolist() == [0, 4, 8]
    assert pick_moments(record, trace, []) == [0, 2, 3, 5, 7, 9]


def trace_of(*keyframes, queries=10):
    keyframe = np.isin(np.arange(queries), keyframes)
    return KeyframeTrace(np.ones(queries), keyframe, np.zeros(queries, np.int64))


def test_permutations_know_how_likely_a_hit_is():
    times = 0.5 * np.arange(10)
    hit = align([np.array([3.5])], [times], [trace_of(0, 7)])
    assert (hit.events, hit.keyframes, hit.median) == (1, 1, 0.0)
    assert hit.p_median == pytest.approx(1 / 9, abs=0.03)
    both = align(2 * [np.array([3.5])], 2 * [times], 2 * [trace_of(0, 7)])
    assert both.p_mean == pytest.approx(1 / 81, abs=0.01)
    assert both.p_mean < both.p_median + 1e-9
    miss = align([np.array([4.5])], [times], [trace_of(0, 1)])
    assert miss.median == 8.0
    assert miss.p_median == 1.0
    none = align([np.array([3.5])], [times], [trace_of(0)])  # nothing to draw
    assert none.median == 7.0
    assert np.isnan(none.p_median)
    assert align([np.array([])], [times], [trace_of(0, 7)]).events == 0


def test_numbers_by_hand():
    a, b = torch.tensor([0.5, 0.5]), torch.tensor([2.5, 7.5])
    assert kl_divergence(a, a) == pytest.approx(0.0)
    assert kl_divergence(a, b) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    span = MeanInterval.of([1.0, 3.0, float("nan")])
    assert (span.mean, span.episodes) == (2.0, 2)
    assert span.high - span.mean == pytest.approx(12.706, abs=1e-3)
    assert effective_tokens(np.array([[1.0, 1.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0]])) == (
        pytest.approx([2.0, 1.0])
    )
    wobble = np.array([[0, 50, 70, 55, 45, 65, 30, 70, 100]], float).T
    events = gripper_events(np.arange(9.0), np.hstack([wobble, 100 - wobble]))
    assert [(e.time_s, e.hand, e.closes) for e in events] == [
        (2.0, 0, True),
        (2.0, 1, False),
        (6.0, 0, False),
        (6.0, 1, True),
        (7.0, 0, True),
        (7.0, 1, False),
    ]


def test_a_moved_chunk_by_hand():
    layout = load_robot_config(resource("config/astribot_s1.yaml")).layout
    chunk = np.zeros((2, layout.dof))
    moved = chunk.copy()
    moved[:, 0] = 0.01  # one of the 14 arm joints
    moved[0, layout.gripper] = (40.0, 60.0)
    assert difference(chunk, moved, layout) == pytest.approx([10.0 / np.sqrt(14), 0.25])
    rows = [{"query": q, "rho": 0.9, **{key: [q, 0.1 * q] for key in MEASURED}} for q in (5, 7)]
    record = moving(2, 0)
    records = [
        replace(record, about={**record.about, "actions": {"rhos": [0.9], "rows": some}})
        for some in (rows, rows[:1], [])
    ]
    error = action_errors(records)[0.9][SAFE]
    assert (error.arms_mrad.mean, error.arms_mrad.episodes) == (5.5, 2)  # of 6 and 5
    assert error.gripper.mean == pytest.approx(0.55)
    assert (error.beyond_safe_mrad.mean, error.beyond_safe_mrad.episodes) == (0.0, 2)


def test_bands_of_a_wide_image():
    record = moving(2, 0)
    wide = replace(
        record,
        about={**record.about, "cameras": [["head", 256]], "resolution": {"head": [360, 640]}},
    )
    black = black_tokens(wide).reshape(16, 16)
    assert black.all(1).tolist() == 3 * [True] + 10 * [False] + 3 * [True]
    assert black.sum() == 96
    rows = np.repeat(np.arange(16.0), 16)
    heat = map_over_image(np.zeros((360, 640, 3), np.uint8), rows, (360, 640))
    assert heat.shape == (360, 640)
    assert (heat[0, 0], heat[200, 320], heat[-1, -1]) == (3.0, 8.0, 12.0)


def test_a_record_survives_its_file(tmp_path):
    record = moving(3, 2)
    path = tmp_path / "records" / "one.npz"
    record.save(path)
    again = SaliencyRecord.load(path)
    assert again.about == record.about
    assert np.array_equal(again.deep, record.deep)
    assert again.images == {name: list(data) for name, data in record.images.items()}
    assert again.image("wrist", 2).shape == (36, 64, 3)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ConfigError, match="expected a saliency record"):
        SaliencyRecord.load(path)


def inputs(seed):
    """A scene that differs a little by seed."""
    random = np.random.default_rng(0)
    blobs = {
        name: random.integers(0, 255, (6, 8, 3), np.uint8) for name in ("head", "left", "right")
    }
    images = {}
    for name, blob in blobs.items():
        picture = Image.fromarray(blob).resize((96, 72), Image.Resampling.BILINEAR)
        images[name] = np.roll(np.asarray(picture), 9 * seed, 1)
    return PolicyInput(images, 0.1 * random.standard_normal(16), "pick up the ball")


@pytest.mark.parametrize("rows", ["text", "last_text", "action_probe"])
def test_the_recorder_sees_what_the_pruner_sees(small_checkpoint, rows):
    safe = replace(load_preset(None, "robot"), query_rows=rows, gamma=-1.0)
    settings = EngineSettings(small_checkpoint, device="cpu", threads=1, pruner=safe)
    checkpoint, tokenizer = load_policy(settings)
    noises = np.random.default_rng(1).standard_normal((3, 50, 32))
    recorder = RecordingEngine(
        checkpoint, tokenizer, replace(settings, pruner=recording_settings(safe))
    )
    recorded = [recorder.step(inputs(q), noises[q])[0] for q in range(3)]
    vanilla = policy_engine(
        checkpoint, tokenizer, replace(settings, pruner=load_preset(None, "vanilla"))
    )
    for q in range(3):
        assert np.allclose(recorded[q], vanilla.step(inputs(q), noises[q])[0], atol=1e-5)

    seen = recorder.queries
    record = replace(
        moving(3, 0),
        about={
            "cameras": [[name, 64] for name in ("head", "left", "right")],
            "layer": 3,
            "seed": 0,
        },
        z_hat=np.stack([query.z_hat for query in seen]),
        early={name: np.stack([query.early[name] for query in seen]) for name in EARLY},
        deep=np.stack([query.deep for query in seen]),
    )
    replay = Replay(record, safe)
    trace = replay.keyframes()
    engine = policy_engine(checkpoint, tokenizer, settings)
    for q in range(3):
        _, report = engine.step(inputs(q), noises[q])
        assert report.keyframe == trace.keyframe[q]
        assert report.kappa == pytest.approx(trace.kappa[q], abs=1e-4, nan_ok=True)
        if q:
            kept = np.zeros(192, bool)
            kept[keep_tokens(replay, SAFE, safe.rho, 0, q)] = True
            own = {
                name: np.flatnonzero(kept[64 * i : 64 * i + 64])
                for i, (name, _) in enumerate(record.cameras)
            }
            overlap = sum(len(np.intersect1d(own[n], report.kept_indices[n])) for n in own)
            assert overlap >= safe.kept(192) - 1  # z in half precision
    pruned, _ = engine.step(inputs(2), noises[2])
    keep = keep_tokens(replay, SAFE, safe.rho, 0, 2)
    assert np.allclose(recorder.act(inputs(2), noises[2], keep), pruned, atol=1e-3)
    assert np.allclose(recorder.act(inputs(2), noises[2], None), recorded[2], atol=1e-6)
    assert not np.allclose(pruned, recorded[2], atol=1e-3)
    assert len(recorder.queries) == 3
    fastv = policy_engine(
        checkpoint, tokenizer, replace(settings, pruner=load_preset(None, "fastv"))
    )
    _, report = fastv.step(inputs(1), noises[1])
    kept = keep_tokens(replay, "fastv", 0.75, 0, 1)
    assert report.kept_indices["head"].tolist() == [i for i in kept.tolist() if i < 64]


def test_the_command_records_draws_and_draws_again(small_checkpoint, tmp_path, capsys):
    out = tmp_path / "study"
    words = ["--checkpoint", str(small_checkpoint), "--out", str(out), "--device", "cpu"]
    words += ["--episodes", "1", "--tasks", "throw_basketball", "pack_doll"]
    words += ["--time-limit-s", "1.8", "--query-period-s", "0.2", "--latency-s", "0.05"]
    words += ["--gamma", "0.5", "--rho", "0.5", "0.75", "--horizon", "3"]
    assert command.main(words) == 0
    records = command.load_records(out / "records")
    assert [record.about["task"] for record in records] == ["throw_basketball", "pack_doll"]
    record = records[0]
    queries = record.queries
    assert queries > 5
    assert record.deep.shape == (queries, 5, 192)
    assert record.prefill.shape == (4, 192)
    assert record.deep.sum(-1) == pytest.approx(1.0)
    assert record.early["action_probe"].sum(-1) == pytest.approx(1.0)
    assert np.all(record.early["fastv"].sum(-1) < 1.0)  # some of it goes to the text
    assert record.prefill[2] == pytest.approx(record.early["text"][record.about["moment"]])
    assert record.hand_speed_m_s.max() > 0.001
    assert record.about["hands"] == ["left", "right"]
    files = ["episode_throw_basketball", "episode_pack_doll", "forecast", "core_loss", "layers"]
    for name in files:
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 300
    summary = json.loads((out / "summary.json").read_text())
    assert summary["queries"] == sum(r.queries for r in records)
    assert summary["pruner"]["gamma"] == 0.5
    assert summary["core"]["scores"]["0.75"]["oracle"]["core_loss"]["mean"] == 0.0
    errors = summary["actions"]["errors"]
    assert errors["0.75"]["random"]["arms_mrad"]["mean"] > 0.0
    assert errors["0"]["other_noise"]["arms_mrad"]["episodes"] == 2
    assert errors["0"]["other_noise"]["arms_mrad"]["mean"] > 0.0
    assert "small and trained on scripted demonstrations" in (out / "summary.md").read_text()
    assert "core tokens lost at rho 0.75" in capsys.readouterr().out

    again = [*words, "--figures-only", "--gamma", "1.5", "--checkpoint", "nowhere"]
    (out / "forecast.png").unlink()
    assert command.main(again) == 0
    assert (out / "forecast.png").is_file()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["keyframe_rate"] == 1.0
    assert summary["core"]["steps"] == 0
    assert command.main([*words, "--noise-seed", "3"]) == 1
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert "rollout: found" in line
    assert "another --out" in line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--figures-only"], "found no record"),
        (["--checkpoint", "nowhere"], "--checkpoint: found no model.safetensors in nowhere"),
        (["--preset", "fastv"], "--preset: found fastv, expected a preset of method safe"),
        (["--rho", "0.5", "0.5"], "--rho: found"),
        (["--rho", "1.0"], "rho: found 1.0"),
        (["--tasks", "juggle"], "task: found juggle"),
        (["--episodes", "0"], "--episodes: found 0"),
    ],
)
def test_mistakes_are_one_line(words, named, tmp_path, capsys):
    assert command.main(["--out", str(tmp_path), *words]) == 1
    out = capsys.readouterr().out.strip()
    assert named in out
    assert "Traceback" not in out
