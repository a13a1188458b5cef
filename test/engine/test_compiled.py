"""Stages through torch.compile are the same stages."""

import shutil

import pytest
import torch
from small_policy import Frames
from torch._dynamo.utils import counters

from safe_pruner_node.engine import flow, stages
from safe_pruner_node.engine.build import choose_runner
from safe_pruner_node.engine.compiled import CompiledRunner
from safe_pruner_node.engine.flow import FlowSchedule
from safe_pruner_node.engine.prompt import Prompt

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@needs_compiler
def test_a_compiled_stage_is_the_stage_for_every_prompt_of_its_bucket(model, frames):
    runner = CompiledRunner(torch.device("cpu"))
    with torch.inference_mode():
        z = stages.see(model, frames.images[0])
        for n_text in (7, 12):
            prompt = Prompt(Frames(n_text=n_text).tokens).padded(16)
            ours = runner.run(stages.read_early, (model, 2), z, prompt)
            theirs = stages.read_early(model, 2, z, prompt)
            assert (ours.layer, ours.n_visual) == (theirs.layer, theirs.n_visual)
            assert int(ours.prompt_valid) == n_text
            for a, b in zip(
                (ours.x, ours.text_query, *ours.cache[-1]),
                (theirs.x, theirs.text_query, *theirs.cache[-1]),
                strict=True,
            ):
                scale = float(b.abs().max())
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * scale)
    assert runner.captures == 1


@needs_compiler
def test_a_compiled_flow_is_the_flow_and_layers_share_their_code(model, frames):
    runner, schedule = CompiledRunner(torch.device("cpu")), FlowSchedule(model, 2)
    with torch.inference_mode():
        z = stages.see(model, frames.images[0])
        prompt = Prompt(frames.tokens)
        cache, noise = stages.read(model, z, prompt), frames.noise[0]
        arguments = (cache, noise, None, prompt)
        before = counters["stats"]["unique_graphs"]
        ours, _ = runner.run(stages.denoise, (model, schedule, len(z), None), *arguments)
        theirs, _ = stages.denoise(model, schedule, len(z), None, *arguments)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    assert counters["stats"]["unique_graphs"] - before == 1  # for every layer and step
    assert flow.expert_layer.__module__ == flow.__name__  # the plain layer is back
    assert not hasattr(flow.expert_layer, "_torchdynamo_orig_callable")


def test_it_is_chosen_by_name_on_any_device(model):
    assert choose_runner("compiled", model).path == "compiled"
