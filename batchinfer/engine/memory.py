"""How many KV pages fit: arithmetic on sizes, and the memory that this process may use."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

from batchinfer.types import ExitCode, JobError

GIB = 2**30
SHARE_OF_FREE = 0.4
"""Of the host memory free after loading the weights: the rest is for output, page cache and other users of a node."""
HOST_LIMIT = 8 * GIB

DEVICE_RESERVE = 0.03
"""Of a device's memory, left free beside the KV pool, and at least MIN_DEVICE_RESERVE: captured graphs, the allocator's
rounding, and what other libraries take later."""
MIN_DEVICE_RESERVE = GIB

SMALLER = 0.85
"""Of the pages that did not fit, tried once more: another process may have taken memory in between."""


def host_budget(free_bytes: int) -> int:
    """Bytes for the KV pool in host memory: a share of what is free, at most 8 GiB."""
    return min(int(free_bytes * SHARE_OF_FREE), HOST_LIMIT)


def device_budget(free_bytes: int, total_bytes: int) -> int:
    """Bytes for the KV pool in device memory: what a step of the largest size left free, less a reserve."""
    return max(0, free_bytes - max(int(total_bytes * DEVICE_RESERVE), MIN_DEVICE_RESERVE))


def num_pages(
    page_bytes: int, page_size: int, max_slots: int, max_model_len: int, *, asked_gb: float, budget: int
) -> int:
    """Pages of the pool. ``asked_gb`` 0: as many as ``budget`` bytes hold, and never more than all slots at full length
    could use.

    Raises JobError (69) with the arithmetic if not even one page fits.
    """
    size = int(asked_gb * GIB) if asked_gb else budget
    useful = max_slots * -(-max_model_len // page_size)
    pages = min(size // page_bytes, useful)
    if pages < 1:
        raise JobError(
            f"not enough memory for one KV page: a page of {page_size} tokens takes {page_bytes:,} bytes and "
            f"{size:,} bytes are set aside ({'engine.kv_cache_gb' if asked_gb else 'of the free memory'}). "
            "Raise engine.kv_cache_gb, lower engine.page_size, engine.max_step_tokens or engine.max_slots, or use "
            "fewer ranks per node.",
            ExitCode.UNFIT,
        )
    return pages


def allocate_or_shrink(
    allocate: Callable[[int], object], pages: int, page_bytes: int, full: type[Exception], free: Callable[[], int]
) -> int:
    """Call ``allocate(pages)``; if it raises ``full``, once more with fewer, which is said. The number that fitted.

    ``free()`` tells the free bytes for the message. Raises JobError (69) if the smaller pool does not fit either.
    """
    fewer = int(pages * SMALLER)
    sizes = (
        f"{pages:,} pages of {page_bytes:,} bytes are {pages * page_bytes / GIB:.2f} GiB, "
        f"{SMALLER:.0%} of them {fewer * page_bytes / GIB:.2f} GiB"
    )
    for tried in (pages, fewer):
        try:
            allocate(tried)
        except full:
            continue
        if tried < pages:
            print(f"batchinfer: the KV pool is smaller than planned: {sizes}, which fit", file=sys.stderr, flush=True)
        return tried
    raise JobError(
        f"the KV pool does not fit: {sizes}, and {free() / GIB:.2f} GiB are free now. Lower "
        "engine.kv_cache_gb, engine.num_pages, engine.max_step_tokens or engine.max_slots, or end what else uses "
        "this device.",
        ExitCode.UNFIT,
    )


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


def trim_heap() -> None:
    """Give the system back what has been freed: glibc keeps the memory of conversions while weights are loaded, 100 MB
    after those of a 135 M model, and 14 MB of its tokenizer's. Nothing where the C library is another one."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def cpu_count() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))
