"""What a reader of README.md relies on: names, defaults, commands, messages and links are real."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import rclpy
import yaml
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from safe_pruner_node.bringup import BringupOptions, NodeSpec, node_specs
from safe_pruner_node.nodes.parameters import PolicyNodeParameters
from safe_pruner_node.twin.settings import TwinSettings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
BASH = "\n".join(re.findall(r"^ *```bash\n(.*?)```", README, re.DOTALL | re.MULTILINE))

DOMAIN_ID = 97  # of this file's node alone
PATIENCE_S = 60.0
ROS_OWN = re.compile(
    r"/parameter_events|/rosout|~/(transition_event|get_\w+|change_state|\w*parameters\w*)"
)


def tables(text=PROSE):
    """Every table as (header cells, rows of cells)."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in block.splitlines()
        ]
        yield header, rows


def rows_below(*header):
    """Rows of all tables whose first cells of the header are these."""
    found = [row for head, rows in tables() if head[: len(header)] == list(header) for row in rows]
    assert found, f"no table with the header {header}"
    return found


def code(cell):
    """What a cell shows as code: its first `span`."""
    return re.match(r"`([^`]*)`", cell)[1]


def shown_defaults(rows, column):
    return {code(row[0]): yaml.safe_load(code(row[column])) for row in rows if row[column] != "–"}


def defaults(settings):
    return {field.name: field.default for field in dataclasses.fields(settings)}


def same(shown, default):
    """Equal, and not a number where the other is true or false."""
    return shown == default and isinstance(shown, bool) == isinstance(default, bool)


@pytest.mark.parametrize(
    ("header", "column", "settings"),
    [
        (("name", "launch argument", "parameter"), 1, BringupOptions),
        (("name", "launch argument", "parameter"), 2, PolicyNodeParameters),
        (("name", "default"), 1, TwinSettings),
    ],
)
def test_every_parameter_with_its_default(header, column, settings):
    shown, real = shown_defaults(rows_below(*header), column), defaults(settings)
    assert shown.keys() == real.keys()
    wrong = {k: (shown[k], real[k]) for k in real if not same(shown[k], real[k])}
    assert not wrong, "shown, real"


def test_keys_of_the_robot_file_with_their_values():
    robot = yaml.safe_load((ROOT / "config/astribot_s1.yaml").read_text())
    for row in rows_below("key", "value"):
        value = robot
        for key in code(row[0]).split("."):
            assert key in value, f"{code(row[0])} is not in the robot file"
            value = value[key]
        assert same(yaml.safe_load(code(row[1])), value), code(row[0])


def test_every_threshold_of_the_control_side_is_listed():
    robot = yaml.safe_load((ROOT / "config/astribot_s1.yaml").read_text())
    listed = {code(row[0]) for row in rows_below("key", "value")}
    for section in ("control", "policy"):
        assert {f"{section}.{key}" for key in robot[section]} <= listed


# --- the node's face ------------------------------------------------------------------------------


def spelled_out(name):
    """`/a_{b,c}/d` as /a_b/d and /a_c/d."""
    parts = [part.split(",") for part in re.split(r"[{}]", name)]
    return {"".join(choice) for choice in itertools.product(*parts)}


def listed(title, header):
    """Name to type of the first table below the line that begins with the title."""
    head, rows = next(tables(PROSE[PROSE.index(f"\n{title}") :]))
    assert head[:2] == [header, "type"]
    return {name: code(row[1]) for row in rows for name in spelled_out(code(row[0]))}


@pytest.fixture(scope="module")
def face(tmp_path_factory, small_checkpoint):
    """Names and types of a real, configured policy node, its own as ~/name."""
    (spec,) = node_specs(
        BringupOptions(checkpoint=str(small_checkpoint), prompt="x", worker_threads=1)
    )
    context = rclpy.Context()
    context.init(domain_id=DOMAIN_ID)
    observer = Node("observer", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(observer)
    log = tmp_path_factory.mktemp("face") / "safe_pruner.log"
    with log.open("wb") as stream:
        process = start(spec, stream)
    try:
        deadline_s = time.monotonic() + PATIENCE_S
        while "active in HOLD" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.1)
        wait_for_discovery(observer, executor)
        yield {
            kind: {own_name(name): types[0] for name, types in ask("safe_pruner", "/")}
            for kind, ask in {
                "Subscribed": observer.get_subscriber_names_and_types_by_node,
                "Published": observer.get_publisher_names_and_types_by_node,
                "Services": observer.get_service_names_and_types_by_node,
            }.items()
        }
    finally:
        process.terminate()
        process.wait(20)
        executor.shutdown()
        observer.destroy_node()
        context.try_shutdown()


