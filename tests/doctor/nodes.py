"""Facts of nodes that are not here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from batchinfer.doctor.facts import Build, Facts, Gpu, Gpus, Mpi, Node, Torch

H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0", 80 << 30, "0000:17:00.0")
V100 = Gpu("Tesla V100-SXM2-16GB", "7.0", 16 << 30, "0000:18:00.0")

CPU_BUILD = Build(compiler="gcc 12.2.0", isas=("avx512", "avx2", "generic"), usable=("avx2", "generic"), isa="avx2")
CUDA_BUILD = replace(CPU_BUILD, device="cuda", toolkit="12.8.93", architectures=("80-real", "90a-real", "90-virtual"))
CPU_TORCH = Torch("2.9.0+cpu")
CUDA_TORCH = Torch("2.9.0+cu128", "cuda", "12.8", ("sm_80", "sm_90", "compute_90"), 4)

NODE = Node("node1", "Linux 5.14", "x86_64", "Some CPU", 128, tuple(range(128)), frozenset({"avx2", "fma"}), 1 << 38)
"""Of a CPU cluster."""

LOGIN = Facts("0.1.0", "3.11.7", CPU_BUILD, CPU_TORCH, Gpus({}, reason=""), NODE, Mpi())
"""A node without GPUs and MPI, and a build for it."""

GPU_NODE = replace(
    LOGIN,
    build=CUDA_BUILD,
    torch=CUDA_TORCH,
    gpus=Gpus({"cuda": 4}, "570.86.15", "12.8", (H100,) * 4, 4),
)
"""Four H100, and a build for them."""


def change(facts: Facts, **parts: dict[str, Any]) -> Facts:
    """The facts with other values in the named parts: change(GPU_NODE, gpus={"usable": 0})."""
    return replace(facts, **{name: replace(getattr(facts, name), **values) for name, values in parts.items()})
