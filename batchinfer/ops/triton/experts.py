"""Mixture of experts: route the tokens, put those of an expert together, multiply group by group, and add up.

An assignment is (token, one of its experts), numbered token * TOP_K + k with the experts of a token in ascending order.
``order`` lists them expert by expert, and ``starts`` says where an expert's begin. A program of the products takes a
tile of one expert's assignments, so that no launch depends on the data; no weight of an expert without tokens is read.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAST = tl.constexpr(-3.0e38)  # in place of a logit that is no number
SMALLEST_SUM = tl.constexpr(1e-20)  # of weights that are divided by it
ALIGNMENT = tl.constexpr(16)  # bytes, of the weights


@triton.jit
def route(
    router,
    correction,  # [CHOICES] or None
    chosen,
    weights,
    logits,
    scale,
    CHOICES: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SIGMOID: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """chosen int32, weights float32 [tokens, TOP_K] from the first CHOICES of a token's ``logits`` logits. Grid:
    (tokens,)."""
    t = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    inside = j < CHOICES
    logit = tl.load(router + t * logits + j, inside, other=float("-inf"))
    logit = tl.where(inside & ((logit != logit) | (logit < LEAST)), LEAST, logit)
    if SIGMOID:
        share = 1 / (1 + tl.exp(-logit))
        key = share
        if correction is not None:
            key += tl.load(correction + j, inside, other=0.0)
        key = tl.where(inside, key, float("-inf"))
    else:
        share = tl.exp(logit - tl.max(logit, axis=0))
        share = share / tl.sum(share, axis=0)
        key = logit
    if KEPT < GROUPS:
        key = in_best_groups(key, j, CHOICES // GROUPS, SIGMOID, GROUPS, KEPT, BLOCK)
    picked = j < 0
    for _ in range(TOP_K):
        best = j == tl.argmax(key, axis=0, tie_break_left=True)
        picked |= best
        key = tl.where(best, float("-inf"), key)
    if RENORMALISE:
        share = share / tl.maximum(tl.sum(tl.where(picked, share, 0.0), axis=0), SMALLEST_SUM)
    place = t * TOP_K + tl.cumsum(picked.to(tl.int32), axis=0) - 1
    tl.store(chosen + place, j, picked)
    tl.store(weights + place, share * scale, picked)


@triton.jit
def in_best_groups(
    key, j, size, PAIRS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """key, but -inf outside of the KEPT best groups of ``size``: by their best key, or the sum of the PAIRS' two."""
    score = tl.full([BLOCK], float("-inf"), tl.float32)  # that of group g at place g
    for g in range(GROUPS):
        mine = tl.where(j // size == g, key, float("-inf"))
        best = tl.max(mine, axis=0)
        if PAIRS:
            best += tl.max(tl.where(j == tl.argmax(mine, axis=0, tie_break_left=True), float("-inf"), mine), axis=0)
        score = tl.where(j == g, best, score)
    kept = j < 0
    for _ in range(KEPT):
        best_group = tl.argmax(score, axis=0, tie_break_left=True)
        kept |= j // size == best_group
        score = tl.where(j == best_group, float("-inf"), score)
    return tl.where(kept, key, float("-inf"))


@triton.jit(do_not_specialize=["count"])
def arrange(chosen, order, starts, count, BLOCK: tl.constexpr):
    """order int32 [count], starts int32 [experts + 1] from chosen. Grid: (experts,)."""
    expert = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    place = tl.zeros([], tl.int32)
    for base in range(0, count, BLOCK):
        there = base + i < count
        place += tl.sum((there & (tl.load(chosen + base + i, there, other=0) < expert)).to(tl.int32), axis=0)
    tl.store(starts + expert, place)
    for base in range(0, count, BLOCK):
        there = base + i < count
        mine = there & (tl.load(chosen + base + i, there, other=-1) == expert)
        rank = tl.cumsum(mine.to(tl.int32), axis=0)
        tl.store(order + place + rank - 1, base + i, mine)
        place += tl.sum(mine.to(tl.int32), axis=0)
    if expert == tl.num_programs(0) - 1:
        tl.store(starts + tl.num_programs(0), place)


@triton.jit
def tile_of(starts, tile, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """(expert of the tile or EXPERTS if there is no such tile, its first assignment in ``order``, assignments left)."""
    j = tl.arange(0, BLOCK)
    inside = j < EXPERTS
    first = tl.load(starts + j, inside, other=0)
    count = tl.load(starts + j + 1, inside, other=0) - first
    tiles = tl.cdiv(count, ROWS)
    ends = tl.cumsum(tiles, axis=0)
    expert = tl.sum((inside & (ends <= tile)).to(tl.int32), axis=0)
    here = j == expert
    inner = tile - tl.sum(tl.where(here, ends - tiles, 0), axis=0)
    skipped = inner * ROWS
    return (
        expert,
        tl.sum(tl.where(here, first, 0), axis=0) + skipped,
        tl.sum(tl.where(here, count, 0), axis=0) - skipped,
    )


@triton.jit
def weight_of(table, expert, like):
    """Address of the expert's weight, of the dtype of ``like``. Without the hint every element is loaded by itself."""
    return tl.multiple_of(tl.load(table + expert).to(tl.pointer_type(like.dtype.element_ty)), ALIGNMENT)


@triton.jit
def gated_products(
    x,  # [tokens, WIDTH]
    table,  # int64 [experts]: addresses of the weights [2 * INNER, WIDTH], gates first
    bias,  # [experts, 2 * INNER] or None
    out,  # [assignments in the order of ``order``, INNER]
    order,
    starts,
    alpha,
    limit,
    CLAMPED: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out = SiLU(gate) * up, or ``batchinfer.ops.Clamp``. Grid: (most tiles, cdiv(INNER, COLUMNS))."""
    expert, first, count = tile_of(starts, tl.program_id(0), EXPERTS, EXPERT_BLOCK, ROWS)
    if expert < EXPERTS:
        i = tl.arange(0, ROWS)
        rows = i < count
        token = tl.load(order + first + i, rows, other=0) // TOP_K
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        columns = column < INNER
        weight = weight_of(table, expert, x)
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for base in range(0, WIDTH, DEPTH):
            d = base + tl.arange(0, DEPTH)
            deep = d < WIDTH
            a = tl.load(x + token.to(tl.int64)[:, None] * WIDTH + d[None, :], rows[:, None] & deep[None, :], other=0.0)
            there = deep[:, None] & columns[None, :]
            at = weight + column[None, :] * WIDTH + d[:, None]
            gate = tl.dot(a, tl.load(at, there, other=0.0), gate, input_precision="ieee")
            up = tl.dot(a, tl.load(at + INNER * WIDTH, there, other=0.0), up, input_precision="ieee")
        if bias is not None:
            mine = bias + expert * (2 * INNER) + column
            gate += tl.load(mine, columns, other=0.0)[None, :]
            up += tl.load(mine + INNER, columns, other=0.0)[None, :]
        if CLAMPED:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit) + 1
            gate = gate / (1 + tl.exp(-alpha * gate))
        else:
            gate = gate / (1 + tl.exp(-gate))
        to = out + (first + i).to(tl.int64)[:, None] * INNER + column[None, :]
        tl.store(to, gate * up, rows[:, None] & columns[None, :])


@triton.jit
def down_products(
    x,  # [assignments in the order of ``order``, INNER]
    table,  # int64 [experts]: addresses of the weights [WIDTH, INNER]
    bias,  # [experts, WIDTH] or None
    out,  # [assignments, WIDTH]
    order,
    starts,
    EXPERTS: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Grid: (most tiles, cdiv(WIDTH, COLUMNS))."""
    expert, first, count = tile_of(starts, tl.program_id(0), EXPERTS, EXPERT_BLOCK, ROWS)
    if expert < EXPERTS:
        i = tl.arange(0, ROWS)
        rows = i < count
        assignment = tl.load(order + first + i, rows, other=0)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        columns = column < WIDTH
        weight = weight_of(table, expert, x)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for base in range(0, INNER, DEPTH):
            d = base + tl.arange(0, DEPTH)
            deep = d < INNER
            a = tl.load(
                x + (first + i).to(tl.int64)[:, None] * INNER + d[None, :], rows[:, None] & deep[None, :], other=0.0
            )
            at = weight + column[None, :] * INNER + d[:, None]
            total = tl.dot(a, tl.load(at, deep[:, None] & columns[None, :], other=0.0), total, input_precision="ieee")
        if bias is not None:
            total += tl.load(bias + expert * WIDTH + column, columns, other=0.0)[None, :]
        to = out + assignment.to(tl.int64)[:, None] * WIDTH + column[None, :]
        tl.store(to, total, rows[:, None] & columns[None, :])


@triton.jit
def add_up(
    parts,  # [tokens, TOP_K, width]
    weights,  # [tokens, TOP_K]
    shared,  # [tokens, width] or None, SHARED_GATE: weighted by the sigmoid of the last of ``logits`` logits
    router,
    out,
    logits,
    width,
    TOP_K: tl.constexpr,
    SHARED_GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (tokens, cdiv(width, BLOCK))."""
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(TOP_K):
        part = tl.load(parts + (t * TOP_K + k) * width + column, inside, other=0.0).to(tl.float32)
        total += tl.load(weights + t * TOP_K + k) * part
    if shared is not None:
        one = tl.load(shared + t * width + column, inside, other=0.0).to(tl.float32)
        if SHARED_GATE:
            one = one / (1 + tl.exp(-tl.load(router + t * logits + logits - 1)))
        total += one
    tl.store(out + t * width + column, total, inside)
