"""Paged attention for steps that mix prompts and decodes: plan once, attend and merge in every layer.

A row is one query head of one token; the heads of a kv head stand together, token by token, so that they share its
keys. An item is (tile of a sequence's rows, part of its keys, kv head). Sequences with one token in the step have small
tiles and fixed parts of SPLIT keys, whose results are merged in order; others have large tiles and one part, which ends
at their last row's own position. Running sums of the items over the sequences lie in device memory, and a fixed grid
strides through them: no launch depends on the data, and a sequence's sums do not depend on its neighbours.

The recurrence over blocks of keys is that of FlashAttention (Dao 2023, arXiv:2307.08691), in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchinfer.ops.triton import float8

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LAST_INT = tl.constexpr(2**31 - 1)
CHUNK = tl.constexpr(1024)  # sequences looked at together


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def sequence_of(q_start, kv_len, s, inside, step_tokens, capacity):
    """(first token, tokens, keys) of sequence s, every number within its bounds; no tokens where not ``inside``. Keys
    up to the first query's own are always there: a shorter kv_len would leave rows without any key."""
    first = clamp(tl.load(q_start + s, inside, other=0), 0, step_tokens)
    tokens = clamp(tl.load(q_start + s + 1, inside, other=0), first, step_tokens) - first
    return first, tokens, clamp(tl.load(kv_len + s, inside, other=0), tokens, capacity)


@triton.jit
def parts_of(keys, window, SPLIT: tl.constexpr):
    """(number of the first part, number of parts) of a decoding sequence."""
    first = tl.maximum(keys - window, 0) // SPLIT
    return first, tl.cdiv(keys, SPLIT) - first


@triton.jit(do_not_specialize=["sequences"])
def plan(
    q_start,
    kv_len,
    decode_ends,
    prefill_ends,
    sequences,
    capacity,
    window,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    DECODE_ROWS: tl.constexpr,
    PREFILL_ROWS: tl.constexpr,
):
    """Running sums [sequences] of the items of a kv head, for both kinds of sequences. Grid: (1,)."""
    decodes = tl.zeros([], tl.int32)
    prefills = tl.zeros([], tl.int32)
    for base in range(0, sequences, CHUNK):
        s = base + tl.arange(0, CHUNK)
        inside = s < sequences
        _, tokens, keys = sequence_of(q_start, kv_len, s, inside, LAST_INT, capacity)
        _, parts = parts_of(keys, window, SPLIT)
        decode = tl.where(tokens == 1, parts * tl.cdiv(GROUP, DECODE_ROWS), 0)
        prefill = tl.where(tokens > 1, tl.cdiv(tokens * GROUP, PREFILL_ROWS), 0)
        tl.store(decode_ends + s, decodes + tl.cumsum(decode, axis=0), inside)
        tl.store(prefill_ends + s, prefills + tl.cumsum(prefill, axis=0), inside)
        decodes += tl.sum(decode, axis=0)
        prefills += tl.sum(prefill, axis=0)


@triton.jit
def find_sequence(ends, sequences, item):
    """(sequence, its first item) of an item: the sequences that end before it are those up to there."""
    s = tl.zeros([], tl.int32)
    begin = tl.zeros([], tl.int32)
    for base in range(0, sequences, CHUNK):
        at = base + tl.arange(0, CHUNK)
        end = tl.load(ends + at, at < sequences, other=LAST_INT)
        s += tl.sum((end <= item).to(tl.int32), axis=0)
        begin = tl.maximum(begin, tl.max(tl.where(end <= item, end, 0), axis=0))
    return s, begin


