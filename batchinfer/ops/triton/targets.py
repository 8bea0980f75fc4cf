"""GPUs that kernels can be compiled for where there are none."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Target:
    """``shared``: bytes of shared memory that a program may take, as torch tells it on such a GPU."""

    gpu: GPUTarget
    shared: int

    @property
    def rdna(self) -> bool:
        return str(self.gpu.arch).startswith("gfx1")


TARGETS = {
    "sm_75": Target(GPUTarget("cuda", 75, 32), 64 << 10),
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99 << 10),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99 << 10),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 << 10),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 << 10),
    "gfx90a": Target(GPUTarget("hip", "gfx90a", 64), 64 << 10),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10),
    "gfx1100": Target(GPUTarget("hip", "gfx1100", 32), 64 << 10),
}
"""By their names in CUDA and ROCm."""


class AbsentDevice:
    """Stands where Triton asks which device is current."""

    def __init__(self, target: GPUTarget):
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)

    def get_current_stream(self, device: str) -> int:
        return 0
