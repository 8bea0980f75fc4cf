"""Log-probability of the chosen token and of the most likely ones, of the unmodified logits: a pass over the row for
the maximum, one for the sum, and one for each alternative."""

from __future__ import annotations

import triton
import triton.language as tl

from batchinfer.ops.triton.sample import first_of, most_likely


@triton.jit
def next_likely(logits, vocab, limit, limit_id, BLOCK: tl.constexpr):
    """(logit, id) of the most likely token that ranks after ``limit_id``, whose logit is ``limit``."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_ids = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(logits + ids, ids < vocab, other=float("-inf"))
        x = tl.where(x != x, float("-inf"), x)
        ranks = (ids < vocab) & ((x < limit) | ((x == limit) & (ids > limit_id)))
        better = ranks & ((x > best) | (best_ids == 0x7FFFFFFF))
        best = tl.where(better, x, best)
        best_ids = tl.where(better, ids, best_ids)
    return first_of(best, best_ids)


@triton.jit(do_not_specialize=["top_width"])
def logprobs(
    logits,  # [rows, vocab]
    tokens,
    num_logprobs,
    chosen,
    top_ids,  # [rows, top_width]
    top,
    vocab,
    top_width,
    BLOCK: tl.constexpr,
):
    """Grid: (rows,). NaN, -1 and -inf stand where a row has nothing to report."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocab
    top_ids += row.to(tl.int64) * top_width
    top += row.to(tl.int64) * top_width
    wanted = tl.load(num_logprobs + row)
    count = tl.minimum(tl.minimum(wanted, top_width), vocab)
    for i in range(tl.maximum(count, 0), top_width):
        tl.store(top_ids + i, -1)
        tl.store(top + i, float("-inf"))
    if wanted < 0:
        tl.store(chosen + row, float("nan"))
    else:
        highest, best_id = most_likely(logits, vocab, BLOCK)
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            x = tl.load(logits + ids, ids < vocab, other=float("-inf"))
            sums += tl.where(x == x, tl.exp(x - highest), 0.0)
        log_sum = tl.log(tl.sum(sums, axis=0))
        its_logit = tl.load(logits + tl.load(tokens + row))
        its_logit = tl.where(its_logit != its_logit, float("-inf"), its_logit)
        tl.store(chosen + row, its_logit - highest - log_sum)
        for i in range(count):
            tl.store(top_ids + i, best_id)
            tl.store(top + i, highest_of(logits, best_id) - highest - log_sum)
            _, best_id = next_likely(logits, vocab, highest_of(logits, best_id), best_id, BLOCK)


@triton.jit
def highest_of(logits, best_id):
    x = tl.load(logits + best_id)
    return tl.where(x != x, float("-inf"), x)
