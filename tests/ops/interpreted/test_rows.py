"""The Triton kernels of single rows against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from batchinfer.ops import HeadNorm, Rope
from batchinfer.ops.reference import ReferenceOps

TRUTH = ReferenceOps(torch.float64)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}

dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nan_like(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What an op forgets to write shows."""
    return torch.full(t.shape, torch.nan, dtype=dtype)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Largest error against the size of the values: element errors of sums do not scale with the element."""
    error = (got.double() - want.double()).abs().max().item()
    limit = TOLERANCE[got.dtype] * max(1.0, want.double().abs().max().item())
    assert error <= limit, f"{error} > {limit}"  # false for NaN


@pytest.mark.feature(
    "Triton kernels (interpreted)", "RMSNorm and LayerNorm with residual, gates, embedding, rope and cache write"
)
@dtypes
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (7, 576), (3, 100), (2, 4100)])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "layer_norm without bias"])
def test_norms(ops, dtype, tokens, width, with_residual, op):
    x, weight = randn(tokens, width, dtype=dtype) + 1, randn(width, seed=1)
    residual = randn(tokens, width, dtype=dtype, seed=2) if with_residual else None
    args = {"rms_norm": (weight,), "layer_norm": (weight, randn(width, seed=3))}.get(op, (weight, None))

    def norm(backend, out: torch.Tensor) -> torch.Tensor | None:
        stream = None if residual is None else residual.clone()
        getattr(backend, op.split()[0])(x, *args, 1e-5, out, stream)
        return stream

    want, out = torch.empty(tokens, width, dtype=torch.float64), nan_like(x, dtype)
    summed, got = norm(TRUTH, want), norm(ops, out)
    assert_close(out, want)
    if with_residual:
        assert torch.equal(got, summed)
    norm(ops, x)  # in place
    assert torch.equal(x, out)


@dtypes
@pytest.mark.parametrize("op", ["silu_mul", "gelu_mul"])
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (3, 1536), (4, 50)])
def test_gates(ops, dtype, op, tokens, width):
    gate_up = 4 * randn(tokens, 2 * width, dtype=dtype)
    gate_up[0, :2] = torch.tensor([-1e4, 1e4])
    want = torch.empty(tokens, width, dtype=torch.float64)
    getattr(TRUTH, op)(gate_up, want)
    out = nan_like(want, dtype)
    getattr(ops, op)(gate_up, out)
    assert_close(out, want)


@dtypes
def test_what_torch_computes(ops, dtype):
    x = randn(5, 70, dtype=dtype)
    for kind in ("relu", "gelu", "gelu_tanh"):
        want, out = torch.empty(5, 70, dtype=torch.float64), nan_like(x, dtype)
        TRUTH.activate(kind, x, want)
        ops.activate(kind, x, out)
        assert_close(out, want)
    stream = randn(5, 70, dtype=dtype, seed=1)
    want = x + stream
    ops.add(x, stream)
    assert torch.equal(stream, want)
    logits = 40 * randn(3, 50)
    want = 30 * torch.tanh(logits.double() / 30)
    ops.softcap(logits, 30.0)
    assert_close(logits, want)


@dtypes
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(ops, dtype, with_bias):
    x, weight = randn(7, 64, dtype=dtype), randn(40, 64, dtype=dtype, seed=1) / 8
    bias = randn(40, dtype=dtype, seed=2).float() if with_bias else None
    want = torch.empty(7, 40, dtype=torch.float64)
    TRUTH.linear(x, weight.double(), want, None if bias is None else bias.double())
    for out_dtype in {dtype, torch.float32}:
        out = nan_like(want, out_dtype)
        ops.linear(x, ops.pack_weight(weight), out, bias)
        assert (out.double() - want).abs().max() <= 2 * TOLERANCE[dtype] * want.abs().max()


@dtypes
@pytest.mark.parametrize("width", [576, 30])
def test_embed_and_gather(ops, dtype, width):
    table, ids = randn(100, width, dtype=dtype), torch.randint(0, 100, (17,), dtype=torch.int32)
    want = torch.empty(17, width, dtype=torch.float64)
    TRUTH.embed(ids, table, want, 1.5)
    out = nan_like(want, dtype)
    ops.embed(ids, table, out, 1.5)
    assert_close(out, want)
    wild = torch.tensor([-5, 0, 2**31 - 1, 99], dtype=torch.int32)
    out = nan_like(want[:4], dtype)
    ops.gather_rows(table, wild, out)
    assert torch.equal(out, table[[0, 0, 99, 99]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("page", [(3, 16, 20), (1, 16, 16), (2, 64, 80)])
def test_copy_pages(ops, dtype, page):
    """Pages outside the cache, on either side of a copy, change nothing."""
    caches = [(100 * randn(9, *page, seed=i)).to(dtype) for i in range(2)]
    want = [cache.clone() for cache in caches]
    TRUTH.copy_pages(*want, *torch.tensor([[8, 0, 0], [3, 7, 1]], dtype=torch.int32))
    wild = torch.tensor([[8, -1, 0, 0, 9, 0, 2, 2**31 - 1], [3, 2, 7, 1, 4, 9, -1, 5]], dtype=torch.int32)
    ops.copy_pages(*caches, *wild)
    assert all(map(torch.equal, caches, want))


@dtypes
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "rotary", "page_size"),
    [(9, 3, 64, 64, 16), (4, 4, 80, 80, 32), (6, 2, 96, 32, 16), (3, 1, 256, 128, 64)],
)
@pytest.mark.parametrize("norm_of", ["nothing", "each head", "all heads"])
@pytest.mark.parametrize("with_rope", [False, True])
def test_rope_and_cache(ops, dtype, heads, kv_heads, width, rotary, page_size, norm_of, with_rope):
    tokens, pages, longest = 9, 4, 500
    qkv = randn(tokens, (heads + 2 * kv_heads) * width, dtype=dtype)
    positions = torch.randint(0, longest, (tokens,), dtype=torch.int32)
    kv_index = torch.randperm(pages * page_size)[:tokens]
    rope = Rope(randn(longest, rotary, seed=1)) if with_rope else None
    times = (1, 1) if norm_of == "each head" else (heads, kv_heads)
    weights = (randn(n * width, seed=2 + n) for n in times)
    norm = None if norm_of == "nothing" else HeadNorm(*weights, 1e-6)
    old = [randn(pages, kv_heads, page_size, width, dtype=dtype, seed=4 + i) for i in range(2)]
    truth, caches = [cache.double() for cache in old], [cache.clone() for cache in old]
    want = torch.empty(tokens, heads, width, dtype=torch.float64)
    TRUTH.rope_and_cache(qkv, positions, kv_index, rope, *truth, want, norm)
    q_out = nan_like(want, dtype)
    ops.rope_and_cache(qkv, positions, kv_index, rope, *caches, q_out, norm)
    assert_close(q_out, want)
    assert_close(caches[0], truth[0])
    assert torch.equal(caches[1], truth[1].to(dtype))

    nowhere = torch.full((tokens,), -1)
    nowhere[1::2] = pages * page_size
    untouched, again = [cache.clone() for cache in old], nan_like(want, dtype)
    ops.rope_and_cache(qkv, positions, nowhere, rope, *untouched, again, norm)
    assert torch.equal(again, q_out)
    assert all(torch.equal(cache, before) for cache, before in zip(untouched, old, strict=True))


def test_rejects_wrong_tensors(ops):
    x, weight = randn(3, 64), randn(64)
    with pytest.raises(ValueError, match="out has shape"):
        ops.rms_norm(x, weight, 1e-5, torch.empty(2, 64))
    with pytest.raises(ValueError, match="weight has dtype"):
        ops.rms_norm(x, weight.half(), 1e-5, torch.empty_like(x))
    with pytest.raises(ValueError, match="must be contiguous and on cpu"):
        ops.rms_norm(randn(64, 3).t(), weight, 1e-5, torch.empty_like(x))
    with pytest.raises(ValueError, match="rows of 32776 elements"):
        ops.rms_norm(wide := randn(1, 32776), randn(32776), 1e-5, torch.empty_like(wide))
