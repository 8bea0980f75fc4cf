"""Split of qkv, norm of the heads, rotation, cache write: one program per token and block of heads."""

from __future__ import annotations

import triton
import triton.language as tl

from batchinfer.ops.triton import float8


@triton.jit
def rope_and_cache(
    qkv,  # [tokens, HEADS + 2 * KV_HEADS, WIDTH]
    positions,
    kv_index,
    cos_sin,  # [table_positions, ROTARY] or None
    q_norm,  # [WIDTH], [HEADS * WIDTH] if WHOLE, or None
    k_norm,
    k_cache,  # [pages, KV_HEADS, PAGE, WIDTH], of q_out's dtype or codes uint8
    v_cache,
    q_out,  # [tokens, HEADS, WIDTH]
    table_positions,
    cache_tokens,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    WHOLE: tl.constexpr,  # one norm over all heads of a kind
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (tokens, cdiv(HEADS + 2 * KV_HEADS, BLOCK_HEADS)). Query, key and value heads take the same way, with
    factors of 1 and angles of 0 where a head or an element is left as it is."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    e = tl.arange(0, BLOCK)[None, :]
    inside = (head < HEADS + 2 * KV_HEADS) & (e < WIDTH)
    is_query = head < HEADS
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_value = head >= HEADS + KV_HEADS
    turned = (head < HEADS + KV_HEADS) & inside  # also: normalised
    heads = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * WIDTH
    x = tl.load(heads + e, inside, other=0.0).to(tl.float32)

    half: tl.constexpr = ROTARY // 2
    partner = tl.where(e < half, e + half, e - half)
    turns = turned & (e < ROTARY)
    other = tl.load(heads + partner, turns, other=0.0).to(tl.float32)

    if q_norm is not None:
        weight = tl.where(is_query, q_norm, k_norm)
        if WHOLE:
            first = qkv + token * (HEADS + 2 * KV_HEADS) * WIDTH
            q_mean = mean_square(first, HEADS * WIDTH, BLOCK_HEADS * BLOCK)
            k_mean = mean_square(first + HEADS * WIDTH, KV_HEADS * WIDTH, BLOCK_HEADS * BLOCK)
            mean = tl.where(is_query, q_mean, k_mean)
            weight += tl.where(is_query, head, head - HEADS) * WIDTH
        else:
            mean = tl.sum(x * x, axis=1, keep_dims=True) / WIDTH
        scale = tl.where(is_value, 1.0, tl.rsqrt(mean + eps))
        x *= scale * tl.load(weight + e, turned, other=1.0)
        other *= scale * tl.load(weight + partner, turns, other=1.0)

    if cos_sin is not None:
        position = tl.minimum(tl.maximum(tl.load(positions + token), 0), table_positions - 1)
        angle = cos_sin + position.to(tl.int64) * ROTARY + tl.where(e < half, e, e - half)
        cos = tl.load(angle, turns, other=1.0)
        sin = tl.load(angle + half, turns, other=0.0)
        x = x * cos + tl.where(e < half, -other, other) * sin

    tl.store(q_out + (token * HEADS + head) * WIDTH + e, x, inside & is_query)
    index = tl.load(kv_index + token)
    if (index >= 0) & (index < cache_tokens):
        page, offset = index // PAGE, index % PAGE
        k_place = ((page * KV_HEADS + head - HEADS) * PAGE + offset) * WIDTH + e
        v_place = ((page * KV_HEADS + head - HEADS - KV_HEADS) * PAGE + offset) * WIDTH + e
        kept = float8.for_cache(x, k_cache.dtype.element_ty)
        tl.store(k_cache + k_place, kept, inside & is_key)
        tl.store(v_cache + v_place, kept, inside & is_value)


@triton.jit
def mean_square(x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, at < WIDTH, other=0.0).to(tl.float32)
        total += value * value
    return tl.sum(total, axis=0) / WIDTH
