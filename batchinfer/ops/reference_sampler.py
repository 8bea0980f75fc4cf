"""The sampler's specification, row by row in numpy, arithmetic included.

A compiled sampler must choose the very same tokens from the same logits, on every instruction set. So the noise and
the filters are defined down to the rounding: float32, every product and sum rounded by itself (no fused
multiply-add), and sums of probabilities over multiples of 2**-34 in float64, which are exact in any order for
vocabularies up to 2**19.
"""

from __future__ import annotations

import numpy as np
import torch

from batchinfer.ops import SampleInput, SampleOutput

F = np.float32


def sample(logits: torch.Tensor, inputs: SampleInput) -> SampleOutput:
    """See ``batchinfer.ops.Ops.sample``. Does not change ``logits``.

    NaN among the logits counts as -inf. Rows without logprobs get ``chosen`` NaN; unused places of ``top_ids`` are -1
    and of ``top`` -inf.
    """
    rows, vocab = logits.shape
    raw = np.where(np.isnan(logits.numpy()), F(-np.inf), logits.numpy())
    tokens = np.empty(rows, np.int32)
    for i in range(rows):
        x = raw[i].copy()
        if inputs.bias_ids is not None:
            ids = _check_ids("bias_ids", _segment(inputs.bias_ids, inputs.bias_start, i), vocab)
            x[ids] += _segment(inputs.bias_values, inputs.bias_start, i)
        if inputs.penalties is not None:
            _penalise(x, i, inputs)
        if inputs.banned_ids is not None:
            x[_check_ids("banned_ids", _segment(inputs.banned_ids, inputs.banned_start, i), vocab)] = -np.inf
        if inputs.allowed is not None:
            bits = np.unpackbits(inputs.allowed[i].numpy().view(np.uint8), count=vocab, bitorder="little")
            x[bits == 0] = -np.inf
        tokens[i] = _choose(x, i, inputs)
    if inputs.num_logprobs is None:
        return SampleOutput(torch.from_numpy(tokens))
    return SampleOutput(torch.from_numpy(tokens), *_logprobs(raw, tokens, inputs.num_logprobs.numpy()))


def _segment(values: torch.Tensor, start: torch.Tensor, i: int) -> np.ndarray:
    return values[int(start[i]) : int(start[i + 1])].numpy()


def _check_ids(name: str, ids: np.ndarray, vocab: int) -> np.ndarray:
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab:
        raise ValueError(f"{name} holds a token that is not in [0, {vocab})")
    return ids


def _penalise(x: np.ndarray, i: int, inputs: SampleInput) -> None:
    """Repetition penalty over prompt and output, then presence and frequency penalty over the output, in place."""
    repetition, presence, frequency = (t[i].numpy() for t in inputs.penalties)
    history = _check_ids("history_ids", _segment(inputs.history_ids, inputs.history_start, i), len(x))
    seen = np.unique(history)
    x[seen] = np.where(x[seen] > 0, x[seen] / repetition, x[seen] * repetition)
    generated, count = np.unique(history[int(inputs.history_prompt[i]) :], return_counts=True)
    x[generated] -= presence
    x[generated] -= frequency * count.astype(F)


@np.errstate(over="ignore")  # a tiny temperature makes all tokens but the first -inf
def _choose(logits: np.ndarray, i: int, inputs: SampleInput) -> int:
    highest = logits.max()
    if inputs.temperature[i] == 0 or not np.isfinite(highest):
        return int(logits.argmax())
    inverse = min(F(1) / inputs.temperature[i].numpy(), np.finfo(F).max)
    x = (logits - highest) * inverse  # the most likely token has 0
    keep = np.ones(len(x), bool)
    top_k, top_p, min_p = int(inputs.top_k[i]), float(inputs.top_p[i]), inputs.min_p[i].numpy()
    if 0 < top_k < len(x):
        keep &= x >= np.partition(x, -top_k)[-top_k]
    if top_p < 1:
        keep &= _mass_above(np.where(keep, x, F(-np.inf)), top_p)
    if min_p > 0:
        keep &= exp(x) >= min_p
    scores = x + gumbel(int(inputs.seed[i]), int(inputs.position[i]), np.arange(len(x)))
    return int(np.where(keep, scores, F(-np.inf)).argmax())


