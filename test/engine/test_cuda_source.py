"""Sources of kernels as the compiler is given them."""

from pathlib import Path

import pytest

from safe_pruner_node.engine import cuda
from safe_pruner_node.engine.cuda.source import read_source

FOLDER = Path(cuda.__file__).parent


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.cu")), ids=lambda path: path.name)
def test_no_file_is_left_to_be_included(path):
    text = read_source(path)
    assert "#include" not in text
    assert (FOLDER / "sm90.cuh").read_text() in text


def test_what_is_included_stands_where_it_was(tmp_path):
    (tmp_path / "a.cu").write_text('first\n#include "b.cuh"\nlast \\1\n')
    (tmp_path / "b.cuh").write_text("in \\2 between")
    assert read_source(tmp_path / "a.cu") == "first\nin \\2 between\nlast \\1\n"


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    (tmp_path / "a.cu").write_text('#include "b.cuh"\n')
    with pytest.raises(FileNotFoundError):
        read_source(tmp_path / "a.cu")
