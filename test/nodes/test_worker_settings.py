"""What the node's parameters ask of its worker."""

from __future__ import annotations

import dataclasses

import pytest

from safe_pruner_node.nodes import policy_node
from safe_pruner_node.nodes.parameters import PolicyNodeParameters
from safe_pruner_node.nodes.policy_node import worker_settings
from safe_pruner_node.resources import resource
from safe_pruner_node.robot.config import load_robot_config


@pytest.fixture(scope="module")
def robot():
    return load_robot_config(resource("config/astribot_s1.yaml"))


def settings(robot, **parameters):
    return worker_settings(
        PolicyNodeParameters(checkpoint="c", prompt="lift it", **parameters), robot
    )


@pytest.mark.parametrize(("threads", "images"), [(1, 1), (2, 2), (3, 3), (16, 3)])
def test_images_are_decoded_side_by_side_up_to_the_workers_threads(robot, threads, images):
    """One thread per image at most; torch has all of them."""
    worker = settings(robot, worker_threads=threads)
    assert (worker.threads, worker.engine.threads) == (images, threads)


def test_with_fewer_cameras_there_are_fewer_images(robot):
    one_camera = dataclasses.replace(robot, cameras=robot.cameras[:1])
    assert settings(one_camera, worker_threads=8).threads == 1


@pytest.mark.parametrize(("cores", "images"), [(None, 1), (1, 1), (2, 1), (3, 2), (64, 3)])
def test_by_default_control_keeps_a_core(robot, monkeypatch, cores, images):
    monkeypatch.setattr(policy_node.os, "cpu_count", lambda: cores)
    assert settings(robot).threads == images


def test_the_arithmetic_is_the_one_asked_for(robot):
    assert settings(robot, dtype="fp8").engine.dtype == "fp8"


def test_the_image_decoder_is_the_workers(robot):
    assert settings(robot).engine.image_decoder == "auto"
    assert settings(robot, image_decoder="nvjpeg").engine.image_decoder == "nvjpeg"
