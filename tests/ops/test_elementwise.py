"""Embedding, norm, rope, activation and gather of the compiled backend against the reference in float64."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchinfer import _ops
from batchinfer.ops import Activation, HeadNorm, Rope
from batchinfer.ops.native import ACTIVATIONS, NativeOps
from batchinfer.ops.reference import ReferenceOps

EXACT = ReferenceOps(torch.float64)


@cache
def native(isa: str, threads: int) -> NativeOps:
    return NativeOps("cpu", threads, isa)


backends = st.builds(native, st.sampled_from(_ops.build_info["usable_isas"]), st.integers(1, 3))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
token_counts = st.one_of(st.integers(0, 5), st.sampled_from([17, 300]))  # 300 tokens occupy all threads
widths = st.one_of(st.integers(1, 70), st.sampled_from([128, 576]))
seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def integers(seed: int, limit: int, count: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randint(limit, (count,), generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=3e-6, atol=1e-6)


@given(ops=backends, dtype=dtypes, tokens=token_counts, width=widths, scale=st.sampled_from([1.0, 24.0]), seed=seeds)
def test_embed(ops: NativeOps, dtype: torch.dtype, tokens: int, width: int, scale: float, seed: int) -> None:
    table, ids = normal(seed, 37, width).to(dtype), integers(seed, 37, tokens)
    out, want = torch.full((tokens, width), torch.nan), torch.empty(tokens, width)
    ops.embed(ids, table, out, scale)
    EXACT.embed(ids, table, want, scale)
    assert torch.equal(out, want)


@pytest.mark.feature(
    "CPU kernels", "rope with query/key norms and cache write, RMSNorm with residual, SiLU-mul, embedding"
)
@given(ops=backends, tokens=token_counts, width=widths, residual=st.booleans(), in_place=st.booleans(), seed=seeds)
def test_rms_norm(ops: NativeOps, tokens: int, width: int, residual: bool, in_place: bool, seed: int) -> None:
    x, weight = normal(seed, tokens, width, scale=3), normal(seed + 1, width)
    stream = normal(seed + 2, tokens, width) if residual else None
    want, want_stream = torch.empty(tokens, width, dtype=torch.float64), stream.clone() if residual else None
    EXACT.rms_norm(x, weight, 1e-5, want, want_stream)
    out = x if in_place else torch.full_like(x, torch.nan)
    ops.rms_norm(x, weight, 1e-5, out, stream)
    assert_close(out, want)
    if residual:
        assert torch.equal(stream, want_stream)


@pytest.mark.feature("CPU kernels", "LayerNorm, GELU, ReLU, soft caps of logits")
@given(
    ops=backends,
    tokens=token_counts,
    width=widths,
    bias=st.booleans(),
    residual=st.booleans(),
    in_place=st.booleans(),
    seed=seeds,
)
def test_layer_norm(
    ops: NativeOps, tokens: int, width: int, bias: bool, residual: bool, in_place: bool, seed: int
) -> None:
    x, weight = normal(seed, tokens, width, scale=3) + 2, normal(seed + 1, width)
    stream = normal(seed + 2, tokens, width) if residual else None
    shift = normal(seed + 3, width) if bias else None
    want, want_stream = torch.empty(tokens, width, dtype=torch.float64), stream.clone() if residual else None
    EXACT.layer_norm(x, weight, shift, 1e-5, want, want_stream)
    out = x if in_place else torch.full_like(x, torch.nan)
    ops.layer_norm(x, weight, shift, 1e-5, out, stream)
    # Two elements that are nearly the same have a difference with few digits.
    torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-5)
    if residual:
        assert torch.equal(stream, want_stream)


@given(ops=backends, tokens=token_counts, width=widths, seed=seeds)
def test_add(ops: NativeOps, tokens: int, width: int, seed: int) -> None:
    x, stream = normal(seed, tokens, width), normal(seed + 1, tokens, width)
    want = x + stream
    ops.add(x, stream)
    assert torch.equal(stream, want)


@given(ops=backends, rows=token_counts, width=widths, scale=st.sampled_from([0.1, 3.0, 1e4]), seed=seeds)
def test_softcap(ops: NativeOps, rows: int, width: int, scale: float, seed: int) -> None:
    x, want = normal(seed, rows, width, scale=scale), torch.empty(rows, width, dtype=torch.float64)
    want.copy_(x)
    EXACT.softcap(want, 30.0)
    ops.softcap(x, 30.0)
    torch.testing.assert_close(x.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", ["silu_mul", "gelu_mul"])
@given(ops=backends, tokens=token_counts, width=widths, scale=st.sampled_from([1.0, 30.0, 1e4]), seed=seeds)
def test_gates(op: str, ops: NativeOps, tokens: int, width: int, scale: float, seed: int) -> None:
    gate_up = normal(seed, tokens, 2 * width, scale=scale)
    out, want = torch.full((tokens, width), torch.nan), torch.empty(tokens, width, dtype=torch.float64)
    getattr(ops, op)(gate_up, out)
    getattr(EXACT, op)(gate_up, want)
    # GELU's reference itself cancels far below 0: what is left there is worth 1e-16 of the gate.
    atol = 1e-30 if op == "silu_mul" else 1e-6
    torch.testing.assert_close(out.double(), want, rtol=3e-6, atol=atol)


@given(
    ops=backends,
    kind=st.sampled_from(list(ACTIVATIONS)),
    tokens=token_counts,
    width=widths,
    scale=st.sampled_from([0.01, 1.0, 5.0, 1e4]),
    in_place=st.booleans(),
    seed=seeds,
)
def test_activate(
    ops: NativeOps, kind: Activation, tokens: int, width: int, scale: float, in_place: bool, seed: int
) -> None:
    x = normal(seed, tokens, width, scale=scale)
    want = torch.empty(tokens, width, dtype=torch.float64)
    EXACT.activate(kind, x, want)
    out = x if in_place else torch.full_like(x, torch.nan)
    ops.activate(kind, x, out)
    torch.testing.assert_close(out.double(), want, rtol=3e-6, atol=1e-6)


@given(ops=backends, tokens=token_counts, width=widths, residual=st.booleans(), seed=seeds)
def test_bfloat16_outputs_are_the_float32_ones_rounded(
    ops: NativeOps, tokens: int, width: int, residual: bool, seed: int
) -> None:
    x, gate_up, weight = normal(seed, tokens, width), normal(seed, tokens, 2 * width, scale=3), normal(seed + 1, width)
    want, out = torch.empty(tokens, width), torch.empty(tokens, width, dtype=torch.bfloat16)
    stream = normal(seed + 2, tokens, width) if residual else None
    ops.rms_norm(x, weight, 1e-5, want, None if stream is None else stream.clone())
    ops.rms_norm(x, weight, 1e-5, out, stream)
    assert torch.equal(out, want.bfloat16())
    ops.silu_mul(gate_up, want)
    ops.silu_mul(gate_up, out)
    assert torch.equal(out, want.bfloat16())


@given(ops=backends, rows=token_counts, width=widths, seed=seeds)
def test_gather_rows(ops: NativeOps, rows: int, width: int, seed: int) -> None:
    x, index = normal(seed, 23, width), integers(seed, 23, rows)
    out = torch.full((rows, width), torch.nan)
    ops.gather_rows(x, index, out)
    assert torch.equal(out, x[index.long()])


@given(
    ops=backends,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    copies=st.integers(0, 9),
    page=st.tuples(st.integers(1, 3), st.sampled_from([1, 16]), st.sampled_from([6, 128])),
    seed=seeds,
)
def test_copy_pages(ops: NativeOps, dtype: torch.dtype, copies: int, page: tuple[int, int, int], seed: int) -> None:
    caches = [(100 * normal(seed + i, 20, *page)).to(dtype) for i in range(2)]
    want = [cache.clone() for cache in caches]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed)).int()
    source, target = order[integers(seed, 10, copies).long()], order[10 : 10 + copies]
    ops.copy_pages(*caches, source, target)
    EXACT.copy_pages(*want, source, target)
    assert all(map(torch.equal, caches, want))


@st.composite
def rope_cases(draw: st.DrawFn) -> dict:
    """Arguments of rope_and_cache; every cache token not written holds NaN."""
    tokens, seed, dtype = draw(token_counts), draw(seeds), draw(dtypes)
    kv_heads, group, page_size = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 16]))
    width = 2 * draw(st.integers(1, 40))
    rotary = draw(st.one_of(st.none(), st.just(width), st.integers(1, width // 2).map(lambda half: 2 * half)))
    heads, pages = kv_heads * group, tokens // page_size + 3
    angles = normal(seed + 1, 50, (rotary or 2) // 2, scale=10)
    each_head = HeadNorm(normal(seed + 2, width), normal(seed + 3, width), 1e-6)
    all_heads = HeadNorm(normal(seed + 2, heads * width), normal(seed + 3, kv_heads * width), 1e-6)
    order = torch.randperm(pages * page_size, generator=torch.Generator().manual_seed(seed))
    return {
        "qkv": normal(seed, tokens, (heads + 2 * kv_heads) * width),
        "positions": integers(seed, 50, tokens),
        "kv_index": order[:tokens],
        "rope": None if rotary is None else Rope(torch.cat([angles.cos(), angles.sin()], dim=1)),
        "k_cache": torch.full((pages, kv_heads, page_size, width), torch.nan, dtype=dtype),
        "v_cache": torch.full((pages, kv_heads, page_size, width), torch.nan, dtype=dtype),
        "q_out": torch.full((tokens, heads, width), torch.nan),
        "norm": draw(st.sampled_from([None, each_head, all_heads])),
    }


def fresh_outputs(case: dict, dtype: torch.dtype) -> dict:
    k_cache, v_cache = case["k_cache"].to(dtype), case["v_cache"].to(dtype)
    return case | {"k_cache": k_cache, "v_cache": v_cache, "q_out": case["q_out"].to(dtype)}


@pytest.mark.feature(
    "CPU kernels", "rope with query/key norms and cache write, RMSNorm with residual, SiLU-mul, embedding"
)
@given(ops=backends, case=rope_cases())
def test_rope_and_cache(ops: NativeOps, case: dict) -> None:
    want = fresh_outputs(case, torch.float64)
    EXACT.rope_and_cache(**want)
    ops.rope_and_cache(**case)
    assert_close(case["q_out"], want["q_out"])
    rounding = 2.0**-8 if case["k_cache"].dtype is torch.bfloat16 else 3e-6
    for cache_ in ("k_cache", "v_cache"):  # NaN where nothing may be written
        torch.testing.assert_close(case[cache_].double(), want[cache_], rtol=rounding, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("isa", _ops.build_info["usable_isas"])
def test_rounding_to_bfloat16_is_to_nearest_even(isa: str) -> None:
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]
    only_low_bits = torch.tensor([0x7F800001, -8388607], dtype=torch.int32).view(torch.float32)  # NaNs
    width = 64
    values = torch.cat([torch.tensor(special), only_low_bits, normal(0, 3 * width - len(special) - 2)])
    k_cache, v_cache = torch.zeros(2, 1, 1, 1, width, dtype=torch.bfloat16)
    zero = torch.zeros(1, dtype=torch.int32)
    native(isa, 1).rope_and_cache(values[None], zero, zero.long(), None, k_cache, v_cache, torch.zeros(1, 1, width))
    for cache_, part in ((k_cache, values[width : 2 * width]), (v_cache, values[2 * width :])):
        assert torch.equal(cache_.flatten(), part.bfloat16())
    native(isa, 1).rope_and_cache(
        values[None].roll(width), zero, zero.long(), None, k_cache, v_cache, torch.zeros(1, 1, width)
    )
    want = values[:width].bfloat16()
    torch.testing.assert_close(k_cache.flatten(), want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(k_cache.flatten()[:2]), torch.tensor([False, True]))


@settings(max_examples=25)
@given(isa=st.sampled_from(_ops.build_info["usable_isas"]), width=widths, tokens=st.integers(2, 300), seed=seeds)
def test_a_row_does_not_depend_on_batch_or_threads(isa: str, width: int, tokens: int, seed: int) -> None:
    """Bit for bit: alone with one thread, and among other rows with three."""
    x, weight = normal(seed, tokens, 2 * width), normal(seed + 1, 2 * width)
    some = integers(seed, tokens, 3).tolist()

    def norm(ops: NativeOps, rows: Tensor) -> Tensor:
        out = torch.empty_like(rows)
        ops.rms_norm(rows, weight, 1e-5, out)
        return out

    def gate(ops: NativeOps, rows: Tensor) -> Tensor:
        out = torch.empty(len(rows), width)
        ops.silu_mul(rows, out)
        return out

    for op in (norm, gate):
        together = op(native(isa, 3), x)
        for i in some:
            assert torch.equal(together[i : i + 1], op(native(isa, 1), x[i : i + 1]))
