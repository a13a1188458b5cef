"""The small policy as fixtures."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are imported by name

from small_policy import Frames, random_model

from safe_pruner_node.engine.session import PolicySession


@pytest.fixture(scope="session")
def model():
    return random_model()


@pytest.fixture(scope="session")
def frames():
    return Frames()


@pytest.fixture
def session(model):
    return lambda settings: PolicySession(model, settings)