def _mass_above(x: np.ndarray, top_p: float) -> np.ndarray:
    """Which tokens have less than the share ``top_p`` of the probability strictly above them; always the first."""
    mass = mass_of(x)
    order = np.argsort(-x, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(mass[order])])  # exact, see the top of the file
    first_tie = np.searchsorted(-x[order], -x, side="left")
    return (before[first_tie] < top_p * before[-1]) | (first_tie == 0)


@np.errstate(invalid="ignore")  # a row of nothing but -inf has NaN everywhere
def _logprobs(raw: np.ndarray, tokens: np.ndarray, wanted: np.ndarray) -> tuple[torch.Tensor, ...]:
    rows, vocab = raw.shape
    wide = max(0, int(wanted.max(initial=0)))
    chosen = np.full(rows, np.nan, F)
    top_ids = np.full((rows, wide), -1, np.int32)
    top = np.full((rows, wide), -np.inf, F)
    for i in np.flatnonzero(wanted >= 0):
        x = raw[i].astype(np.float64)
        highest = x.max()
        logprob = x - (highest + np.log(np.exp(x - highest).sum()))
        chosen[i] = logprob[tokens[i]]
        n = min(int(wanted[i]), vocab)
        top_ids[i, :n] = np.argsort(-x, kind="stable")[:n]
        top[i, :n] = logprob[top_ids[i, :n]]
    return torch.from_numpy(chosen), torch.from_numpy(top_ids), torch.from_numpy(top)


def gumbel(seed: int, position: int, ids: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise -log(-log(u)), float32, one value per token id (non-negative int64 array).

    The random word of token t is word t // 16 % 4 of the Philox block counted by (t // 64 * 16 + t % 16, position, 0,
    0): every word is used once, and 16 neighbouring tokens take the same word of 16 neighbouring blocks, which
    suits vectors of 4, 8 and 16 lanes. With v = 1 - u the exponential is -log1p(-v), as accurate for the small
    values that win as for others.
    """
    counter = np.zeros((len(ids), 4), np.uint32)
    counter[:, 0] = ids // 64 * 16 + ids % 16
    counter[:, 1] = position
    word = philox4x32(counter, seed % 2**64)[np.arange(len(ids)), ids // 16 % 4]
    v = np.minimum((word.astype(F) + F(0.5)) * F(2.0**-32), F(1 - 2.0**-24))
    rest = F(1) - v
    lost = (F(1) - rest) - v  # what rounding took from 1 - v
    exponential = F(0) - (log(rest) + lost / rest)
    return F(0) - log(exponential)


def philox4x32(counter: np.ndarray, key: int, rounds: int = 10) -> np.ndarray:
    """Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): uint32 [n, 4] -> uint32 [n, 4].

    ``key`` holds two 32-bit words, the lower one first.
    """
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key % 2**32, key >> 32
    half, low = np.uint64(32), np.uint64(2**32 - 1)
    for _ in range(rounds):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = b >> half ^ c1 ^ np.uint64(k0), a >> half ^ c3 ^ np.uint64(k1)
        c1, c3 = b & low, a & low
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def mass_of(x: np.ndarray) -> np.ndarray:
    """exp(x) for x <= 0, rounded to a multiple of 2**-34, as float64."""
    grid = F(2.0**-11)  # the floats from here on are multiples of 2**-34
    return ((exp(x) + grid) - grid).astype(np.float64)


def exp(x: np.ndarray) -> np.ndarray:
    """e**x for x <= 0 in float32, within 2 ulp, 0 below -87; csrc/cpu/vec.h explains the method."""
    inside = np.maximum(x, F(-88))
    n = (inside * F(1.44269504) + F(12582912)) - F(12582912)
    r = n * F(2.12194440e-4) + (n * F(-0.693359375) + inside)
    p = F(0.00138144672)
    for c in (0.00836878084, 0.0416683927, 0.166665196, 0.49999994):
        p = p * r + F(c)
    y = (p * (r * r) + r) + F(1)
    return np.where(x < F(-87), F(0), np.ldexp(y, n.astype(np.int32)))


def log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of positive normal float32, within 2 ulp; csrc/cpu/vec.h explains the method."""
    bits = x.view(np.int32)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).view(F) - F(1)
    s = f / (F(2) + f)
    z = s * s
    p = (F(0.298851877) * z + F(0.399770796)) * z + F(0.666667819)
    n = k.astype(F)
    return n * F(0.693359375) + ((s + s) + (s * (z * p) + n * F(-2.12194440e-4)))
