"""Split of qkv, norm of the heads, rotation, cache write: one program per token and block of heads."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rope_and_cache(
    qkv,  # [tokens, HEADS + 2 * KV_HEADS, WIDTH]
    positions,
    kv_index,
    cos_sin,  # [table_positions, ROTARY] or None
    q_norm,  # [WIDTH] or None
    k_norm,
    k_cache,  # [pages, KV_HEADS, PAGE, WIDTH]
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
    is_value = head >= HEADS + KV_HEADS
    heads = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * WIDTH
    x = tl.load(heads + e, inside, other=0.0).to(tl.float32)

    half: tl.constexpr = ROTARY // 2
    partner = tl.where(e < half, e + half, e - half)
    turns = inside & (e < ROTARY) & ~is_value
    other = tl.load(heads + partner, turns, other=0.0).to(tl.float32)

    if q_norm is not None:
        scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / WIDTH + eps)
        x *= tl.where(is_value, 1.0, scale * head_weight(q_norm, k_norm, e, is_query, inside))
        other *= scale * head_weight(q_norm, k_norm, partner, is_query, turns)

    if cos_sin is not None:
        position = tl.minimum(tl.maximum(tl.load(positions + token), 0), table_positions - 1)
        angle = cos_sin + position.to(tl.int64) * ROTARY + tl.where(e < half, e, e - half)
        cos = tl.load(angle, turns, other=1.0)
        sin = tl.load(angle + half, turns, other=0.0)
        x = x * cos + tl.where(e < half, -other, other) * sin

    tl.store(q_out + (token * HEADS + head) * WIDTH + e, x, inside & is_query)
    index = tl.load(kv_index + token)
    written = inside & (index >= 0) & (index < cache_tokens)
    page, offset = index // PAGE, index % PAGE
    k_head, v_head = head - HEADS, head - HEADS - KV_HEADS
    k_place = ((page * KV_HEADS + k_head) * PAGE + offset) * WIDTH + e
    v_place = ((page * KV_HEADS + v_head) * PAGE + offset) * WIDTH + e
    tl.store(k_cache + k_place, x, written & ~is_query & ~is_value)
    tl.store(v_cache + v_place, x, written & is_value)


@triton.jit
def head_weight(q_norm, k_norm, e, is_query, wanted):
    q = tl.load(q_norm + e, wanted & is_query, other=0.0)
    return tl.where(is_query, q, tl.load(k_norm + e, wanted & ~is_query, other=0.0))