@triton.jit(do_not_specialize=["sequences", "step_tokens", "pages"])
def attend(
    q,  # [step_tokens, HEADS, WIDTH]
    k_cache,  # [pages, KV_HEADS, PAGE, WIDTH], of q's dtype or codes uint8
    v_cache,
    out,
    lse,  # [step_tokens, HEADS]
    part_out,  # [sequences, HEADS, parts, WIDTH] or None
    part_lse,
    q_start,
    kv_len,
    slot,
    page_table,  # [slots, slot_pages]
    ends,
    sequences,
    step_tokens,
    slots,
    slot_pages,
    pages,
    most_parts,
    scale,
    softcap,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,  # 0: sequences with more than one token
    CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: any; programs stride through the items. Head widths are padded to BLOCK with zeros."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    e = tl.arange(0, BLOCK)
    items = tl.load(ends + sequences - 1) * KV_HEADS
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        kv_head = item % KV_HEADS
        s, begin = find_sequence(ends, sequences, item // KV_HEADS)
        first, tokens, keys = sequence_of(q_start, kv_len, s, True, step_tokens, slot_pages * PAGE)
        tile = item // KV_HEADS - begin
        part = tl.zeros([], tl.int32)
        if SPLIT > 0:
            first_part, parts = parts_of(keys, window, SPLIT)
            part = tile % parts
            tile = tile // parts

        row = tile * ROWS + tl.arange(0, ROWS)
        head = kv_head * GROUP + row % GROUP
        inside = row // GROUP < tokens
        position = keys - tokens + row // GROUP
        place = (first + row // GROUP).to(tl.int64) * HEADS + head
        wanted = inside[:, None] & (e < WIDTH)[None, :]
        query = tl.load(q + place[:, None] * WIDTH + e[None, :], wanted, other=0.0)

        # The keys that some row of the tile sees, from a multiple of KEYS on, so that a row adds in the same order
        # wherever it stands.
        lowest = keys - tokens + tile * ROWS // GROUP
        start = tl.maximum(lowest - window + 1, 0) // KEYS * KEYS
        stop = tl.minimum(keys - tokens + (tile * ROWS + ROWS - 1) // GROUP + 1, keys)
        if SPLIT > 0:
            start = tl.maximum(start, (first_part + part) * SPLIT)
            stop = tl.minimum(stop, (first_part + part + 1) * SPLIT)

        page_row = page_table + clamp(tl.load(slot + s), 0, slots - 1).to(tl.int64) * slot_pages
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        weighted = tl.zeros([ROWS, BLOCK], tl.float32)
        for base in range(start, stop, KEYS):
            key = base + tl.arange(0, KEYS)
            page = clamp(tl.load(page_row + key // PAGE, key < stop, other=0), 0, pages - 1)
            cached = ((page * KV_HEADS + kv_head) * PAGE + key % PAGE).to(tl.int64) * WIDTH
            k_wanted = (e < WIDTH)[:, None] & (key < stop)[None, :]
            k = float8.cached(tl.load(k_cache + cached[None, :] + e[:, None], k_wanted, other=0), query.dtype)
            score = tl.dot(query, k, input_precision="ieee") * scale
            if CAPPED:
                score = softcap * tanh(score / softcap)
            seen = (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - window)
            score = tl.where(seen, score * LOG2E, float("-inf"))
            now = tl.maximum(highest, tl.max(score, axis=1))
            origin = tl.where(now == float("-inf"), 0.0, now)  # of rows that have seen no key yet
            weight = tl.exp2(score - origin[:, None])
            shrink = tl.exp2(highest - origin)
            total = total * shrink + tl.sum(weight, axis=1)
            v_wanted = (key < stop)[:, None] & (e < WIDTH)[None, :]
            v = float8.cached(tl.load(v_cache + cached[:, None] + e[None, :], v_wanted, other=0), query.dtype)
            weighted = tl.dot(weight.to(v.dtype), v, weighted * shrink[:, None], input_precision="ieee")
            highest = now

        some = tl.where(total == 0, 1.0, total)
        result = weighted / some[:, None]
        row_lse = tl.where(total == 0, float("-inf"), (highest + tl.log2(some)) * LN2)
        to, lse_to = out + place[:, None] * WIDTH, lse + place
        if SPLIT > 0:
            if parts > 1:
                part_place = (s.to(tl.int64) * HEADS + head) * most_parts + part
                tl.store(part_out + part_place[:, None] * WIDTH + e[None, :], result, wanted)
                tl.store(part_lse + part_place, row_lse, inside)
            else:
                tl.store(to + e[None, :], result, wanted)
                tl.store(lse_to, row_lse, inside)
        else:
            tl.store(to + e[None, :], result, wanted)
            tl.store(lse_to, row_lse, inside)


@triton.jit
def tanh(x):
    """To 1e-7 of 1, also where the exponential overflows."""
    return 1 - 2 / (1 + tl.exp(2 * x))


@triton.jit(do_not_specialize=["step_tokens"])
def merge(
    part_out,
    part_lse,
    out,
    lse,
    q_start,
    kv_len,
    step_tokens,
    capacity,
    most_parts,
    window,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The parts of decoding sequences that have several, in their order. Grid: (sequences, HEADS)."""
    s = tl.program_id(0)
    head = tl.program_id(1)
    first, tokens, keys = sequence_of(q_start, kv_len, s, True, step_tokens, capacity)
    _, parts = parts_of(keys, window, SPLIT)
    if (tokens == 1) & (parts > 1):
        e = tl.arange(0, BLOCK)
        wanted = e < WIDTH
        place = (s.to(tl.int64) * HEADS + head) * most_parts
        highest = tl.load(part_lse + place)
        total = tl.full([], 1.0, tl.float32)
        weighted = tl.load(part_out + place * WIDTH + e, wanted, other=0.0)
        for part in range(1, parts):
            one = tl.load(part_lse + place + part)
            now = tl.maximum(highest, one)
            shrink = tl.exp(highest - now)
            weight = tl.exp(one - now)
            total = total * shrink + weight
            weighted = weighted * shrink + weight * tl.load(part_out + (place + part) * WIDTH + e, wanted, other=0.0)
            highest = now
        to = first.to(tl.int64) * HEADS + head
        tl.store(out + to * WIDTH + e, weighted / total, wanted)
        tl.store(lse + to, highest + tl.log(total))
