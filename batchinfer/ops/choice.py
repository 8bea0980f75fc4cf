"""Which backend computes, and on which of the node's GPUs. The decision knows neither torch nor a driver."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

REBUILD = "rebuild with BATCHINFER_DEVICE=cuda pip install ."

BOUND_BY_SLURM = ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND")
"""Slurm gave every task of the node GPUs of its own, so that each sees them from number 0 on."""


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


def choose(
    asked: str,
    find: Callable[[], Gpus],
    *,
    rank: int = 0,
    ranks: int = 1,
    environment: Mapping[str, str] | None = None,
) -> Choice:
    """The backend for ``engine.device=asked`` in rank ``rank`` of the ``ranks`` on this node.

    auto is cuda in a build that has it: such a build without a usable GPU is a mistake to report, not a reason to
    compute a hundred times slower. Rank i takes device i, or the first one where Slurm gave each rank its own. Raises
    RuntimeError with the fix.
    """
    if asked not in ("auto", "cuda"):
        return Choice(asked)
    gpus = find()
    if not gpus.built:
        if asked == "auto":
            return Choice("cpu")
        raise RuntimeError(f"this build has no CUDA backend: {REBUILD}, or give engine.device=cpu")
    if gpus.count == 0:
        raise RuntimeError(
            f"this build is for CUDA, and this process can use no GPU ({gpus.reason}): ask the scheduler for one "
            "(srun --gpus-per-task=1), or compute on the CPU with engine.device=cpu"
        )
    if ranks <= gpus.count:
        return Choice("cuda", rank)
    if any((os.environ if environment is None else environment).get(name) for name in BOUND_BY_SLURM):
        return Choice("cuda", 0)
    raise RuntimeError(
        f"{ranks} ranks on this node and {gpus.count} visible GPUs: a rank needs one of its own. Start "
        f"{gpus.count} ranks on the node (srun --ntasks-per-node={gpus.count}), or ask for more GPUs "
        "(--gpus-per-task=1)"
    )


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
