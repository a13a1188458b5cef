import subprocess
import sys
from dataclasses import replace

import pytest

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pruning.registry import PRUNERS, build_pruner
from safe_pruner_node.pruning.settings import METHODS, PrunerSettings, load_preset


def test_shipped_presets_load_and_say_what_the_method_page_says():
    paper, robot = load_preset(None, "paper"), load_preset(None, "robot")
    assert (paper.match_within_camera, paper.camera_floor) == (False, 0)
    assert (robot.match_within_camera, robot.camera_floor) == (True, 16)
    for preset in (paper, robot):
        assert (preset.method, preset.rho, preset.layer) == ("safe", 0.75, 3)
        assert preset.lambda_ == 0.5
        assert (preset.query_rows, preset.softmax_over) == ("text", "visual")
        assert preset.denoise_steps == "mean"
        assert preset.deep_layers(18) == (0, 16, 17)
    assert paper.gamma == 0.92  # the paper's; robot's is calibrated for checkpoints/nano
    assert robot == PrunerSettings(), "keys left out take the value shown in robot"
    for name in ("vanilla", "fastv", "random"):
        assert load_preset(None, name).method == name
    assert load_preset(None, "without_forecast").lambda_ == 0.0
    assert load_preset(None, "without_division").division == "fixed"
    assert load_preset(None, "robot", rho=0.5) == replace(robot, rho=0.5)


def test_every_method_has_a_pruner_and_every_pruner_a_method():
    assert tuple(PRUNERS) == METHODS
    for method in METHODS:
        assert type(build_pruner(PrunerSettings(method=method), 18)) is PRUNERS[method]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("method: saef", r"mine\.method: found saef, expected one of vanilla, safe,"),
        ("rho: 1.0", r"mine\.rho: found 1\.0, expected a number in \[0, 1\)"),
        ("rho: -0.1", r"mine\.rho: found -0\.1"),
        ("rho: 75 %", r"mine\.rho: found 75 %"),
        ("rho: .nan", r"mine\.rho: found nan"),
        ("gamma: high", r"mine\.gamma: found high, expected a number in \[-1, 2\]"),
        ("gamma: 92", r"mine\.gamma: found 92"),
        ("gamma: true", r"mine\.gamma: found True"),
        ("lambda: 1.5", r"mine\.lambda: found 1\.5, expected a number in \[0, 1\]"),
        ("layer: 0", r"mine\.layer: found 0, expected an integer of at least 1"),
        ("layer: 3.0", r"mine\.layer: found 3\.0"),
        ("deep: []", r"mine\.deep: found \(\), expected a list of expert layer"),
        ("deep: 3", r"mine\.deep: found 3"),
        ("deep: [0, last]", r"mine\.deep: found \(0, 'last'\)"),
        ("query_rows: state", r"mine\.query_rows: found state, expected one of text, last_text"),
        ("match_within_camera: 1", r"mine\.match_within_camera: found 1, expected true or false"),
        ("camera_floor: -1", r"mine\.camera_floor: found -1"),
        ("max_age: 0", r"mine\.max_age: found 0"),
        ("softmax_over: text", r"mine\.softmax_over: found text"),
        ("denoise_steps: middle", r"mine\.denoise_steps: found middle"),
        ("division: never", r"mine\.division: found never, expected one of adaptive, fixed"),
        ("interval: 0", r"mine\.interval: found 0"),
        ("seed: -1", r"mine\.seed: found -1"),
        ("rhoo: 0.5", r"mine\.rhoo: found an unknown key, expected one of method, rho,"),
    ],
)
def test_a_wrong_value_is_one_line_with_file_and_key(tmp_path, line, complaint):
    file = tmp_path / "pruners.yaml"
    method = "" if line.startswith("method") else "    method: safe\n"
    file.write_text(f"presets:\n  mine:\n{method}    {line}\n")
    with pytest.raises(ConfigError, match=r"pruners\.yaml: " + complaint) as error:
        load_preset(file, "mine")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, r"pruners\.yaml: found no such file"),
        ("presets: [", r"pruners\.yaml: found .*expected a readable YAML file"),
        ("robot: {}", r"pruners\.yaml: presets: found NoneType, expected a mapping"),
        ("presets:\n  other: {method: safe}", r"pruners\.yaml: pruner: found mine, .*other"),
        ("presets:\n  mine: safe", r"pruners\.yaml: mine: found str, expected a mapping"),
        ("presets:\n  mine: {rho: 0.5}", r"pruners\.yaml: mine\.method: found nothing"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, complaint):
    file = tmp_path / "pruners.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as error:
        load_preset(file, "mine")
    assert "\n" not in str(error.value)


def test_a_wrong_rho_parameter_is_not_blamed_on_the_file():
    with pytest.raises(ConfigError, match=r"^parameter: rho: found 1\.2, expected a number in"):
        load_preset(None, "robot", rho=1.2)


def test_layers_are_checked_against_the_model():
    settings = load_preset(None, "robot")
    with pytest.raises(ConfigError, match=r"config/pruners\.yaml: robot\.layer: found 3, .*1\.\.2"):
        build_pruner(settings, 3)
    with pytest.raises(ConfigError, match=r"robot\.deep: found \[0, 12\], expected .*-12\.\.11"):
        build_pruner(replace(settings, deep=(0, 12)), 12)
    build_pruner(replace(settings, method="vanilla"), 2)  # prunes at no layer


@pytest.mark.parametrize(("rho", "kept"), [(0.75, 192), (0.8, 154), (0.0, 768), (0.9999, 1)])
def test_k_is_rounded_over_all_visual_tokens(rho, kept):
    assert PrunerSettings(rho=rho).kept(768) == kept


def test_settings_import_no_torch():
    code = (
        "import sys, safe_pruner_node.pruning.settings, safe_pruner_node.engine.settings, "
        "safe_pruner_node.engine.base, safe_pruner_node; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
