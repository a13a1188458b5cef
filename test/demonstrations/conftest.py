"""A small dataset with images that can be told apart, and what went into it."""

from dataclasses import dataclass

import numpy as np
import pytest

from safe_pruner_node.demonstrations.schema import DatasetSpec
from safe_pruner_node.demonstrations.writer import DatasetWriter

HEAD, WRIST = "observation.images.head", "observation.images.wrist_left"
LENGTHS = (5, 17, 9)
PROMPTS = ("pick up the egg", "close the lid", "pick up the egg")
SPEC = DatasetSpec(
    fps=15,
    robot_type="astribot_s1",
    joint_names=("a", "b", "c"),
    cameras={HEAD: (48, 80), WRIST: (32, 50)},
    environment_names=("x", "y"),
)


@dataclass
class Recorded:
    """One episode as it was handed to the writer."""

    images: list
    state: np.ndarray
    action: np.ndarray
    environment: np.ndarray
    prompt: str


def moving_square(height, width, phase):
    """A square that crosses a gradient; every frame of every episode is different."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows * 3, columns * 2, np.full_like(rows, 40 + phase % 150)], -1)
    left = 2 * phase % (width - 12)
    image[8:20, left : left + 12] = (220, 60, 30)
    return image.astype(np.uint8)


def recorded(number):
    rng = np.random.default_rng(number)
    n = LENGTHS[number]
    frames = [
        {key: moving_square(*size, 20 * number + k) for key, size in SPEC.cameras.items()}
        for k in range(n)
    ]
    return Recorded(
        images=frames,
        state=rng.normal(size=(n, 3)),
        action=rng.normal(size=(n, 3)),
        environment=rng.normal(size=(n, 2)),
        prompt=PROMPTS[number],
    )


def write(out, **bounds):
    episodes = [recorded(number) for number in range(len(LENGTHS))]
    with DatasetWriter(out, SPEC) as writer:
        for number, episode in enumerate(episodes):
            writer.add_episode(
                episode.images,
                state=episode.state,
                action=episode.action,
                environment=episode.environment,
                prompt=episode.prompt,
                details={"seed": 100 + number},
            )
        writer.finish(**bounds)
    return episodes


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Folder of the dataset and its episodes."""
    out = tmp_path_factory.mktemp("demonstrations") / "dataset"
    return out, write(out)
