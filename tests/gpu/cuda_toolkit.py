"""Compilers of CUDA where a machine has none, from NVIDIA's wheels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NVCC = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)
"""Together nvcc of CUDA 13: 300 MB."""

CUDA12 = ("nvidia-cuda-nvcc-cu12==12.9.86", "nvidia-cuda-runtime-cu12==12.9.79", "nvidia-cuda-cccl-cu12==12.9.27")
"""All of CUDA 12 that Clang needs, 120 MB. Its nvcc is in no wheel."""


def install_nvcc(folder: Path) -> Path:
    """Into ``folder``, unless it is there. The toolkit's own folder, with bin/nvcc."""
    toolkit = folder / "nvidia/cu13"
    if not (toolkit / "lib64").exists():
        _install(NVCC, folder)
        (toolkit / "lib64").symlink_to("lib")  # where nvcc looks
    return toolkit


def install_cuda12(folder: Path) -> Path:
    """Into ``folder``, unless it is there. What Clang takes as --cuda-path."""
    toolkit = folder / "toolkit"
    if not toolkit.exists():
        _install(CUDA12, folder)
        parts = folder / "nvidia"
        (toolkit / "include").mkdir(parents=True)
        for part in ("cuda_runtime", "cuda_nvcc", "cuda_cccl"):
            for header in (parts / part / "include").iterdir():
                (toolkit / "include" / header.name).symlink_to(header)
        # Clang includes it first thing, and no wheel of these has it.
        (toolkit / "include/curand_mtgp32_kernel.h").touch()
        for name in ("bin", "nvvm"):
            (toolkit / name).symlink_to(parts / "cuda_nvcc" / name)
    return toolkit


def _install(packages: tuple[str, ...], folder: Path) -> None:
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
    subprocess.run([*pip, "--target", str(folder), *packages], check=True)
