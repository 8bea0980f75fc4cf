"""Penalties and banned tokens, on the logits in place.

How often a token occurs is counted in a row of global memory that is all zero before and after: the threads of a row's
history add to the words of its tokens, then each takes a word back and leaves zero. Who gets something applies the
penalty. The cost is that of the history, not of the vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

IN_PROMPT = tl.constexpr(-(2**31))  # the other bits count occurrences in the output
COUNT = tl.constexpr(2**31 - 1)


@triton.jit
def segment(start, row, size):
    begin = tl.minimum(tl.maximum(tl.load(start + row), 0), size)
    return begin, tl.minimum(tl.maximum(tl.load(start + row + 1), begin), size)


@triton.jit(do_not_specialize=["history_size", "rows"])
def penalise(
    logits,  # [rows, vocab]
    repetition,
    presence,
    frequency,
    history_ids,
    history_start,
    history_prompt,
    counts,  # [programs, vocab], zero
    history_size,
    rows,
    vocab,
    BLOCK: tl.constexpr,
):
    """Grid: any; programs stride through the rows. Without fused products: see ``exact.py``."""
    counts += tl.program_id(0).to(tl.int64) * vocab
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        row_logits = logits + (tl.zeros([], tl.int64) + row) * vocab
        begin, end = segment(history_start, row, history_size)
        output = begin + tl.load(history_prompt + row)
        for base in range(begin, end, BLOCK):
            at = base + tl.arange(0, BLOCK)
            ids = tl.load(history_ids + at, at < end, other=-1)
            known = (ids >= 0) & (ids < vocab)
            tl.atomic_or(counts + ids, IN_PROMPT, known & (at < output), sem="relaxed")
            tl.atomic_add(counts + ids, 1, known & (at >= output), sem="relaxed")
        tl.debug_barrier()
        for base in range(begin, end, BLOCK):
            at = base + tl.arange(0, BLOCK)
            ids = tl.load(history_ids + at, at < end, other=-1)
            known = (ids >= 0) & (ids < vocab)
            taken = tl.where(known, tl.atomic_xchg(counts + ids, 0, known, sem="relaxed"), 0)
            place = row_logits + ids
            x = tl.load(place, taken != 0, other=0.0)
            x = tl.where(x != x, float("-inf"), x)
            factor = tl.load(repetition + row)
            x = tl.where(x > 0, tl.div_rn(x, factor), x * factor)
            times = (taken & COUNT).to(tl.float32)
            less = (x - tl.load(presence + row)) - tl.load(frequency + row) * times
            tl.store(place, tl.where(times > 0, less, x), taken != 0)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["banned_size"])
def ban(logits, banned_ids, banned_start, banned_size, vocab, BLOCK: tl.constexpr):
    """The banned tokens' logits become -inf. Grid: (rows,)."""
    row = tl.program_id(0)
    begin, end = segment(banned_start, row, banned_size)
    for base in range(begin, end, BLOCK):
        at = base + tl.arange(0, BLOCK)
        ids = tl.load(banned_ids + at, at < end, other=-1)
        known = (ids >= 0) & (ids < vocab)
        tl.store(logits + row.to(tl.int64) * vocab + ids, tl.full([BLOCK], float("-inf"), tl.float32), known)
