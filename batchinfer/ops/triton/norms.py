"""RMSNorm and LayerNorm: one program per row, the row in registers. A row of 32,768 elements is 32 registers in each of
1,024 threads, so that nothing is read twice."""

from __future__ import annotations

import triton
import triton.language as tl

WIDEST = 32768


@triton.jit
def row_sum(x, residual, place, inside):
    """The row of x in float32; with ``residual``: residual += x, and the sum, rounded to its dtype."""
    value = tl.load(x + place, inside, other=0.0).to(tl.float32)
    if residual is not None:
        summed = (tl.load(residual + place, inside, other=0.0).to(tl.float32) + value).to(residual.dtype.element_ty)
        tl.store(residual + place, summed, inside)
        value = summed.to(tl.float32)
    return value


@triton.jit
def rms_norm(x, weight, residual, out, width, eps, BLOCK: tl.constexpr):
    """out [rows, width] = x / rms(x) * weight. Grid: (rows,)."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = tl.program_id(0).to(tl.int64) * width + column
    value = row_sum(x, residual, place, inside)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    tl.store(out + place, value * scale * tl.load(weight + column, inside), inside)


@triton.jit
def layer_norm(x, weight, bias, residual, out, width, eps, BLOCK: tl.constexpr):
    """out [rows, width] = (x - mean(x)) / deviation(x) * weight (+ bias). Grid: (rows,)."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = tl.program_id(0).to(tl.int64) * width + column
    value = row_sum(x, residual, place, inside)
    value = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
    y = value * tl.rsqrt(tl.sum(value * value, axis=0) / width + eps) * tl.load(weight + column, inside)
    if bias is not None:
        y += tl.load(bias + column, inside)
    tl.store(out + place, y, inside)
