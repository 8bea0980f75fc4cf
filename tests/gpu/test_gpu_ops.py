"""Every GPU op but the sampler against the reference in float64, over shapes drawn at random."""

from __future__ import annotations

import pytest
import torch
from gpu.backend import DEVICE, SYCL, put, sized, warpgroup_kernels
from ops.expert_cases import ROUTINGS, options_of

from batchinfer.ops import Experts, HeadNorm, Rope
from batchinfer.ops.reference import ReferenceOps

TRUTH = ReferenceOps(torch.float64)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def empty_like(t: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Output on the device, full of NaN: what an op forgets to write shows."""
    return torch.full(t.shape, torch.nan, dtype=dtype or t.dtype, device=DEVICE)


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float | None = None) -> None:
    """Largest error against the size of the values: element errors of sums do not scale with the element."""
    error = (got.cpu().double() - want.double()).abs().max().item()
    limit = (tolerance or TOLERANCE[got.dtype]) * max(1.0, want.double().abs().max().item())
    assert error <= limit, f"{error} > {limit}"  # false for NaN


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (7, 576), (33, 4096), (5, 8192), (9, 100), (3, 32768)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(gpu, dtype, tokens, width, with_residual):
    x, weight = randn(tokens, width, dtype=dtype), randn(width, seed=1)
    residual = randn(tokens, width, dtype=dtype, seed=2) if with_residual else None
    want = torch.empty(tokens, width, dtype=torch.float64)
    TRUTH.rms_norm(x, weight, 1e-5, want, summed := residual.clone() if with_residual else None)
    device_residual = put(residual) if with_residual else None
    out = empty_like(x)
    gpu.rms_norm(put(x), put(weight), 1e-5, out, device_residual)
    assert_close(out, want)
    if with_residual:
        assert torch.equal(device_residual.cpu(), summed)
    in_place = put(x)
    gpu.rms_norm(in_place, put(weight), 1e-5, in_place, put(residual) if with_residual else None)
    assert torch.equal(in_place, out)


@pytest.mark.feature("engine", "SYCL kernels pass the CUDA kernels' tests, on Intel's CPU device (make sycl-check)")
@pytest.mark.parametrize("op", ["silu_mul", "gelu_mul"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (300, 1536), (17, 14336), (4, 50)])
def test_gates(gpu, op, dtype, tokens, width):
    gate_up = 4 * randn(tokens, 2 * width, dtype=dtype)
    gate_up[0, :2] = torch.tensor([-1e4, 1e4])
    want = torch.empty(tokens, width, dtype=torch.float64)
    getattr(TRUTH, op)(gate_up, want)
    out = empty_like(want, dtype)
    getattr(gpu, op)(put(gate_up), out)
    assert_close(out, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [576, 4096, 30])
def test_embed_and_gather(gpu, dtype, width):
    table, ids = randn(1000, width, dtype=dtype), torch.randint(0, 1000, (77,), dtype=torch.int32)
    want = torch.empty(77, width, dtype=torch.float64)
    TRUTH.embed(ids, table, want, 1.5)
    out = empty_like(want, dtype)
    gpu.embed(put(ids), put(table), out, 1.5)
    assert_close(out, want)
    gpu.gather_rows(put(table), put(ids), out)
    assert torch.equal(out.cpu(), table[ids.long()])
    wild = torch.tensor([-5, 0, 2**31 - 1, 999], dtype=torch.int32)
    out = empty_like(want[:4], dtype)
    gpu.gather_rows(put(table), put(wild), out)
    assert torch.equal(out.cpu(), table[[0, 0, 999, 999]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "rotary", "page_size"),
    [(9, 3, 64, 64, 16), (32, 8, 128, 128, 64), (4, 4, 80, 80, 32), (16, 1, 256, 128, 256), (6, 2, 96, 32, 16)],
)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("with_rope", [False, True])
def test_rope_and_cache(gpu, dtype, heads, kv_heads, width, rotary, page_size, with_norm, with_rope):
    tokens, pages, longest = 45, 12, 500
    qkv = randn(tokens, (heads + 2 * kv_heads) * width, dtype=dtype)
    positions = torch.randint(0, longest, (tokens,), dtype=torch.int32)
    kv_index = torch.randperm(pages * page_size)[:tokens]
    rope = Rope(randn(longest, rotary, seed=1)) if with_rope else None
    norm = HeadNorm(randn(width, seed=2), randn(width, seed=3), 1e-6) if with_norm else None
    caches = [randn(pages, kv_heads, page_size, width, dtype=dtype, seed=4 + i) for i in range(2)]
    truth = [cache.double() for cache in caches]
    want = torch.empty(tokens, heads, width, dtype=torch.float64)
    TRUTH.rope_and_cache(qkv, positions, kv_index, rope, *truth, want, norm)

    on_device = [put(cache) for cache in caches]
    q_out = empty_like(want, dtype)
    device_rope = Rope(put(rope.cos_sin)) if rope else None
    device_norm = HeadNorm(put(norm.q), put(norm.k), norm.eps) if norm else None
    gpu.rope_and_cache(put(qkv), put(positions), put(kv_index), device_rope, *on_device, q_out, device_norm)
    assert_close(q_out, want)
    assert_close(on_device[0], truth[0])
    assert torch.equal(on_device[1].cpu(), truth[1].to(dtype))

    untouched = [put(cache) for cache in caches]
    nowhere = torch.full((tokens,), -1)
    nowhere[1::2] = pages * page_size
    again = empty_like(want, dtype)
    gpu.rope_and_cache(put(qkv), put(positions), put(nowhere), device_rope, *untouched, again, device_norm)
    assert torch.equal(again, q_out)
    assert all(torch.equal(cache.cpu(), old) for cache, old in zip(untouched, caches, strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("page", [(3, 16, 20), (1, 16, 16), (8, 64, 128), (2, 16, 80)])
def test_copy_pages(gpu, dtype, page):
    """Pages outside the cache, on either side of a copy, change nothing."""
    caches = [(100 * randn(9, *page, seed=i)).to(dtype) for i in range(2)]
    on_device = [put(cache) for cache in caches]
    nothing = torch.empty(0, dtype=torch.int32, device=DEVICE)
    gpu.copy_pages(*on_device, nothing, nothing)
    wild = torch.tensor([[8, -1, 0, 0, 9, 0, 2, 2**31 - 1], [3, 2, 7, 1, 4, 9, -1, 5]], dtype=torch.int32)
    gpu.copy_pages(*on_device, *map(put, wild))
    TRUTH.copy_pages(*caches, *torch.tensor([[8, 0, 0], [3, 7, 1]], dtype=torch.int32))
    assert all(torch.equal(got.cpu(), want) for got, want in zip(on_device, caches, strict=True))


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("stops", [1, 4])
def test_feed_back(gpu, rows, stops):
    """Half of the tokens are known, and stop nobody; of the others some are stop tokens."""
    random = torch.Generator().manual_seed(rows)

    def below(n: int, *shape: int) -> torch.Tensor:
        return torch.randint(n, shape, generator=random, dtype=torch.int32)

    ids, last_token, slot = below(9, rows), below(9, rows + 3), below(rows + 3, rows)
    ids[::2] = -1
    kv_len, stop_ids = 1 + below(500, rows), below(9, rows, stops) - 1
    stop_ids[0, -1] = last_token[slot[0]]
    given = [put(t) for t in (ids, kv_len, slot, last_token, stop_ids)]
    before = kv_len.clone()
    TRUTH.feed_back(ids, kv_len, slot, last_token, stop_ids)
    assert kv_len[0] == -before[0]
    assert (kv_len[1::2] == before[1::2]).all()
    assert rows == 1 or 0 < (kv_len < 0).sum() < -(-rows // 2)
    gpu.feed_back(*given)
    for got, want in zip(given, (ids, kv_len, slot, last_token, stop_ids), strict=True):
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "depth", "outputs"), [(1, 576, 192), (130, 1536, 576), (40, 256, 4096)])
def test_linear(real_gpu, dtype, tokens, depth, outputs):
    x, weight = randn(tokens, depth, dtype=dtype), randn(outputs, depth, dtype=dtype, seed=1) / depth**0.5
    bias = randn(outputs, dtype=dtype, seed=2).float()
    for added in (None, bias):
        want = torch.empty(tokens, outputs, dtype=torch.float64)
        TRUTH.linear(x, weight.double(), want, None if added is None else added.double())
        packed = real_gpu.pack_weight(weight)
        for out_dtype in {dtype, torch.float32}:
            out = empty_like(want, out_dtype)
            real_gpu.linear(put(x), packed, out, None if added is None else put(added))
            assert_close(out, want, 1e-5 if out_dtype is torch.float32 else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "depth", "width"),
    [
        *((3, 64, 96), (150, 70, 90)),  # few rows, and odd sizes: the vendor's product
        *((161, 72, 136), (200, 40, 112), (200, 128, 232)),  # tiles of 64, 112 and 128 columns on two multiprocessors
        *sized(((1024, 264, 3072), (512, 256, 14336), (4000, 72, 2000)), ()),  # the same on an H100
    ],
)
@pytest.mark.feature("CUDA kernels", "gate and up products with SiLU in one pass, for compute capability 9.0")
def test_gated_linear(gpu, dtype, tokens, depth, width):
    """The one kernel where there is one, which leaves the sums alone; the vendor's product and silu_mul elsewhere."""
    x, weight = randn(tokens, depth, dtype=dtype), randn(2 * width, depth, dtype=dtype, seed=1) * 3 / depth**0.5
    for bias in (None, randn(2 * width, dtype=dtype, seed=2).float()):
        want, sums = (
            torch.empty(tokens, width, dtype=torch.float64),
            torch.empty(tokens, 2 * width, dtype=torch.float64),
        )
        added = None if bias is None else bias.double()
        TRUTH.gated_linear(x, TRUTH.pack_weight(weight.double(), gated=True), want, sums, added)
        around = empty_like(torch.empty(tokens + 1, width), dtype)
        given = None if bias is None else put(bias)
        packed = gpu.pack_weight(weight, gated=True)
        written = empty_like(sums, dtype)
        gpu.gated_linear(put(x), packed, around[:tokens], written, given)
        assert_close(around[:tokens], want)
        assert around[tokens].isnan().all()
        in_one = warpgroup_kernels() and dtype is not torch.float32 and bias is None and tokens > 160
        assert written.isnan().all() if in_one else not written.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "count", "shared"), [(1, 60, False), (37, 128, False), (900, 8, True)])
