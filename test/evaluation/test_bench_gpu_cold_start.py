"""A cold start is one: empty compiler caches, and the page cache is told of as it is."""

import os
import subprocess
import sys

import pytest
from bench_gpu_side import SMALL, make_bench

from safe_pruner_node.engine.runner import EagerRunner
from safe_pruner_node.evaluation.bench_gpu.cold_start import CACHES, cold_start, empty_caches
from safe_pruner_node.evaluation.bench_gpu.findings import Findings
from safe_pruner_node.evaluation.bench_gpu.page_cache import cached_share
from safe_pruner_node.evaluation.bench_gpu.report import markdown
from safe_pruner_node.evaluation.bench_gpu.section import DONE, run_section

MIB = 1 << 20


def test_a_process_started_cold_finds_empty_caches(monkeypatch):
    monkeypatch.setenv(CACHES[0], "/of/the/user")
    monkeypatch.delenv(CACHES[1], raising=False)
    code = f"import os; print(*(os.environ[name] for name in {CACHES}), sep='\\n')"
    with empty_caches():
        command = [sys.executable, "-c", code]
        folders = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        assert len(set(folders)) == len(CACHES)
        assert not any(os.path.exists(folder) for folder in folders)  # noqa: PTH110
    assert os.environ[CACHES[0]] == "/of/the/user"
    assert CACHES[1] not in os.environ


def test_a_worker_is_started_and_the_report_says_how_long_it_took(tmp_path):
    bench = make_bench(tmp_path, EagerRunner())
    result = run_section("cold_start", cold_start, bench)
    assert (result.status, result.data["checkpoint_in_page_cache"]) == (DONE, 1.0)
    start = result.data["start"]
    assert start["ready_s"] > start["parts"][-1]["after_s"] > 0
    text = markdown(Findings({}, SMALL, [result]))
    assert "## Cold start: eager" in text
    assert f"| ready | {start['ready_s']:.1f} |" in text
    assert "100 % of the checkpoint was in the page cache" in text


def test_what_the_kernel_dropped_is_not_in_the_page_cache(tmp_path):
    file_system = ["stat", "--file-system", "--format=%T", str(tmp_path)]
    if subprocess.run(file_system, check=True, capture_output=True, text=True).stdout == "tmpfs\n":
        pytest.skip("a file system in memory drops nothing")
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(8 * MIB))
    assert cached_share(path) == 1.0
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 4 * MIB, 0, os.POSIX_FADV_DONTNEED)  # the second half
    assert cached_share(path) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("size", [1, 1000])
def test_a_small_file_has_a_share_too(tmp_path, size):
    path = tmp_path / "small"
    path.write_bytes(bytes(size))
    assert cached_share(path) == 1.0