def start(spec: NodeSpec, log):
    return subprocess.Popen(
        [sys.executable, "-m", spec.module, *spec.ros_arguments()],
        env=os.environ | {"ROS_DOMAIN_ID": str(DOMAIN_ID), "PYTHONUNBUFFERED": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for_discovery(observer, executor):
    """Until the graph has stayed the same for a second."""
    seen, unchanged_since_s = None, time.monotonic()
    deadline_s = unchanged_since_s + PATIENCE_S
    while time.monotonic() < deadline_s:
        executor.spin_once(timeout_sec=0.1)
        now = observer.get_topic_names_and_types(), observer.get_service_names_and_types()
        if now != seen:
            seen, unchanged_since_s = now, time.monotonic()
        known = ("safe_pruner", "/") in observer.get_node_names_and_namespaces()
        if known and time.monotonic() - unchanged_since_s > 1.0:
            return
    pytest.fail("the node was not discovered")


def own_name(name):
    return re.sub(r"^/safe_pruner/", "~/", name)


@pytest.mark.parametrize(
    ("title", "header"),
    [("Subscribed", "topic"), ("Published", "topic"), ("Services", "service")],
)
def test_topics_and_services_are_those_of_the_node(face, title, header):
    real = {name: kind for name, kind in face[title].items() if not ROS_OWN.fullmatch(name)}
    assert listed(title, header) == real


def test_commands_call_services_by_their_types(face):
    called = re.findall(r"ros2 service call (/\S+) (\S+)", BASH)
    assert len(called) >= 4
    for name, kind in called:
        if name == "/astribot_camera_control":
            assert kind == "std_srvs/srv/SetBool"  # the robot's, and the twin's
        else:
            assert face["Services"][own_name(name)] == kind


def test_commands_read_topics_that_exist(face):
    topics = face["Subscribed"].keys() | face["Published"].keys()
    read = re.findall(r"ros2 (?:topic|run rqt_image_view)\b[^\n#]*? (/\S+)", BASH)
    assert len(read) >= 8
    for name in read:
        assert own_name(name) in topics or name.startswith("/astribot_error_code/"), name


# --- commands, messages, links -------------------------------------------------------------------


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+[0-9]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    spans = "\n".join(re.findall(r"`([^`\n]+)`", PROSE))
    named = set(re.findall(r"\bmake ([a-z]+[0-9]*)", BASH + "\n" + spans))
    assert {"demo", "test", "bench"} <= named <= targets


def test_arguments_in_commands_exist():
    known = {"use_sim_time"}.union(*map(defaults, (BringupOptions, TwinSettings)))
    launch = re.findall(r"ros2 launch [^#\n]*(?:\\\n[^#\n]*)*", BASH)
    assert len(launch) >= 4
    for command in launch:
        assert set(re.findall(r"(\w+):=", command)) <= defaults(BringupOptions).keys(), command
    spans = "\n".join(re.findall(r"`([^`\n]+)`", PROSE))
    parameters = set(re.findall(r"(\w+):=", BASH + spans))
    assert parameters <= known


def test_what_the_node_says_is_said_somewhere_in_the_code():
    source = "\n".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text())  # a line that goes on in the next
        for path in (ROOT / "safe_pruner_node").rglob("*.py")
    )
    for _, said, _ in rows_below("symptom", "the node says", "do"):
        for words in re.findall(r"`([^`]+)`", said):
            for fragment in re.split("…| of joint", words):  # filled in there
                assert fragment.strip() in source, f"nobody says {words!r}"


def test_figures_of_the_summary_exist():
    evaluation = ROOT / "safe_pruner_node" / "evaluation"
    source = (evaluation / "run_record.py").read_text() + (evaluation / "demo.py").read_text()
    for row in rows_below("in `summary.json`", "meaning"):
        for key in re.findall(r"`(\w+)`", row[0]):
            assert f'"{key}"' in source, key


def anchors(text):
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", "calibration/README.md"])
def test_relative_links_resolve(page):
    path = ROOT / page
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    for target in targets:
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


def test_picture_has_its_own_background():
    """Else its dark lines vanish on a dark page."""
    svg = ET.parse(ROOT / "docs/architecture.svg").getroot()  # noqa: S314 - our own file
    space = "{http://www.w3.org/2000/svg}"
    first = next(item for item in svg if item.tag == f"{space}rect")
    size = [float(number) for number in svg.get("viewBox").split()]
    assert [float(first.get(key)) for key in ("width", "height")] == size[2:]
    assert first.get("fill") == "#ffffff"
    assert math.isclose(float(svg.get("width")) / float(svg.get("height")), size[2] / size[3])
