"""What the kernel tests run on: a GPU, or what BATCHINFER_GPU_EMULATOR names: the extension of the emulator
(tests/simt), or that of tests/sycl, whose kernels run on a CPU. On a GPU, BATCHINFER_GPU_OPS=triton takes
Triton's kernels instead of the extension's; BATCHINFER_PLAIN_PRODUCTS=1 has products done in float32.

The emulator takes a million times as long, so tests ask :func:`sized` for what each can do.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import os
import time
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from batchinfer.ops.accelerator import Accelerator
from batchinfer.ops.device import DeviceOps
from batchinfer.ops.gpu import GpuOps, open_gpu

T = TypeVar("T")
EMULATOR = os.environ.get("BATCHINFER_GPU_EMULATOR", "")
SIMT = bool(EMULATOR) and hasattr(ctypes.CDLL(EMULATOR), "simt_seed")
SYCL = bool(EMULATOR) and not SIMT
TRITON = os.environ.get("BATCHINFER_GPU_OPS") == "triton"
DEVICE = torch.device("cpu" if EMULATOR else "xpu" if torch.xpu.is_available() else "cuda")


class EmulatedOps(GpuOps):
    """The GPU backend with the kernels run by the emulator, on tensors in host memory."""

    def __init__(self) -> None:
        loader = importlib.machinery.ExtensionFileLoader("_gpu", EMULATOR)
        extension = importlib.util.module_from_spec(importlib.util.spec_from_loader("_gpu", loader))
        loader.exec_module(extension)
        super().__init__(DEVICE, extension)

    def _stream(self) -> int:
        return 0


class HostEvent:
    """A time of the host's clock: where every launch is waited for, the device has passed it when it is recorded."""

    time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: HostEvent) -> float:
        return 1000 * (later.time - self.time)


class HostAccelerator(Accelerator):
    """The step loop's device where kernels run on the host: one queue that waits for each launch, no graphs."""

    OutOfMemory = MemoryError

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def stream(self) -> object:
        return None

    def on(self, stream: object) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def event(self) -> HostEvent:
        return HostEvent()

    def synchronize(self) -> None:
        pass

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def memory(self) -> tuple[int, int]:
        return 4 << 30, 8 << 30

    def peak_bytes(self) -> int:
        return 1

    def empty_cache(self) -> None:
        pass


def plain_linear(ops: DeviceOps, x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None) -> None:
    """For compute-sanitizer's racecheck (2025.3), in which cuBLAS's bfloat16 kernels for compute capability 9.0 end
    with an illegal memory access and "failed to handle a hardware exception", torch.mm by itself too."""
    product = torch.mm(x.float(), weight.float().t())
    out.copy_(product if bias is None else product + bias)


def open_ops() -> DeviceOps:
    """Raises RuntimeError where there is neither."""
    if os.environ.get("BATCHINFER_PLAIN_PRODUCTS"):
        DeviceOps._dense_linear = plain_linear  # type: ignore[method-assign]
    if TRITON:
        from batchinfer.ops.triton.backend import TritonOps

        return TritonOps(DEVICE.type)
    return EmulatedOps() if EMULATOR else open_gpu(DEVICE.type)


def warpgroup_kernels() -> bool:
    """Whether the extension's kernels for compute capability 9.0 run here (it was not built by ``ARCH=sm_90``)."""
    if SIMT:
        return Path(EMULATOR).stem == "_gpu" and os.environ.get("BATCHINFER_EMULATED_CAPABILITY", "9") == "9"
    return not (SYCL or TRITON) and torch.version.cuda is not None and torch.cuda.get_device_capability()[0] == 9


def put(t: torch.Tensor) -> torch.Tensor:
    """A copy where the kernels can reach it."""
    return t.to(DEVICE, copy=True)


def draw_schedule(seed: int) -> None:
    """In which order the emulator runs warps, and when copies happen, from here on. No effect elsewhere."""
    if SIMT:
        ctypes.CDLL(EMULATOR).simt_seed(ctypes.c_uint64(seed))


def sized(on_gpu: T, emulated: T) -> T:
    return emulated if EMULATOR else on_gpu
