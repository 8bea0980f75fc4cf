from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from batchinfer.engine.memory import GIB, allocate_or_shrink, device_budget, free_memory, host_budget, num_pages
from batchinfer.types import ExitCode, JobError

MEMINFO = "MemTotal:  100 kB\nMemAvailable:   2097152 kB\n"


def test_the_pool_is_what_was_asked_for() -> None:
    assert num_pages(2**20, 16, 256, 8192, asked_gb=1.0, budget=0) == 1024


def test_the_pool_is_never_larger_than_all_slots_could_use() -> None:
    assert num_pages(1, 16, 4, 33, asked_gb=1.0, budget=0) == 4 * 3


def test_the_automatic_pool_leaves_most_of_the_memory_alone() -> None:
    pages = num_pages(2**20, 16, 2**16, 2**20, asked_gb=0, budget=host_budget(4 * GIB))
    assert 0 < pages * 2**20 <= 2 * GIB
    assert host_budget(2**60) == 8 * GIB


def test_a_device_is_filled_up_to_a_reserve() -> None:
    assert device_budget(60 * GIB, 80 * GIB) == 60 * GIB - int(2.4 * GIB)
    assert device_budget(10 * GIB, 12 * GIB) == 9 * GIB
    assert device_budget(GIB // 2, 80 * GIB) == 0


def test_a_pool_that_does_not_fit_is_made_smaller_once(capsys: pytest.CaptureFixture[str]) -> None:
    tried: list[int] = []

    def allocate(limit: int) -> Callable[[int], None]:
        def attempt(pages: int) -> None:
            tried.append(pages)
            if pages > limit:
                raise MemoryError

        return attempt

    assert allocate_or_shrink(allocate(100), 100, 2**20, MemoryError, lambda: 0) == 100
    assert capsys.readouterr().err == ""
    assert allocate_or_shrink(allocate(90), 100, 2**30, MemoryError, lambda: 0) == 85
    assert (
        "100 pages of 1,073,741,824 bytes are 100.00 GiB, 85% of them 85.00 GiB, which fit" in capsys.readouterr().err
    )
    assert tried == [100, 100, 85]
    with pytest.raises(
        JobError, match=r"4,096 pages of 1,048,576 bytes are 4\.00 GiB.*3\.\d\d GiB.*1\.50 GiB are free"
    ) as e:
        allocate_or_shrink(allocate(1), 4096, 2**20, MemoryError, lambda: 3 * GIB // 2)
    assert e.value.exit_code == ExitCode.UNFIT
    with pytest.raises(ZeroDivisionError):  # what is no lack of memory is not tried again
        allocate_or_shrink(lambda pages: 1 // 0, 8, 1, MemoryError, lambda: 0)


def test_no_room_for_one_page_says_what_to_do() -> None:
    with pytest.raises(JobError, match=r"one KV page.*engine\.kv_cache_gb") as error:
        num_pages(2**30, 16, 4, 64, asked_gb=0.5, budget=64 * GIB)
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_goes_back_to_the_system() -> None:
    """In a process of its own: blocks too small for mappings, freed but for the last, which holds the heap's end."""
    code = (
        "from mmap import PAGESIZE\n"
        "from batchinfer.engine.memory import trim_heap\n"
        "resident = lambda: int(open('/proc/self/statm').read().split()[1]) * PAGESIZE // 1024\n"
        "blocks = [bytearray(100_000) for _ in range(1000)]\n"
        "del blocks[:-1]\n"
        "kept = resident()\n"
        "trim_heap()\n"
        "print(kept - resident())\n"
    )
    freed = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert freed > 50_000  # kB, of 97,000
