import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.pi05.tokenizer import PromptTokenizer, find_tokenizer

PROPERTY = settings(deadline=None, max_examples=50)


@pytest.fixture(scope="module")
def long(tokenizer_file):
    return PromptTokenizer(tokenizer_file, 100_000)


def test_the_prompt_is_openpis(long, tokenizer_file):
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    tokens = long.encode(" fold the_towel\n", np.array([-1.0, 0.0, 1.0]))
    assert tokens.dtype == np.int64
    assert tokens[0] == model.bos_id()
    assert model.eos_id() not in tokens
    text = model.decode(tokens[1:].tolist())
    assert text == "Task: fold the towel, State: 0 128 255;\nAction: "


@PROPERTY
@given(st.text(max_size=400), st.lists(st.floats(-1, 1), max_size=32), st.integers(1, 200))
def test_truncation_keeps_the_head(long, tokenizer_file, prompt, state, limit):
    state = np.array(state)
    whole = long.encode(prompt, state)
    tokens = PromptTokenizer(tokenizer_file, limit).encode(prompt, state)
    assert len(tokens) == min(limit, len(whole))
    np.testing.assert_array_equal(tokens, whole[:limit])


def test_without_state_the_prompt_ends_in_a_newline(long, tokenizer_file):
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    tokens = long.encode("open the drawer", None)
    assert tokens.tolist() == [model.bos_id(), *model.encode("open the drawer\n")]


def test_order_of_the_places(tmp_path, monkeypatch, tokenizer_file):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "data"))
    checkpoint, named = tmp_path / "checkpoint", tmp_path / "named.model"
    checkpoint.mkdir()
    with pytest.raises(ConfigError, match=r"paligemma_tokenizer\.model .*gs://big_vision") as e:
        find_tokenizer(checkpoint)
    assert str(tmp_path / "data/big_vision/paligemma_tokenizer.model") in str(e.value)
    cached = tmp_path / "data/big_vision/paligemma_tokenizer.model"
    cached.parent.mkdir(parents=True)
    for path in (cached, checkpoint / "tokenizer.model"):
        path.write_bytes(tokenizer_file.read_bytes())
        assert find_tokenizer(checkpoint) == path
    with pytest.raises(ConfigError, match=r"parameter: tokenizer: .*an existing file"):
        find_tokenizer(checkpoint, named)
    named.write_bytes(tokenizer_file.read_bytes())
    assert find_tokenizer(checkpoint, named) == named


def test_a_wrong_file_is_one_line(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(ConfigError, match="No such file"):
        PromptTokenizer(path, 200)
    path.write_bytes(b"not a model")
    with pytest.raises(ConfigError, match=r"11 bytes of something else.*SentencePiece"):
        PromptTokenizer(path, 200)
