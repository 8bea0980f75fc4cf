"""Checks of tensors before the compiled backend gets their addresses. All raise ValueError that names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer.ops.quantized import FLOAT8, kv_row

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Of weights, caches and what linear reads, with their number in csrc/include/batchinfer/ops.h."""


CACHE_DTYPES = {**DTYPES, torch.int8: 2, FLOAT8: 3}
"""Of KV caches."""


def address(t: Tensor | None) -> int:
    """0 for None."""
    return 0 if t is None else t.data_ptr()


def shape_of(name: str, t: Tensor, dims: int) -> torch.Size:
    """The shape, which must have so many dimensions."""
    if t.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: {dims} dimensions are needed")
    return t.shape


def check(name: str, t: Tensor | None, dtype: torch.dtype | None, shape: tuple[int, ...]) -> None:
    """``dtype`` None: one of DTYPES."""
    if t is None:
        raise ValueError(f"{name} is missing")
    if t.dtype is not dtype and (dtype is not None or t.dtype not in DTYPES):
        wanted = dtype if dtype is not None else " or ".join(map(str, DTYPES))
        raise ValueError(f"{name} has dtype {t.dtype}: {wanted} is needed")
    if t.shape != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: {shape} is needed")
    if not (t.is_contiguous() and t.is_cpu):
        raise ValueError(f"{name} must be contiguous and on the CPU")


def check_caches(k: Tensor, v: Tensor, shape: tuple[int, ...]) -> int:
    """The number of their dtype. ``shape`` [P, G, B, E], as if they held no scales."""
    if k.dtype not in CACHE_DTYPES:
        raise ValueError(f"k_cache has dtype {k.dtype}: {' or '.join(map(str, CACHE_DTYPES))} is needed")
    held = (*shape[:3], kv_row(shape[3], k.dtype))
    check("k_cache", k, k.dtype, held)
    check("v_cache", v, k.dtype, held)
    return CACHE_DTYPES[k.dtype]


def check_segments(name: str, ids: Tensor | None, start: Tensor | None, rows: int) -> int:
    """The number of ids. That ``start`` rises and stays inside is checked by the extension."""
    if ids is None:
        raise ValueError(f"{name}_ids is missing")
    check(f"{name}_ids", ids, torch.int32, (ids.numel(),))
    check(f"{name}_start", start, torch.int32, (rows + 1,))
    return ids.numel()
