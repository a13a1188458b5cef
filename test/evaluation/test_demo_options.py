"""Wrong options of the demo: refused before anything is built or started."""

from __future__ import annotations

import pytest
from rich.console import Console

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.evaluation.demo import DemoOptions, run_demo


def test_a_misspelt_checkpoint_does_not_become_random_weights(tmp_path):
    checkpoint = tmp_path / "my_polcy"
    with pytest.raises(ConfigError, match="my_polcy"):
        run_demo(DemoOptions(checkpoint=checkpoint, out=tmp_path / "out"), Console())
    assert not checkpoint.exists()


@pytest.mark.parametrize("seconds", [0.0, -3.0, float("nan")])
def test_no_time_is_no_run(tmp_path, seconds):
    with pytest.raises(ConfigError, match="seconds"):
        run_demo(DemoOptions(seconds=seconds, out=tmp_path / "out"), Console())
