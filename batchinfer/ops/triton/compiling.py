"""The Triton ops as a compiler: what a GPU would launch is compiled, for a target that need not be here."""

from __future__ import annotations

from typing import Any

from triton.runtime import driver

from batchinfer.ops.triton.backend import TritonOps
from batchinfer.ops.triton.mixture import Mixture
from batchinfer.ops.triton.targets import AbsentDevice, Target


class CompilingOps(TritonOps):
    """``device`` "meta": tensors have shapes and no memory, so any model fits. ``kernels``: what Triton has compiled,
    which it keeps in $TRITON_CACHE_DIR, too, and takes from there the next time."""

    def __init__(self, target: Target, device: str = "meta"):
        super().__init__(device)
        driver.set_active(AbsentDevice(target.gpu))
        self.target = target
        self.kernels: list[Any] = []
        self._rdna = target.rdna
        self._mixture = Mixture(target.shared, target.rdna)

    def _run(self, kernel: Any, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> None:
        compiled = kernel.warmup(*args, grid=grid, **options)
        if all(compiled is not other for other in self.kernels):
            self.kernels.append(compiled)
