"""RMSNorm: one program per row, the row in registers. A row of 32,768 elements is 32 registers in each of 1,024
threads, so that nothing is read twice."""

from __future__ import annotations

import triton
import triton.language as tl

WIDEST = 32768


@triton.jit
def rms_norm(x, weight, residual, out, width, eps, BLOCK: tl.constexpr):
    """out [rows, width] = x / rms(x) * weight. With ``residual``: residual += x, and the sum, rounded to its dtype, is
    what is normalised. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    value = tl.load(x + place, inside, other=0.0).to(tl.float32)
    if residual is not None:
        summed = (tl.load(residual + place, inside, other=0.0).to(tl.float32) + value).to(residual.dtype.element_ty)
        tl.store(residual + place, summed, inside)
        value = summed.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    tl.store(out + place, value * scale * tl.load(weight + column, inside), inside)
