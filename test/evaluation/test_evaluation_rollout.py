"""Rollouts in the real twin with a small random policy: paired, timed, and the same every time."""

from dataclasses import replace

import numpy as np
import pytest

from safe_pruner_node.control.supervisor import Mode
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.rollout import RolloutSettings, flow_noise, roll_out
from safe_pruner_node.evaluation.worker import Bench, Job, Refusal, WorkerPlan, work
from safe_pruner_node.pruning.settings import load_preset
from safe_pruner_node.resources import resource
from safe_pruner_node.twin.tasks.registry import build_task
from safe_pruner_node.twin.tasks.seeds import episode_seed

TASK = "throw_basketball"
SETTINGS = RolloutSettings(query_period_s=0.4, time_limit_s=1.5)
VANILLA, SAFE = load_preset(None, "vanilla"), load_preset(None, "robot")


def plan_of(checkpoint, **changes):
    engine = EngineSettings(checkpoint, device="cpu", threads=1, state_dim=16, action_dim=16)
    return WorkerPlan(replace(engine, **changes), resource("config/astribot_s1.yaml"), SETTINGS)


@pytest.fixture(scope="module")
def bench(small_checkpoint):
    return Bench(plan_of(small_checkpoint))


def run(bench, pruner, index=0, settings=SETTINGS, task=TASK):
    """An episode: what came of it, every command, and what the engine was given."""
    commands, given = [], []
    step = bench.policy.engine.step

    def spy(inputs, noise=None):
        # The engine takes the memory of an image again for the camera's next one.
        images = {name: image.copy() for name, image in inputs.images.items()}
        given.append((replace(inputs, images=images), noise))
        return step(inputs, noise)

    bench.policy.engine.step = spy
    try:
        rollout = roll_out(
            bench.policy,
            pruner,
            build_task(task, episode_seed("validation", index)),
            index,
            settings,
            noise_shape=bench.noise_shape,
            watch=commands.append,
        )
    finally:
        del bench.policy.engine.step
    return rollout, commands, given


def test_methods_see_the_same_scene_and_the_same_noise(bench):
    _, _, vanilla = run(bench, VANILLA)
    _, _, fastv = run(bench, load_preset(None, "fastv"))
    _, _, other = run(bench, VANILLA, index=1)
    assert len(vanilla) == len(fastv) == 4
    (first, _), (same, _), (different, _) = vanilla[0], fastv[0], other[0]
    assert list(first.images) == ["head", "left_wrist", "right_wrist"]
    # The head's 640x360 at half its size: this policy sees squares of 112 pixels.
    assert [image.shape for image in first.images.values()] == 3 * [(180, 320, 3)]
    for camera, image in first.images.items():
        assert np.array_equal(image, same.images[camera])
    assert np.array_equal(first.state, same.state)
    assert not np.array_equal(first.images["head"], different.images["head"])
    noises = [noise for _, noise in vanilla]
    assert all(np.array_equal(a, b) for a, (_, b) in zip(noises, fastv, strict=True))
    noises += [noise for _, noise in other]
    assert len({noise.tobytes() for noise in noises}) == 8


def test_noise_depends_on_every_number():
    base = flow_noise(0, "a", 0, 0, (2, 3))
    others = [(1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    assert base.shape == (2, 3)
    assert all(not np.array_equal(base, flow_noise(*key, (2, 3))) for key in others)


def test_the_policy_drives_from_the_first_chunk_on(bench):
    rollout, instants, _ = run(bench, VANILLA)
    modes = [instant.output.mode for instant in instants]
    assert len(instants) == 150
    assert modes.index(Mode.POLICY) == 10  # the tick at 0.1 s, where the chunk arrives
    assert set(modes[10:]) == {Mode.POLICY}
    assert [query.time_s for query in rollout.queries] == pytest.approx([0.0, 0.4, 0.8, 1.2])
    assert instants[10].output.chunk_time_s == pytest.approx(0.1)
    control = rollout.control
    assert (control.starved_ticks, control.holds, control.dropped_chunks) == (0, 0, 0)
    assert not np.allclose(instants[-1].output.position, instants[0].output.position, atol=1e-3)


def test_a_refused_chunk_is_told(bench):
    strict = replace(bench.policy.robot.control, first_action_tolerance_rad=1e-6)
    robot = bench.policy.robot
    bench.policy.robot = replace(robot, control=strict)
    try:
        rollout, instants, _ = run(bench, VANILLA)
    finally:
        bench.policy.robot = robot
    assert rollout.control.dropped_chunks == 4
    assert "first action of joint" in rollout.control.refusal
    assert {instant.output.mode for instant in instants} == {Mode.HOLD}


def test_safe_that_prunes_nothing_acts_as_vanilla(bench):
    _, vanilla, _ = run(bench, VANILLA)
    rollout, safe, _ = run(bench, replace(SAFE, rho=0.0, gamma=-1.0))
    assert [query.report.keyframe for query in rollout.queries] == [True, False, False, False]
    for a, b in zip(vanilla, safe, strict=True):
        assert np.allclose(a.output.position, b.output.position, atol=1e-4)
    _, pruned, _ = run(bench, SAFE)
    assert not np.allclose(pruned[-1].output.position, vanilla[-1].output.position, atol=1e-4)


def test_an_episode_does_not_depend_on_what_ran_before(bench):
    job = Job("random", 0.75, TASK, "validation", 3, load_preset(None, "random"))
    first = bench.run(job)
    bench.run(replace(job, method="safe", pruner=SAFE, index=4))
    again = bench.run(job)
    timed = {"wall_s", "step_ms", "stage_ms"}
    assert {k: v for k, v in first.items() if k not in timed} == {
        k: v for k, v in again.items() if k not in timed
    }
    assert first["seed"] == episode_seed("validation", 3)
    assert sum(first["kept_tokens"].values()) == 4 * 48
    assert first["pruned_steps"] == first["queries"] == len(first["step_ms"]) == 4


def test_images_without_jpeg_are_the_drawn_ones(bench):
    _, _, jpeg = run(bench, VANILLA)
    _, _, raw = run(bench, VANILLA, settings=replace(SETTINGS, jpeg_quality=0))
    a, b = (given[0][0].images["left_wrist"].astype(int) for given in (jpeg, raw))
    assert 0 < np.abs(a - b).mean() < 3


def test_a_checkpoint_of_another_layout_is_refused(small_checkpoint):
    job = Job("vanilla", 0.0, TASK, "validation", 0, VANILLA)
    answer = work(plan_of(small_checkpoint, action_dim=25), job)
    assert isinstance(answer, Refusal)
    assert "16 channels, expected 25" in answer.line


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"latency_s": -0.5}, "--latency-s: found -0.5, expected 0 to 10"),
        ({"control_rate_hz": 5.0}, "--control-rate-hz"),
        ({"query_period_s": 0.0}, "--query-period-s"),
        ({"jpeg_quality": 101}, "--jpeg-quality"),
    ],
)
def test_impossible_times_are_refused(change, named):
    with pytest.raises(ConfigError, match=named):
        RolloutSettings(**change)


def test_random_pruning_draws_anew_in_every_episode(bench):
    random = load_preset(None, "random")
    first, _, _ = run(bench, random)
    second, _, _ = run(bench, random, index=1)
    kept = [
        query.report.kept_indices["head"].tolist()
        for rollout in (first, second)
        for query in rollout.queries
    ]
    assert len(set(map(tuple, kept))) == len(kept)
