"""Which backend computes, and on which of the node's GPUs. The decision knows neither torch nor a driver."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpus:
    """What this process can compute on. ``built``: the GPU extension is there; ``count``: devices it can use;
    ``reason``: why there is none."""

    built: bool
    count: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Choice:
    """``backend``: cpu, cuda or reference. ``index``: number of the device among those that the process sees."""

    backend: str
    index: int = 0


def choose(asked: str, find: Callable[[], Gpus], rank: int = 0) -> Choice:
    """The backend for ``engine.device=asked`` in rank ``rank`` of its node.

    auto is cuda in a build that has it: such a build without a usable GPU is a mistake to report, not a reason to
    compute a hundred times slower. Rank i takes the i-th visible device, or the only one, where the launcher shows each
    rank its own; cluster/binding.py counts in the same way, and refuses ranks that would share one. Raises RuntimeError
    with the fix.
    """
    if asked not in ("auto", "cuda"):
        return Choice(asked)
    gpus = find()
    if not gpus.built:
        if asked == "auto":
            return Choice("cpu")
        raise RuntimeError(
            "batchinfer is not compiled for cuda; it is compiled for: cpu. Rebuild with: BATCHINFER_DEVICE=cuda pip "
            "install . or give engine.device=cpu"
        )
    if gpus.count == 0:
        raise RuntimeError(
            f"this build is for CUDA, and this process can use no GPU ({gpus.reason}): ask the scheduler for one "
            "(srun --gpus-per-task=1), or compute on the CPU with engine.device=cpu"
        )
    return Choice("cuda", rank % gpus.count)


def find_gpus() -> Gpus:
    """The GPUs that both the extension and torch can use."""
    if importlib.util.find_spec("batchinfer._gpu") is None:
        return Gpus(built=False)
    import torch

    from batchinfer import _gpu

    if torch.version.cuda is None:
        return Gpus(True, 0, f"torch {torch.__version__} is built without CUDA: install one with it")
    count = min(_gpu.device_count(), torch.cuda.device_count())
    return Gpus(True, count, "" if count else "no device or no driver, or CUDA_VISIBLE_DEVICES hides it")


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
