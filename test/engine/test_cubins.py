"""Compiled kernels on disk."""

import pytest

pytest.importorskip("triton", reason="they are kept where Triton keeps its own")

from safe_pruner_node.engine.cuda.cubins import cached, key_of

CUBIN = b"\x7fELF" + bytes(range(256))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


def never():
    raise AssertionError("compiled again")


def test_a_kernel_is_compiled_once(folder):
    key = key_of("source", "-DROWS=8", "13.0")
    assert cached(key, lambda: CUBIN) == CUBIN
    assert cached(key, never) == CUBIN
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 1


def test_another_source_option_or_compiler_is_another_kernel():
    parts = ("source", "-DROWS=8", "13.0")
    keys = {key_of(*parts), key_of(*parts, ""), key_of("source-DROWS=8", "13.0")}
    keys |= {key_of(*parts[:i], "other", *parts[i + 1 :]) for i in range(3)}
    assert len(keys) == 6
    for number, key in enumerate(sorted(keys)):
        assert cached(key, lambda number=number: bytes([number])) == bytes([number])


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-1] + b"!", lambda _: b""])
def test_a_damaged_file_counts_as_none(folder, damage):
    key = key_of("source")
    cached(key, lambda: CUBIN)
    (file,) = (path for path in folder.rglob("*") if path.is_file())
    file.write_bytes(damage(file.read_bytes()))
    assert cached(key, lambda: CUBIN + b"2") == CUBIN + b"2"
    assert cached(key, never) == CUBIN + b"2"


def test_a_failed_compilation_leaves_nothing(folder):
    key = key_of("source")

    def fails():
        raise RuntimeError("error: expected a ;")

    with pytest.raises(RuntimeError, match="expected a ;"):
        cached(key, fails)
    assert not [path for path in folder.rglob("*") if path.is_file()]
    assert cached(key, lambda: CUBIN) == CUBIN
