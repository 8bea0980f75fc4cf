"""Kernels over rows that don't need one another's elements: lookup, activations and copies of pages.

Grid of each: (rows, cdiv(width, BLOCK)).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["table_rows"])
def lookup(ids, table, out, scale, table_rows, width, BLOCK: tl.constexpr):
    """out [rows, width] = scale * table[ids]; an id outside the table takes the nearest row."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.minimum(tl.maximum(tl.load(ids + row), 0), table_rows - 1).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(table + source * width + column, inside)
    tl.store(out + row * width + column, x.to(tl.float32) * scale, inside)


@triton.jit
def gate_mul(gate_up, out, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """out [rows, width] = f(gate) * up; gate_up [rows, 2 * width] holds the gates first. f is SiLU, x * sigmoid(x), or
    GELU in its tanh form, which is x * sigmoid(2 * u) with u the argument of tanh."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, inside).to(tl.float32)
    slope = gate
    if GELU:
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    tl.store(out + row * width + column, gate / (1 + tl.exp(-slope)) * up, inside)


@triton.jit(do_not_specialize=["pages"])
def copy_pages(k_cache, v_cache, source, target, pages, width, BLOCK: tl.constexpr):
    """Row target[i] of both caches [pages, width] becomes row source[i]; nothing happens where one is outside."""
    origin = tl.load(source + tl.program_id(0)).to(tl.int64)
    to = tl.load(target + tl.program_id(0)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if (origin >= 0) & (origin < pages) & (to >= 0) & (to < pages):
        tl.store(k_cache + to * width + column, tl.load(k_cache + origin * width + column, inside), inside)
        tl.store(v_cache + to * width + column, tl.load(v_cache + origin * width + column, inside), inside)
