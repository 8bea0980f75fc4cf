"""Products with matrices of codes in groups (ops/grouped.py), whose weights never lie in memory: w4a16 and w8a16.

Codes of 8 bits lie as they are, [OUTPUTS, DEPTH]. Those of 4 lie in blocks of 2 * HALF along K, HALF bytes each: the
lower halves of the bytes are the first HALF codes of the block and the upper ones the others. So both are tiles as the
matrix units take them, without a shuffle. All codes of a tile belong to one group: the tile multiplies whole numbers,
which 16 bits hold exactly, and the group's scale the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchinfer.ops.triton import float8
from batchinfer.ops.triton.float8 import FLOAT8_SCALE

LARGEST_FLOAT8 = tl.constexpr(448.0)
LEAST_SCALE = tl.constexpr(1e-30)  # its inverse is a number


@triton.jit
def number_of(code, middle, FLOAT8: tl.constexpr):
    """float32: the numbers that codes stand for, before their group's zero and scale."""
    return float8.finite(code) if FLOAT8 else code.to(tl.float32) - middle


@triton.jit
def add_tile(
    total, code, depth, x, row, inside, scales, zeros, middle, column, columns,
    OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, FLOAT8: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """total [ROWS, COLUMNS] + x @ the codes [HALF, COLUMNS] of the columns from ``depth`` on."""
    d = depth + tl.arange(0, HALF)
    there = inside[:, None] & (d < DEPTH)[None, :]
    a = tl.load(x + row.to(tl.int64)[:, None] * DEPTH + d[None, :], there, other=0.0)
    group = tl.minimum(depth // GROUP, (DEPTH - 1) // GROUP)
    place = group * OUTPUTS + column
    part = tl.dot(a, number_of(code, middle, FLOAT8).to(a.dtype), input_precision="ieee")
    if zeros is not None:
        # After the product: what a product reads must not wait for such small loads, which are not pipelined.
        zero = tl.load(zeros + place, columns, other=0).to(tl.float32) - middle
        part -= tl.sum(a.to(tl.float32), axis=1)[:, None] * zero[None, :]
    return total + part * tl.load(scales + place, columns, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["rows"])
def group_products(
    x,  # [rows, DEPTH]
    codes,  # uint8 [OUTPUTS, STRIDE]
    scales,  # [groups, OUTPUTS]
    zeros,  # uint8 [groups, OUTPUTS], or None: ``middle`` for all
    bias,  # float32 [OUTPUTS] or None
    out,  # [SPLITS, rows, OUTPUTS]
    middle,
    rows,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    FLOAT8: tl.constexpr,
    HALF: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums of one of SPLITS parts of K. Grid: (cdiv(rows, ROWS), cdiv(OUTPUTS, COLUMNS), SPLITS)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns = column < OUTPUTS
    part = tl.program_id(2)
    wide = HALF * 8 // BITS
    blocks = tl.cdiv(DEPTH, wide)
    each = tl.cdiv(blocks, SPLITS)
    j = tl.arange(0, HALF)
    place = codes + column.to(tl.int64)[None, :] * STRIDE + j[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for block in range(part * each, tl.minimum(part * each + each, blocks)):
        there = columns[None, :] & (block * HALF + j < STRIDE)[:, None]
        code = tl.load(place + block * HALF, there, other=0)
        if BITS == 4:
            total = add_tile(
                total, code & 15, block * wide, x, row, inside, scales, zeros, middle, column, columns,
                OUTPUTS, DEPTH, GROUP, FLOAT8, HALF,
            )  # fmt: skip
            code = code >> 4
        total = add_tile(
            total, code, block * wide + wide - HALF, x, row, inside, scales, zeros, middle, column, columns,
            OUTPUTS, DEPTH, GROUP, FLOAT8, HALF,
        )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + column, columns, other=0.0)[None, :]
    to = out + (part.to(tl.int64) * rows + row)[:, None] * OUTPUTS + column[None, :]
    tl.store(to, total, inside[:, None] & columns[None, :])


@triton.jit(do_not_specialize=["rows"])
def add_parts(parts, bias, out, rows, OUTPUTS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out [rows, OUTPUTS] = the sum of parts float32 [SPLITS, rows, OUTPUTS], in their order, and bias. Grid: (rows,
    cdiv(OUTPUTS, BLOCK))."""
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < OUTPUTS
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(SPLITS):
        total += tl.load(parts + (part * rows.to(tl.int64) + t) * OUTPUTS + column, inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + column, inside, other=0.0)
    tl.store(out + t * OUTPUTS + column, total, inside)


@triton.jit
def encode_rows(x, codes, scales, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    """codes uint8 [rows, DEPTH] of x in e4m3, and the scale float32 of each row, whose largest number becomes the
    largest code. Grid: (rows,)."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for base in range(0, DEPTH, BLOCK):
        value = tl.load(x + t * DEPTH + base + i, base + i < DEPTH, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
    scale = tl.maximum(tl.max(largest, axis=0), LEAST_SCALE * LARGEST_FLOAT8) / LARGEST_FLOAT8
    tl.store(scales + t, scale)
    for base in range(0, DEPTH, BLOCK):
        inside = base + i < DEPTH
        value = tl.load(x + t * DEPTH + base + i, inside, other=0.0).to(tl.float32)
        # A float16's bits at the other place again, rounded to even; NaN stays one.
        bits = (value / (scale * FLOAT8_SCALE)).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        size = bits & 0x7FFF
        size = tl.minimum((size + 0x3F + ((size >> 7) & 1)) >> 7, 0x7F)
        tl.store(codes + t * DEPTH + base + i, (size | ((bits >> 8) & 0x80)).to(tl.uint8), inside)


@triton.jit(do_not_specialize=["first", "count"])
def group_weights(
    codes,
    scales,
    zeros,
    out,  # [count, DEPTH]
    middle,
    first,
    count,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    FLOAT8: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out = the weights of the ``count`` outputs from ``first`` on. Grid: (cdiv(count, COLUMNS), blocks of K)."""
    i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = i < count
    output = first + i
    block = tl.program_id(1)
    j = tl.arange(0, HALF)
    there = inside[:, None] & (block * HALF + j < STRIDE)[None, :]
    packed = tl.load(codes + output.to(tl.int64)[:, None] * STRIDE + block * HALF + j[None, :], there, other=0)
    for half in tl.static_range(8 // BITS):
        depth = (block * (8 // BITS) + half) * HALF
        code = packed
        if BITS == 4:
            code = (packed >> (4 * half)) & 15
        place = tl.minimum(depth // GROUP, (DEPTH - 1) // GROUP) * OUTPUTS + output
        number = number_of(code, middle, FLOAT8)
        if zeros is not None:
            number -= tl.load(zeros + place, inside, other=0).to(tl.float32)[:, None] - middle
        value = number * tl.load(scales + place, inside, other=0.0).to(tl.float32)[:, None]
        d = depth + j
        to = out + i.to(tl.int64)[:, None] * DEPTH + d[None, :]
        tl.store(to, value, inside[:, None] & (d < DEPTH)[None, :])
