"""Stages through torch.compile are the same stages."""

import shutil

import pytest
import torch
from small_policy import Frames

from safe_pruner_node.engine import stages
from safe_pruner_node.engine.build import choose_runner
from safe_pruner_node.engine.compiled import CompiledRunner
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


def unsettled(x):
    return x * 2 if x.sum() > 0 else x  # branches on a value


@needs_compiler
def test_a_stage_that_is_not_one_graph_is_refused():
    with pytest.raises(Exception, match=r"(?i)data-dependent"):
        CompiledRunner(torch.device("cpu")).run(unsettled, (), torch.ones(3))


def test_it_is_chosen_by_name_on_any_device(model):
    assert choose_runner("compiled", model).path == "compiled"