@pytest.mark.feature("engine", "CUDA: mixtures of experts (by Triton kernels)")
def test_mixtures_of_experts(real_gpu, dtype, tokens, count, shared):
    widths = (96,) * count + ((160,) if shared else ())
    gate_up = [(randn(2 * w, 256, seed=i) / 16).to(dtype) for i, w in enumerate(widths)]
    down = [(randn(256, w, seed=i) / 10).to(dtype) for i, w in enumerate(widths)]
    x, router = randn(tokens, 256, dtype=dtype), 2 * randn(tokens, len(widths), seed=1)

    def pack(ops) -> Experts:
        packed = (tuple(ops.pack_weight(weight) for weight in weights) for weights in (gate_up, down))
        return Experts(*packed, widths, top_k=4, renormalise=True, shared=shared)

    want, out = torch.empty(x.shape, dtype=torch.float64), empty_like(x)
    TRUTH.mix_experts(x, router, pack(TRUTH), want)
    real_gpu.mix_experts(put(x), put(router), pack(real_gpu), out)
    assert_close(out, want, 4 * TOLERANCE[dtype])  # two products, what is between them, and the sum


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.feature("engine", "CUDA: routings of GPT-OSS and DeepSeek (by Triton kernels)")
@pytest.mark.hardware("mixtures of experts, routings of GPT-OSS and DeepSeek")
def test_routings(real_gpu, dtype, routing):
    """Biases and the clamped gate with two of them, a shared expert with the others."""
    biased = routing in ("softmax", "sigmoid of groups")
    widths = (96,) * 48 + (() if biased else (160,))
    given = options_of(routing, 48, 96, 256, biased, 3) | {"top_k": 5, "shared": not biased, "shared_gate": False}
    gate_up = [(randn(2 * w, 256, seed=i) / 16).to(dtype) for i, w in enumerate(widths)]
    down = [(randn(256, w, seed=i) / 10).to(dtype) for i, w in enumerate(widths)]
    x, router = randn(300, 256, dtype=dtype), 2 * randn(300, 48, seed=1)

    def pack(ops, place) -> Experts:
        packed = (tuple(ops.pack_weight(weight) for weight in weights) for weights in (gate_up, down))
        options = {key: place(value) if isinstance(value, torch.Tensor) else value for key, value in given.items()}
        return Experts(*packed, widths, **options)

    want, out = torch.empty(x.shape, dtype=torch.float64), empty_like(x)
    TRUTH.mix_experts(x, router, pack(TRUTH, lambda t: t), want)
    real_gpu.mix_experts(put(x), put(router), pack(real_gpu, put), out)
    assert_close(out, want, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks(gpu, dtype):
    attn, lse, sinks = randn(70, 8, 64, dtype=dtype), 5 * randn(70, 8, seed=1), 5 * randn(8, seed=2)
    want = attn.double()
    TRUTH.sink(want, lse.double(), sinks.double())
    out = put(attn)
    gpu.sink(out, put(lse), put(sinks))
    assert_close(out, want)


def test_rejects_wrong_tensors(gpu):
    x, weight = put(randn(3, 64)), put(randn(64))
    with pytest.raises(ValueError, match="out has shape"):
        gpu.rms_norm(x, weight, 1e-5, empty_like(x[:2]))
    with pytest.raises(ValueError, match="weight has dtype"):
        gpu.rms_norm(x, weight.half(), 1e-5, empty_like(x))
    with pytest.raises(ValueError, match="must be contiguous and on"):
        gpu.rms_norm(x.t().contiguous().t(), weight, 1e-5, empty_like(x))
    page = put(torch.zeros(1, dtype=torch.int32))
    odd = [put(torch.zeros(2, 1, 3, 2)) for _ in range(2)]
    with pytest.raises(ValueError, match="pages of 24 bytes: a multiple of 16 is needed"):
        gpu.copy_pages(*odd, page, page)


@pytest.mark.skipif(SYCL, reason="its kernel reads a row twice, and takes any")
def test_rejects_rows_that_registers_do_not_hold(gpu):
    with pytest.raises(ValueError, match="rows of 32776 elements"):
        gpu.rms_norm(wide := put(randn(1, 32776)), put(randn(32776)), 1e-5, empty_like(wide))
