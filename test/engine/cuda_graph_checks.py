"""Graphs against the eager path, as plain functions: where there is a GPU there may be no pytest.

python test/engine/cuda_graph_checks.py     compares on CUDA, then times checkpoints/nano
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from small_policy import Frames, random_model

from safe_pruner_node.engine.build import load_policy
from safe_pruner_node.engine.graphs import GraphRunner
from safe_pruner_node.engine.policy import PolicyEngine
from safe_pruner_node.engine.session import PolicySession
from safe_pruner_node.engine.settings import EngineSettings
from safe_pruner_node.pi05.checkpoint import mixed_dtype
from safe_pruner_node.pruning.settings import PrunerSettings
from safe_pruner_node.types import PolicyInput

PROMPT = "pick up the red cube"
NANO = Path(__file__).resolve().parents[2] / "checkpoints/nano"
SAFE = PrunerSettings(camera_floor=2, gamma=0.5)  # Frames jump: keyframes and pruned steps
METHODS = {
    "vanilla": PrunerSettings(method="vanilla", rho=0.0),
    "safe": SAFE,
    "safe, action probe": replace(SAFE, query_rows="action_probe", gamma=0.9),
    "safe, all keys, action probe": replace(
        SAFE, query_rows="action_probe", softmax_over="all", gamma=0.9
    ),
    "safe, global": replace(SAFE, match_within_camera=False, camera_floor=0, rho=0.5),
    "safe, last text row": replace(SAFE, query_rows="last_text", denoise_steps="last", deep=(1,)),
    "safe, first denoise step": replace(SAFE, denoise_steps="first", deep=(0, -1), layer=1),
    "safe, no forecast": replace(SAFE, lambda_=0.0),
    "fastv": replace(SAFE, method="fastv", query_rows="last_text", softmax_over="all"),
    "fastv, action probe": replace(SAFE, method="fastv", query_rows="action_probe"),
    "random": replace(SAFE, method="random"),
}


class Unpadded(GraphRunner):
    """Every prompt length is a kind of its own, and no mask is needed."""

    prompt_bucket = None


def compare(model, frames, methods, tolerance=0.0, same_keep=1.0, runner=None):
    """Play every method with a graph session and an eager one, all on one runner, twice.

    Args:
        model: The policy.
        frames: On the model's device.
        methods: Name to settings.
        tolerance: Greatest difference of actions, as part of the greatest action.
        same_keep: Share of the steps that have to keep the same tokens, 0..1; the actions of
            others are not compared.
        runner: Of the graph session; None makes one.

    Returns:
        Greatest difference found, likewise, and the runner.
    """
    runner = runner or GraphRunner(model.device)
    ours = PolicySession(model, SAFE, runner=runner)
    theirs = PolicySession(model, SAFE)
    worst, same, steps = 0.0, 0, 0
    for name, settings in [*methods.items(), *reversed(methods.items())]:
        ours.set_pruner(settings)
        theirs.set_pruner(settings)
        kinds, given = set(), []
        for t in range(len(frames)):
            a, b = frames.step(ours, t), frames.step(theirs, t)
            given.append((a.actions, a.actions.clone()))
            if a.decision.keep is not None:
                given.append((a.decision.keep, a.decision.keep.clone()))
            assert a.decision.reason == b.decision.reason, (name, t)
            assert same_keep < 1 or np.isclose(
                a.decision.kappa, b.decision.kappa, rtol=0, atol=1e-5, equal_nan=True
            ), (name, t)
            kinds.add(a.decision.keyframe)
            kept, expected = a.decision.keep, b.decision.keep
            steps += 1
            equal = kept is expected if expected is None else torch.equal(kept, expected)
            same += equal
            if equal:
                scale = b.actions.abs().max()
                worst = max(worst, float((a.actions - b.actions).abs().max() / scale))
        assert kinds == ({False, True} if settings.method == "safe" else {False}), name
        for later, then in given:  # nothing that was handed out has changed since
            assert torch.equal(later, then), name
        assert worst <= tolerance, (name, worst)
    assert same >= same_keep * steps, (same, steps)
    return worst, runner


def check_small_policy(device="cuda"):
    """fp32 tightly, openpi's mixed bf16 loosely."""
    frames = Frames(device=device)
    model = random_model().to(device)
    worst, _ = compare(model, frames, METHODS, 1e-4, runner=Unpadded(model.device))
    print(f"fp32, prompt not padded: greatest difference {worst:.1e} of the greatest action")
    worst, runner = compare(model, frames, METHODS, 1e-4)
    print(
        f"fp32: greatest difference {worst:.1e} of the greatest action; {runner.captures} captures"
    )
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(mixed_dtype(name))
    worst, runner = compare(model, frames, METHODS, 0.05, same_keep=0.9)
    print(
        f"bf16: greatest difference {worst:.1e} of the greatest action; {runner.captures} captures"
    )


def time_nano(device="cuda", steps=50):
    """Print p50 and p99 of whole engine steps on checkpoints/nano, eager and graphs.

    Also compares the actions of both on the same inputs and noise.
    """
    safe = PrunerSettings(gamma=-1.0)
    pruners = {
        "vanilla": METHODS["vanilla"],
        "SAFE keyframe": replace(safe, gamma=1.01),
        "SAFE pruned": safe,
    }
    for dtype in ("fp32", "bf16"):
        settings = EngineSettings(NANO, device=device, dtype=dtype)
        checkpoint, tokenizer = load_policy(settings)
        graphs = GraphRunner(checkpoint.model.device)
        for mode, pruner in pruners.items():
            chunks = {}
            for runner in (None, graphs):
                engine = PolicyEngine(checkpoint, tokenizer, pruner, runner=runner)
                engine.warm_up(lambda *_: None, prompt=PROMPT)
                random = np.random.default_rng(0)
                wall_ms, reports, chunks[runner] = [], [], []
                for _ in range(steps + 3):
                    images = {
                        name: random.integers(0, 256, (360, 640, 3), np.uint8)
                        for name in ("head", "left_wrist", "right_wrist")
                    }
                    inputs = PolicyInput(images, np.zeros(16), PROMPT)
                    started = time.perf_counter()
                    actions, report = engine.step(inputs)
                    wall_ms.append((time.perf_counter() - started) * 1e3)
                    reports.append(report)
                    chunks[runner].append(actions)
                p50, p99 = np.percentile(wall_ms[3:], [50, 99])
                stages = ", ".join(
                    f"{name} {np.median([r.stage_ms[name] for r in reports[3:]]):.2f}"
                    for name in reports[-1].stage_ms
                )
                print(f"{engine.describe()}, {mode}: p50 {p50:.1f}, p99 {p99:.1f} ms ({stages})")
            ours, theirs = np.array(chunks[graphs]), np.array(chunks[None])
            worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
            print(f"  off by {worst:.1e} of the greatest action at most")
            assert worst <= (1e-3 if dtype == "fp32" else 0.1), worst
        print(f"  {graphs.captures} captures")


if __name__ == "__main__":
    check_small_policy()
    time_nano()
