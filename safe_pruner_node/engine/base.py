"""The one interface of an engine: an observation in, an action chunk and a report out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from safe_pruner_node.pruning.settings import PrunerSettings
from safe_pruner_node.types import DeviceImage, FloatArray, PolicyInput, RgbImage, StepReport

Progress = Callable[[str, float], None]
"""Called with what is going on and how far it is, 0..1."""


class Engine(ABC):
    """One policy session on one device. Not thread-safe but for `place`: one caller at a time."""

    def place(self, camera: int, image: RgbImage) -> RgbImage:  # noqa: ARG002 - for a device
        """Begin to bring an image of the next step to the device, while others are decoded.

        A step takes images that were not placed just as well; they wait until it begins. Other
        threads may place a camera each, while no step runs.

        Args:
            camera: The image's place in the prefix.
            image: uint8, [h, w, 3].

        Returns:
            What to give to `step` in the image's place: the same pixels, not to be written, valid
            until the camera's next image is placed.
        """
        return image

    @property
    def decodes_jpeg(self) -> bool:
        """Whether `decode` is there; without it a step takes images that are decoded already."""
        return False

    def decode(self, jpegs: Sequence[bytes]) -> list[DeviceImage] | None:
        """Decode JPEGs straight into the device's memory.

        Args:
            jpegs: Whole files, 8 bits, luminance and two colours.

        Returns:
            An image each, at its whole size, to give to `step`. None: the decoder does not take one
            of them; another may.
        """
        raise NotImplementedError

    @abstractmethod
    def step(
        self, inputs: PolicyInput, noise: NDArray[np.float64] | None = None
    ) -> tuple[FloatArray, StepReport]:
        """Run one policy query.

        Args:
            inputs: Decoded images and state in the policy's units.
            noise: Initial noise of the flow, [horizon, model action_dim]; None draws it from
                the engine's own generator. Give the same noise to compare methods in pairs.

        Returns:
            Unnormalised actions in the policy's units, [horizon, action_dim of the
            statistics] (deltas not resolved: the layout does that), and the report.

        Raises:
            ConfigError: The input does not fit the checkpoint (state size, no image, empty
                prompt, prompt too long).
        """

    @abstractmethod
    def reset(self) -> None:
        """Begin a new episode: the next step is a keyframe, the query count restarts."""

    @abstractmethod
    def set_pruner(self, settings: PrunerSettings) -> None:
        """Change the method between episodes; begins a new session.

        On a warm engine that captures, what the method needs is captured here, for the prompt and
        the cameras of the last step.

        Raises:
            ConfigError: The settings do not fit the model or these cameras.
        """

    def set_prompt(self, prompt: str, progress: Progress) -> None:  # noqa: B027 - most have no need
        """Make ready for steps with another prompt; the session goes on.

        On a warm engine that captures, what prompts of such a length need and was not captured yet
        is captured here. Other engines have nothing to do.

        Args:
            prompt: The task in words.
            progress: Told what is being captured.

        Raises:
            ConfigError: The prompt does not fit; a step with it says the same.
        """

    @property
    @abstractmethod
    def image_side(self) -> int:
        """Pixels per side of the square that an image is fitted into."""

    @abstractmethod
    def describe(self) -> str:
        """Which path runs, in a few words: ``eager cpu float32, 1 thread``."""

    @abstractmethod
    def warm_up(self, progress: Progress, *, prompt: str = "", cameras: int = 3) -> None:
        """Run every path once so that the first real step is no slower than the others.

        All but the resize: only a step says how large the cameras' images are.

        Args:
            progress: Told what is being warmed.
            prompt: The task in words; empty: nobody knows it yet.
            cameras: How many cameras there will be.

        Raises:
            ConfigError: The pruner does not fit the cameras.
        """
