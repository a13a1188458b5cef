"""The prompt as PaliGemma tokens, with the state written into it (openpi's π0.5 format)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.types import FloatArray

CACHED_NAME = Path("big_vision/paligemma_tokenizer.model")
"""Where openpi keeps it below its data home."""


class PromptTokenizer:
    """A SentencePiece model and openpi's prompt format.

    Args:
        model_path: SentencePiece model file.
        max_tokens: Tokens kept, from the start of the prompt.

    Raises:
        ConfigError: The file is missing or no SentencePiece model.
    """

    def __init__(self, model_path: Path, max_tokens: int) -> None:
        self.model_path = model_path
        self.max_tokens = max_tokens
        expected = "a SentencePiece model"
        try:
            proto = Path(model_path).read_bytes()
        except OSError as error:
            raise ConfigError(model_path, "tokenizer", error.strerror, expected) from None
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(proto)
        except RuntimeError:
            found = f"{len(proto)} bytes of something else"
            raise ConfigError(model_path, "tokenizer", found, expected) from None
        if self._model.bos_id() < 0:
            raise ConfigError(model_path, "tokenizer", "no <bos> token", f"{expected} with <bos>")

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return int(self._model.vocab_size())

    def piece_id(self, piece: str) -> int | None:
        """Id of a piece; None when the model has no such piece."""
        number = int(self._model.piece_to_id(piece))
        return None if number == self._model.unk_id() else number

    def encode(self, prompt: str, state: FloatArray | None) -> NDArray[np.int64]:
        """Tokenise a prompt.

        Args:
            prompt: The task in words.
            state: Normalised state in [-1, 1] at the robot's own size, [dim]; None for
                checkpoints trained without the state in the prompt.

        Returns:
            Token ids without padding, [T], T <= max_tokens.
        """
        text = clean(prompt)
        if state is None:  # openpi's π0 format: the newline is tokenised on its own
            tokens = self._model.encode(text, add_bos=True) + self._model.encode("\n")
        else:
            bins = " ".join(map(str, discretize(state)))
            full = f"Task: {text}, State: {bins};\nAction: "
            tokens = self._model.encode(full, add_bos=True)
        return np.asarray(tokens[: self.max_tokens], dtype=np.int64)


def clean(prompt: str) -> str:
    """Strip the prompt; underscores and newlines become spaces."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


def discretize(state: FloatArray) -> NDArray[np.int64]:
    """Bin a normalised state into 256 bins over [-1, 1]; -1 is "below the range", as openpi's."""
    edges = np.linspace(-1, 1, 256 + 1)[:-1]
    return (np.digitize(state, bins=edges) - 1).astype(np.int64)


def find_tokenizer(checkpoint_dir: Path, parameter: Path | None = None) -> Path:
    """Find the SentencePiece file: the parameter, the checkpoint's own, openpi's cache.

    Raises:
        ConfigError: It is nowhere, or the file that the parameter names does not exist.
    """
    if parameter is not None:
        if not parameter.is_file():
            raise ConfigError("parameter", "tokenizer", parameter, "an existing file")
        return parameter
    data_home = os.environ.get("OPENPI_DATA_HOME", "~/.cache/openpi")
    cached = Path(data_home).expanduser() / CACHED_NAME
    for path in (checkpoint_dir / "tokenizer.model", cached):
        if path.is_file():
            return path
    raise ConfigError(
        checkpoint_dir / "tokenizer.model",
        "tokenizer",
        f"no file, nor {cached}",
        "paligemma_tokenizer.model (4264023 bytes, gs://big_vision/paligemma_tokenizer.model; "
        "openpi puts it there on its first run), or the parameter `tokenizer` naming it",
    )
