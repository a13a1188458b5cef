import json
from dataclasses import replace

import pytest
from torch import nn

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.adopt import adopt
from safe_pruner_node.pi05.config import Pi05Config


def test_adopts_a_live_openpi_model_without_a_copy(
    tmp_path, tiny_model, tiny_224, norm_stats, make_case, run_openpi
):
    """openpi's own class; LeRobot's policy as a module with openpi's network in `.model`."""
    model = tiny_model(7, tiny_224)
    cameras = ("base_0_rgb", "right_wrist_0_rgb")
    make_case(tmp_path / "case_0", model, norm_stats, 7, cameras, 9)
    run_openpi("share", tmp_path)
    answer = json.loads((tmp_path / "answer.json").read_text())
    for kind in ("openpi", "after a change", "policy"):
        assert answer[kind]["own_storage"] == [], kind
        assert answer[kind]["error"] <= 1e-5, kind
        config = Pi05Config.from_json("answer", answer[kind]["config"])
        assert config == replace(tiny_224, name="live", max_prompt_tokens=200)
    assert answer["mixed_finite"]


def test_refuses_something_else():
    with pytest.raises(
        ConfigError, match=r"live model: found Linear, expected openpi's PI0Pytorch"
    ):
        adopt(nn.Linear(2, 2))
