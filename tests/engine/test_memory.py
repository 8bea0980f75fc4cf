from __future__ import annotations

from pathlib import Path

import pytest

from batchinfer.engine.memory import GIB, free_memory, num_pages
from batchinfer.types import ExitCode, JobError

MEMINFO = "MemTotal:  100 kB\nMemAvailable:   2097152 kB\n"


def test_the_pool_is_what_was_asked_for() -> None:
    assert num_pages(2**20, 16, 256, 8192, asked_gb=1.0, free_bytes=0) == 1024


def test_the_pool_is_never_larger_than_all_slots_could_use() -> None:
    assert num_pages(1, 16, 4, 33, asked_gb=1.0, free_bytes=0) == 4 * 3


def test_the_automatic_pool_leaves_most_of_the_memory_alone() -> None:
    pages = num_pages(2**20, 16, 2**16, 2**20, asked_gb=0, free_bytes=4 * GIB)
    assert 0 < pages * 2**20 <= 2 * GIB


def test_no_room_for_one_page_says_what_to_do() -> None:
    with pytest.raises(JobError, match=r"one KV page.*engine\.kv_cache_gb") as error:
        num_pages(2**30, 16, 4, 64, asked_gb=0.5, free_bytes=64 * GIB)
    assert error.value.exit_code == ExitCode.UNFIT


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 2 * GIB),
        ({"memory.max": "max", "memory.current": "5"}, 2 * GIB),
        ({"memory.max": str(GIB), "memory.current": "1000"}, GIB - 1000),
        ({"memory/memory.limit_in_bytes": "5000", "memory/memory.usage_in_bytes": "6000"}, 0),
        ({"memory.max": str(2**63), "memory.current": "0"}, 2 * GIB),
    ],
)
def test_free_memory_is_what_the_cgroup_still_allows(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "meminfo").write_text(MEMINFO)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path, tmp_path / "meminfo") == expected
