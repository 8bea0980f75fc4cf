"""What the kernel tests run on: a GPU, or what BATCHINFER_GPU_EMULATOR names: the extension of the emulator
(tests/simt), or that of tests/sycl, whose kernels run on a CPU. On a GPU, BATCHINFER_GPU_OPS=triton takes
Triton's kernels instead of the extension's.

The emulator takes a million times as long, so tests ask :func:`sized` for what each can do.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
from typing import TypeVar

import torch

from batchinfer.ops.device import DeviceOps
from batchinfer.ops.gpu import GpuOps, open_gpu

T = TypeVar("T")
EMULATOR = os.environ.get("BATCHINFER_GPU_EMULATOR", "")
SIMT = bool(EMULATOR) and hasattr(ctypes.CDLL(EMULATOR), "simt_seed")
SYCL = bool(EMULATOR) and not SIMT
DEVICE = torch.device("cpu" if EMULATOR else "cuda")


class EmulatedOps(GpuOps):
    """The GPU backend with the kernels run by the emulator, on tensors in host memory."""

    def __init__(self) -> None:
        loader = importlib.machinery.ExtensionFileLoader("_gpu", EMULATOR)
        extension = importlib.util.module_from_spec(importlib.util.spec_from_loader("_gpu", loader))
        loader.exec_module(extension)
        super().__init__(DEVICE, extension)

    def _stream(self) -> int:
        return 0


def open_ops() -> DeviceOps:
    """Raises RuntimeError where there is neither."""
    if os.environ.get("BATCHINFER_GPU_OPS") == "triton":
        from batchinfer.ops.triton.backend import TritonOps

        return TritonOps()
    return EmulatedOps() if EMULATOR else open_gpu()


def put(t: torch.Tensor) -> torch.Tensor:
    """A copy where the kernels can reach it."""
    return t.to(DEVICE, copy=True)


def draw_schedule(seed: int) -> None:
    """In which order the emulator runs warps, and when copies happen, from here on. No effect elsewhere."""
    if SIMT:
        ctypes.CDLL(EMULATOR).simt_seed(ctypes.c_uint64(seed))


def sized(on_gpu: T, emulated: T) -> T:
    return emulated if EMULATOR else on_gpu
