"""How many KV pages fit: arithmetic on sizes, and the memory that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

from batchinfer.types import ExitCode, JobError

GIB = 2**30
SHARE_OF_FREE = 0.4
"""Of the memory free after loading the weights: the rest is for output, page cache and the other users of a node."""
DEFAULT_LIMIT = 8 * GIB


def num_pages(
    page_bytes: int, page_size: int, max_slots: int, max_model_len: int, *, asked_gb: float, free_bytes: int
) -> int:
    """Pages of the pool. ``asked_gb`` 0: a share of ``free_bytes``, at most 8 GiB, and never more than all slots at
    full length could use.

    Raises JobError (69) with the arithmetic if not even one page fits.
    """
    budget = int(asked_gb * GIB) if asked_gb else min(int(free_bytes * SHARE_OF_FREE), DEFAULT_LIMIT)
    useful = max_slots * -(-max_model_len // page_size)
    pages = min(budget // page_bytes, useful)
    if pages < 1:
        raise JobError(
            f"not enough memory for one KV page: a page of {page_size} tokens takes {page_bytes:,} bytes and "
            f"{budget:,} bytes are set aside ({'engine.kv_cache_gb' if asked_gb else 'a share of the free memory'}). "
            "Raise engine.kv_cache_gb, lower engine.page_size, or use fewer ranks per node.",
            ExitCode.UNFIT,
        )
    return pages


def free_memory(cgroup: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that this process may still take: the smaller of what the node has available and what its cgroup allows."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for limit_file, usage_file in (
        (cgroup / "memory.max", cgroup / "memory.current"),
        (cgroup / "memory/memory.limit_in_bytes", cgroup / "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, usage = limit_file.read_text().strip(), int(usage_file.read_text())
        except (OSError, ValueError):
            continue
        if limit != "max":
            available = min(available, max(0, int(limit) - usage))
    return available


def cpu_count() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))
