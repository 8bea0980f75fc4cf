"""Which backend computes, and on which of the node's GPUs. The decision knows neither torch nor a driver."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

VENDORS = {"cuda": "CUDA", "rocm": "ROCm", "xpu": "oneAPI"}
"""Values of ``engine.device`` that are GPUs, and how they are called."""

TORCH_NAMES = {"cuda": "cuda", "rocm": "cuda", "xpu": "xpu"}
"""Torch's name of a vendor's devices: its builds for ROCm keep CUDA's."""


@dataclass(frozen=True)
class Gpus:
    """What this process can compute on.

    ``compiled``: the vendor whose kernels the extension holds, or "". ``torch``: the vendor that torch is built for, or
    "". ``triton``: Triton is installed. ``count``: devices that can be used; ``reason``: why there is none.
    """

    compiled: str = ""
    torch: str = ""
    triton: bool = False
    count: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Choice:
    """``backend``: cpu, reference, native (the extension's GPU kernels) or triton. ``device``: its name in torch,
    numbered among those that the process sees."""

    backend: str
    device: str = "cpu"


def choose(asked: str, ops: str, find: Callable[[], Gpus], rank: int = 0) -> Choice:
    """The backend for ``engine.device=asked`` and ``engine.ops=ops`` in rank ``rank`` of its node.

    auto is a GPU in a build that has kernels for one, and where torch can use one: such a build without a usable GPU,
    or a GPU without kernels, is a mistake to report, not a reason to compute a hundred times slower. On a GPU, auto is
    the extension's kernels where it has them, else Triton's. Rank i takes the i-th visible device, or the only one,
    where the launcher shows each rank its own; cluster/binding.py counts in the same way, and refuses ranks that would
    share one. Raises RuntimeError with the fix, to be read after the setting's name.
    """
    if asked not in ("auto", *VENDORS):
        return Choice(asked)
    gpus = find()
    if asked == "auto" and ops == "auto" and not gpus.compiled and not gpus.count:
        return Choice("cpu")
    wanted = gpus.torch if asked == "auto" else asked
    if gpus.count == 0:
        raise RuntimeError(
            f"{_build(gpus)}, and this process can use no GPU ({gpus.reason}): ask the scheduler for one "
            "(srun --gpus-per-task=1), or compute on the CPU with engine.device=cpu"
        )
    if wanted != gpus.torch:
        raise RuntimeError(
            f"torch is built for {VENDORS[gpus.torch]}: install one for {VENDORS[wanted]}, or give "
            f"engine.device={gpus.torch}"
        )
    return Choice(_backend(ops, gpus), f"{TORCH_NAMES[wanted]}:{rank % gpus.count}")


def _build(gpus: Gpus) -> str:
    return f"this build is for {VENDORS[gpus.compiled]}" if gpus.compiled else "that means a GPU"


def _backend(ops: str, gpus: Gpus) -> str:
    """native or triton, for a usable GPU."""
    native = gpus.compiled == gpus.torch
    rebuild = f"rebuild with: BATCHINFER_DEVICE={gpus.torch} pip install ."
    if ops == "native" and not native:
        compiled = gpus.compiled or "cpu"
        raise RuntimeError(f"batchinfer is not compiled for {gpus.torch}; it is compiled for: {compiled}. {rebuild}")
    if ops == "triton" and not gpus.triton:
        raise RuntimeError("engine.ops=triton, and Triton is not installed: pip install triton")
    if ops != "auto" or native:
        return "native" if ops == "auto" else ops
    if gpus.triton:
        return "triton"
    raise RuntimeError(
        f"there is a GPU, and no kernels for it: batchinfer is not compiled for {gpus.torch}, and Triton is not "
        f"installed. Either {rebuild}; or pip install triton; or compute on the CPU with engine.device=cpu"
    )


def find_gpus() -> Gpus:
    """The GPUs that torch can use, and the extension, if it has kernels for them."""
    import torch

    compiled, devices = "", None
    if importlib.util.find_spec("batchinfer._gpu") is not None:
        from batchinfer import _gpu

        compiled, devices = _gpu.compiled_for, _gpu.device_count()
    triton = importlib.util.find_spec("triton") is not None
    if torch.version.hip is not None:
        vendor, count = "rocm", torch.cuda.device_count()
    elif torch.version.cuda is not None:
        vendor, count = "cuda", torch.cuda.device_count()
    elif hasattr(torch, "xpu") and torch.xpu.is_available():
        vendor, count = "xpu", torch.xpu.device_count()
    else:
        reason = f"torch {torch.__version__} is built for the CPU, or finds no driver: install one for your GPU"
        return Gpus(compiled, "", triton, 0, reason)
    if compiled == vendor and devices is not None:
        count = min(count, devices)
    return Gpus(compiled, vendor, triton, count, "" if count else "no device or no driver, or a variable hides it")


def torch_build() -> dict[str, object]:
    """The installed torch: version, the device that it is built for (cuda, rocm, xpu or cpu), the toolkit's version,
    the architectures by torch's names, and how many GPUs it can use. Raises ImportError or OSError if it can't load."""
    import torch

    kinds = {"cuda": torch.version.cuda, "rocm": torch.version.hip, "xpu": getattr(torch.version, "xpu", None)}
    device = next((name for name, toolkit in kinds.items() if toolkit), "cpu")
    return {
        "version": torch.__version__,
        "device": device,
        "toolkit": kinds.get(device) or "",
        "architectures": tuple(torch.cuda.get_arch_list()) if device in ("cuda", "rocm") else (),
        "usable": torch.xpu.device_count() if device == "xpu" else torch.cuda.device_count(),
    }
