"""Every GPU op that a decoder's step is made of against the reference in float64, over shapes drawn at random: no rows,
one row, page boundaries, positions beyond 100,000."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gpu.backend import DEVICE, put, sized
from gpu.test_gpu_attention import assert_attention, draw_lengths, make_case
from gpu.test_gpu_ops import DTYPES, TRUTH, assert_close, empty_like, randn
from gpu.test_gpu_sample import assert_same
from ops.sampler_cases import logits_of, plain

from batchinfer.ops import AttentionInput, HeadNorm, Rope

SEEDS = range(sized(20, 8))
LONGEST = 131_072


class Draw:
    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)

    def one(self, *values):
        return values[self.below(len(values))]

    def below(self, n: int) -> int:
        return int(self.random.integers(n))

    def rows(self) -> int:
        return self.one(0, 1, 1 + self.below(sized(3000, 60)))

    def width(self) -> int:
        return self.one(8 * (1 + self.below(sized(1000, 80))), 1 + self.below(sized(3000, 300)))

    def page(self) -> int:
        return 16 << self.below(4)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    if want.numel():
        assert_close(got, want)


@pytest.mark.parametrize("seed", SEEDS)
def test_rows(gpu, seed):
    draw = Draw(seed)
    rows, width, dtype = draw.rows(), draw.width(), draw.one(*DTYPES)
    x, weight = randn(rows, width, dtype=dtype, seed=seed), randn(width, seed=seed + 1)
    residual = draw.one(None, randn(rows, width, dtype=dtype, seed=seed + 2))
    want, out = torch.empty(rows, width, dtype=torch.float64), empty_like(x)
    TRUTH.rms_norm(x, weight, 1e-5, want, None if residual is None else residual.clone())
    gpu.rms_norm(put(x), put(weight), 1e-5, out, None if residual is None else put(residual))
    close(out, want)

    gate_up = 4 * randn(rows, 2 * width, dtype=dtype, seed=seed)
    for op in ("silu_mul", "gelu_mul"):
        getattr(TRUTH, op)(gate_up, want)
        getattr(gpu, op)(put(gate_up), out := empty_like(x))
        close(out, want)

    table = randn(1 + draw.below(500), width, dtype=dtype, seed=seed + 3)
    ids = torch.randint(0, len(table), (rows,), dtype=torch.int32)
    TRUTH.embed(ids, table, want, 0.5)
    gpu.embed(put(ids), put(table), out := empty_like(x), 0.5)
    close(out, want)
    gpu.gather_rows(put(table), put(ids), out)
    assert torch.equal(out.cpu(), table[ids.long()])


@pytest.mark.parametrize("seed", SEEDS)
def test_rope_and_cache(gpu, seed):
    """Places are the first and the last of a page, and any; some tokens have none."""
    draw = Draw(seed)
    tokens, page_size, dtype = min(draw.rows(), 300), draw.page(), draw.one(*DTYPES)
    kv_heads, group, width = 1 + draw.below(4), 1 + draw.below(6), 16 * (1 + draw.below(16))
    rotary, pages = 16 * draw.below(width // 16 + 1), -(-3 * tokens // page_size) + 1
    heads = kv_heads * group
    qkv = randn(tokens, (heads + 2 * kv_heads) * width, dtype=dtype, seed=seed)
    positions = torch.from_numpy(draw.random.integers(draw.one(0, 100_000), LONGEST, tokens).astype(np.int32))
    places = np.unique(np.concatenate([np.arange(pages) * page_size, np.arange(1, pages + 1) * page_size - 1]))
    others = np.setdiff1d(np.arange(pages * page_size), places)
    chosen = np.concatenate([draw.random.permutation(places), draw.random.permutation(others)])[:tokens]
    kv_index = torch.from_numpy(draw.random.permutation(chosen).astype(np.int64))
    rope = Rope(randn(LONGEST, rotary, seed=1)) if rotary else None
    norm = draw.one(None, HeadNorm(randn(width, seed=2), randn(width, seed=3), 1e-6))
    caches = [randn(pages, kv_heads, page_size, width, dtype=dtype, seed=4 + i) for i in range(2)]
    truth = [cache.double() for cache in caches]
    want = torch.empty(tokens, heads, width, dtype=torch.float64)
    TRUTH.rope_and_cache(qkv, positions, kv_index, rope, *truth, want, norm)

    on_device, q_out = [put(cache) for cache in caches], empty_like(want, dtype)
    device_rope = rope and Rope(put(rope.cos_sin))
    device_norm = norm and HeadNorm(put(norm.q), put(norm.k), norm.eps)
    gpu.rope_and_cache(put(qkv), put(positions), put(kv_index), device_rope, *on_device, q_out, device_norm)
    close(q_out, want)
    close(on_device[0], truth[0])
    assert torch.equal(on_device[1].cpu(), truth[1].to(dtype))


@pytest.mark.parametrize("seed", SEEDS)
def test_copy_pages(gpu, seed):
    draw = Draw(seed)
    shape = 1 + draw.below(8), draw.page(), 16 * (1 + draw.below(16))
    pages, dtype = 2 + draw.below(sized(300, 20)), draw.one(*DTYPES, torch.int8)
    caches = [(50 * randn(pages, *shape, seed=seed + i)).to(dtype) for i in range(2)]
    order = torch.from_numpy(draw.random.permutation(pages).astype(np.int32))
    sources = 1 + draw.below(pages - 1)
    target = order[sources : sources + draw.rows()]
    source = order[torch.from_numpy(draw.random.integers(0, sources, len(target)))]
    on_device = [put(cache) for cache in caches]
    gpu.copy_pages(*on_device, put(source), put(target))
    TRUTH.copy_pages(*caches, source, target)
    assert all(torch.equal(got.cpu(), want) for got, want in zip(on_device, caches, strict=True))


@pytest.mark.parametrize("seed", SEEDS)
def test_attention(gpu, seed):
    """Chunks, decodes and empty sequences; every third time one with a context beyond 100,000 (4,000)."""
    draw = Draw(seed)
    dtype, kv_heads, group = draw.one(*DTYPES), 1 + draw.below(4), 1 + draw.below(9)
    width = draw.one(64, 128, 16 * (1 + draw.below(16)))
    lengths = draw_lengths(seed, 1 + draw.below(8), sized(600, 120))
    if seed % 3 == 0:
        kv_heads, group = 1, 1 + group % 4
        lengths.append((1 + draw.below(3), sized(100_000, 4000) + draw.below(200)))
    case = make_case((kv_heads * group, kv_heads, width), dtype, lengths, draw.page(), seed)
    window = draw.one(0, 0, 1 + draw.below(300))
    softcap, scale = draw.one((0.0, width**-0.5), (0.0, width**-0.5), (30.0, 1.0))
    assert_attention(replace(case, window=window, softcap=softcap), gpu, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_nobody(gpu, dtype):
    nothing = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    table = torch.zeros(3, 2, dtype=torch.int32, device=DEVICE)
    cache = torch.zeros(2, 2, 16, 64, dtype=dtype, device=DEVICE)
    out, lse = torch.ones(3, 4, 64, dtype=dtype, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    inputs = AttentionInput(torch.zeros(1, dtype=torch.int32, device=DEVICE), nothing, nothing, table)
    gpu.attention(torch.zeros_like(out[:0]), cache, cache, gpu.plan_attention(inputs, 4, cache), 0.1, out[:0], lse[:0])
    assert (out == 1).all()
    assert (lse == 1).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_sample(gpu, seed):
    draw = Draw(seed)
    rows, vocab = draw.one(0, 1, 1 + draw.below(8)), 1 + draw.below(sized(60_000, 3000))
    filters = {
        "temperature": draw.one(0.0, 0.7, 1.0, 3.0),
        "top_k": draw.one(0, 1 + draw.below(vocab)),
        "top_p": draw.one(1.0, draw.random.random()),
        "min_p": draw.one(0.0, 0.1 * draw.random.random()),
    }
    inputs = plain(rows, seed, **filters)
    if draw.below(2):
        wanted = draw.random.integers(-1, min(vocab, 30), rows).astype(np.int32)
        inputs = replace(inputs, num_logprobs=torch.from_numpy(wanted))
    kinds = ("normal", "peaked", "ties", "flat", *(["holes"] if rows > 1 and vocab > 7 else []))
    assert_same(gpu, logits_of(draw.one(*kinds), rows, vocab, seed), inputs)
