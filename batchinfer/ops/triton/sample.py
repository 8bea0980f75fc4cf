"""One token per row: thresholds of top-k and top-p by a search over the bits of the scaled logits, then the maximum of
scaled logit plus Gumbel noise among what is left.

One program per row. No sort and no atomics: a threshold takes 8 passes over the row, 4 bits a pass, with exact integer
sums, so that the tokens are those of the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchinfer.ops.triton import exact

LAST_KEY = tl.constexpr(0x7F800000)  # of -inf
LARGEST = tl.constexpr(3.4028234663852886e38)
MOST_NOISE = tl.constexpr(23.0)  # that of the smallest random word is 22.9


@triton.jit
def scaled(logits, ids, vocab, highest, inverse):
    """Logits as the filters see them: the most likely token has 0; NaN is -inf."""
    x = tl.load(logits + ids, ids < vocab, other=float("-inf"))
    return tl.where(x != x, float("-inf"), (x - highest) * inverse)


@triton.jit
def key_of(x):
    """Grows as x <= 0 falls."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def first_of(value, ids):
    """(largest value, smallest id that has it)."""
    best = tl.max(value, axis=0)
    return best, tl.min(tl.where(value == best, ids, 0x7FFFFFFF), axis=0)


@triton.jit
def most_likely(logits, vocab, BLOCK: tl.constexpr):
    """(highest logit, its smallest id); (-inf, 0) of a row that has nothing else, NaN included."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_ids = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(logits + ids, ids < vocab, other=float("-inf"))
        better = x > best
        best = tl.where(better, x, best)
        best_ids = tl.where(better, ids, best_ids)
    return first_of(best, best_ids)


@triton.jit
def last_kept(logits, vocab, highest, inverse, target, last, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest key up to which the tokens weigh ``target`` or more, at most ``last``: less lies strictly above it.
    Weight is the number of tokens, or their probability; then ``target`` is a share of that of all up to ``last``."""
    found = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.int64)
    wanted = tl.zeros([], tl.int64)
    digits = tl.arange(0, 16)
    for step in range(8):
        shift = 28 - 4 * step
        weight = tl.zeros([16], tl.int64)
        for start in range(0, vocab, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            x = scaled(logits, ids, vocab, highest, inverse)
            key = key_of(x)
            digit = tl.where((ids < vocab) & (key <= last), (key - found) >> shift, -1)
            one = exact.mass(x) if MASS else tl.full([BLOCK], 1, tl.int64)
            weight += tl.sum(tl.where(digit[:, None] == digits[None, :], one[:, None], 0), axis=0)
        if step == 0:
            if MASS:
                share = target.to(tl.float64) * tl.sum(weight, axis=0).to(tl.float64)
                wanted = tl.ceil(share).to(tl.int64)
            else:
                wanted = target.to(tl.int64)
        below = before + tl.cumsum(weight, axis=0) < wanted
        before += tl.sum(tl.where(below, weight, 0), axis=0)
        found += tl.sum(below.to(tl.int32), axis=0) << shift
    return tl.minimum(found, last)


@triton.jit
def draw(logits, vocab, highest, inverse, last, min_p, seed, position, best_id, COUNTERS: tl.constexpr):
    """The maximum of x + noise among the kept tokens. A Philox block serves four tokens, 16 apart. Blocks of tokens
    that no noise can make the best are passed over."""
    word = tl.arange(0, 4)[None, :]
    score = tl.full([COUNTERS, 4], float("-inf"), tl.float32)
    token = tl.zeros([COUNTERS, 4], tl.int32) + best_id
    for start in range(0, tl.cdiv(vocab, 64) * 16, COUNTERS):
        counter = start + tl.arange(0, COUNTERS)
        ids = (counter // 16 * 64 + counter % 16)[:, None] + 16 * word
        x = scaled(logits, ids, vocab, highest, inverse)
        kept = (key_of(x) <= last) & (x > float("-inf")) & (x + MOST_NOISE > score)
        if tl.max(tl.max(kept.to(tl.int32), axis=1), axis=0) > 0:
            a, b, c, d = tl.philox(seed, counter, position, 0, 0)
            words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [COUNTERS, 4])
            noisy = x + exact.gumbel(words)
            better = kept & (exact.exp(x) >= min_p) & (noisy > score)
            score = tl.where(better, noisy, score)
            token = tl.where(better, ids, token)
    best = tl.max(tl.max(score, axis=1), axis=0)
    return tl.min(tl.min(tl.where(score == best, token, 0x7FFFFFFF), axis=1), axis=0)


@triton.jit
def choose(
    logits,  # [rows, vocab]
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    tokens,
    vocab,
    BLOCK: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    """Grid: (rows,)."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocab
    heat = tl.load(temperature + row)
    highest, token = most_likely(logits, vocab, BLOCK)
    if (heat != 0) & (tl.abs(highest) < float("inf")):
        inverse = tl.minimum(tl.div_rn(1.0, heat), LARGEST)
        last = tl.zeros([], tl.int32) + LAST_KEY
        count = tl.load(top_k + row)
        if (count > 0) & (count < vocab):
            last = last_kept(logits, vocab, highest, inverse, count, last, False, BLOCK)
        share = tl.load(top_p + row)
        if share < 1:
            last = last_kept(logits, vocab, highest, inverse, share, last, True, BLOCK)
        seed_of_row, position_of_row = tl.load(seed + row), tl.load(position + row)
        least = tl.load(min_p + row)
        token = draw(logits, vocab, highest, inverse, last, least, seed_of_row, position_of_row, token, COUNTERS)
    tl.store(tokens + row, token)
