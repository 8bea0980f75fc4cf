"""What the device reaches at most, measured through torch in about a second."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from batchinfer.config import EngineConfig
from batchinfer.engine.memory import cpu_count
from batchinfer.engine.roofline import Ceilings
from batchinfer.ops.accelerator import Accelerator
from batchinfer.ops.choice import choose, find_gpus
from batchinfer.types import ExitCode, JobError

SECONDS = 0.25
"""Each measurement is repeated for so long, and the fastest counts: other processes take slices of some 10 ms."""

CPU_BYTES, CPU_SIDE = 2**28, 1024
"""A vector larger than most last-level caches, a square matrix of which a product takes some 10 ms."""

GPU_BYTES, GPU_SIDE = 2**30, 8192
"""An H100 reads and writes the one in 0.7 ms, and takes 1.6 ms for a product of the other."""


def measure(config: EngineConfig, dtype: torch.dtype) -> Ceilings:
    """The ceilings of the engine's device for weights of ``dtype``: the faster of reading and of copying a vector, and
    the rate of a product of square matrices (on a CPU the better one of ``dtype`` and float32, because a CPU without
    instructions for bfloat16 computes in float32). JobError (69) where the build or the node lacks the device."""
    try:
        device = torch.device(choose(config.device, config.ops, find_gpus).device)
    except RuntimeError as error:
        raise JobError(f"engine.device={config.device}: {error}", ExitCode.UNFIT) from None
    gpu = device.type != "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or cpu_count())
    try:
        dtypes = [dtype] if gpu else list({dtype, torch.float32})
        flops = max(_product_rate(GPU_SIDE if gpu else CPU_SIDE, kind, device) for kind in dtypes)
        return Ceilings(flops, _bandwidth(GPU_BYTES if gpu else CPU_BYTES, device))
    finally:
        torch.set_num_threads(threads)
        if gpu:
            Accelerator(device).empty_cache()


def _product_rate(side: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _fastest(lambda: torch.mm(a, b, out=out), device)


def _bandwidth(size: int, device: torch.device) -> float:
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * size / _fastest(lambda: target.copy_(source), device)
    return max(copied, size / _fastest(source.sum, device))


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    run()  # what is made at first use
    best, end = math.inf, time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end:
        run()
        if device.type != "cpu":
            Accelerator(device).synchronize()
        best = min(best, time.perf_counter() - start)
    return best
