"""The compiled matrix product against float64, and that a row's bits do not depend on what is computed beside it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchinfer import _ops
from batchinfer.ops.native import NativeOps

ISAS = _ops.build_info["usable_isas"]
DTYPES = (torch.float32, torch.bfloat16)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
isas = pytest.mark.parametrize("isa", ISAS)


@cache
def native(isa: str, threads: int = 2) -> NativeOps:
    return NativeOps("cpu", threads, isa)


def problem(rows: int, outputs: int, depth: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, depth, generator=g)
    weight = torch.randn(outputs, depth, generator=g).to(dtype)
    return x, weight, torch.randn(outputs, generator=g)


def linear(ops: NativeOps, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = torch.full((len(x), weight.shape[0]), torch.nan)
    ops.linear(x, ops.pack_weight(weight), out, bias)
    return out


def gated_linear(
    ops: NativeOps, x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    out = torch.full((len(x), weight.shape[0] // 2), torch.nan, dtype=dtype)
    ops.gated_linear(x, ops.pack_weight(weight, gated=True), out, torch.empty(len(x), weight.shape[0]), bias)
    return out


def check(ops: NativeOps, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    seen = x.bfloat16() if ops.bf16_dot and weight.dtype is torch.bfloat16 else x
    truth = seen.double() @ weight.double().T + (0 if bias is None else bias.double())
    # A chain of K roundings: K * 2^-24 of the sum of magnitudes at the very worst.
    bound = (seen.double().abs() @ weight.double().abs().T + 1) * (x.shape[1] + 2) * 2**-24
    error = (linear(ops, x, weight, bias).double() - truth).abs()
    assert (error <= bound).all(), f"{ops.isa}: error {error.max()}"


@pytest.mark.feature("CPU kernels", "matrix products with weights packed once, bf16 and fp32")
@isas
@settings(max_examples=25)
@given(
    rows=st.integers(1, 40) | st.integers(100, 260),
    outputs=st.integers(1, 140),
    depth=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_against_float64(
    isa: str, rows: int, outputs: int, depth: int, dtype: torch.dtype, threads: int, with_bias: bool, seed: int
) -> None:
    x, weight, bias = problem(rows, outputs, depth, dtype, seed)
    check(native(isa, threads), x, weight, bias if with_bias else None)


@isas
@dtypes
@pytest.mark.parametrize(("outputs", "depth"), [(960, 576), (576, 1536), (100, 4100)])
def test_shapes_of_a_real_model(isa: str, dtype: torch.dtype, outputs: int, depth: int) -> None:
    x, weight, bias = problem(33, outputs, depth, dtype)
    check(native(isa), x, weight, bias)


@pytest.mark.feature("CPU kernels", "results independent of batch and threads")
@isas
@dtypes
def test_a_row_does_not_depend_on_batch_or_threads(isa: str, dtype: torch.dtype) -> None:
    x, weight, bias = problem(200, 150, 321, dtype)
    alone = torch.cat([linear(native(isa, 1), row, weight, bias) for row in x.split(1)])
    for threads in (1, 2, 3):
        ops = native(isa, threads)
        for rows in [*range(1, 33), 111, 112, 113, 169, 200]:
            assert torch.equal(linear(ops, x[:rows], weight, bias), alone[:rows]), (threads, rows)
            assert torch.equal(linear(ops, x[-rows:], weight, bias), alone[-rows:]), (threads, rows)


@pytest.mark.feature("CPU kernels", "gate and up products with SiLU in one pass")
@isas
@settings(max_examples=25)
@given(
    rows=st.integers(1, 40) | st.integers(100, 130),
    width=st.integers(1, 70),
    depth=st.sampled_from([1, 63, 129, 2048, 2050, 4100]),
    dtype=st.sampled_from(DTYPES),
    out_dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
    with_bias=st.booleans(),
)
def test_gated_is_silu_mul_of_the_plain_product(
    isa: str,
    rows: int,
    width: int,
    depth: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    threads: int,
    with_bias: bool,
) -> None:
    ops = native(isa, threads)
    x, weight, bias = problem(rows, 2 * width, depth, dtype)
    want = torch.empty(rows, width, dtype=out_dtype)
    ops.silu_mul(linear(ops, x, weight, bias if with_bias else None), want)
    assert torch.equal(gated_linear(ops, x, weight, bias if with_bias else None, out_dtype), want)


@isas
@dtypes
def test_bfloat16_inputs_are_the_float32_ones_rounded(isa: str, dtype: torch.dtype) -> None:
    ops = native(isa)
    for depth in (1, 64, 77, 321):
        x, weight, bias = problem(31, 50, depth, dtype)
        x = x.bfloat16()
        assert torch.equal(linear(ops, x, weight, bias), linear(ops, x.float(), weight, bias))
        assert torch.equal(gated_linear(ops, x, weight, bias), gated_linear(ops, x.float(), weight, bias))


@isas
@dtypes
def test_a_column_does_not_depend_on_its_neighbours(isa: str, dtype: torch.dtype) -> None:
    x, weight, _ = problem(17, 150, 321, dtype)
    whole = linear(native(isa), x, weight)
    for first, last in [(0, 1), (1, 40), (77, 150), (31, 97)]:
        assert torch.equal(linear(native(isa), x, weight[first:last]), whole[:, first:last])


@isas
@dtypes
def test_a_bad_row_does_not_reach_the_others(isa: str, dtype: torch.dtype) -> None:
    x, weight, bias = problem(20, 50, 70, dtype)
    clean = linear(native(isa), x, weight, bias)
    x[7, 3], x[8, 0] = torch.nan, torch.inf
    dirty = linear(native(isa), x, weight, bias)
    others = [i for i in range(20) if i not in (7, 8)]
    assert torch.equal(dirty[others], clean[others])
    assert dirty[7].isnan().all()
    assert not dirty[8].isfinite().any()


@isas
@dtypes
def test_nothing_to_do(isa: str, dtype: torch.dtype) -> None:
    ops = native(isa)
    weight = ops.pack_weight(torch.ones(3, 5, dtype=dtype))
    room = torch.ones(2, 3)
    ops.linear(torch.empty(0, 5), weight, room[:0])
    assert (room == 1).all()


def test_packed_weights_keep_their_dtype() -> None:
    ops = native(ISAS[0])
    for gated in (False, True):
        half, single = (ops.pack_weight(torch.ones(64, 64, dtype=d), gated) for d in (torch.bfloat16, torch.float32))
        assert half.bytes == single.bytes / 2 == 64 * 64 * 2


def test_wrong_arguments_are_named() -> None:
    ops = native(ISAS[0])
    weight = ops.pack_weight(torch.ones(3, 5))
    x, out = torch.ones(2, 5), torch.empty(2, 3)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.float16"):
        ops.pack_weight(torch.ones(3, 5, dtype=torch.float16))
    with pytest.raises(ValueError, match="weight must be contiguous"):
        ops.pack_weight(torch.ones(5, 3).T)
    with pytest.raises(ValueError, match=r"x has shape \(2, 4\)"):
        ops.linear(torch.ones(2, 4), weight, out)
    with pytest.raises(ValueError, match="out has shape"):
        ops.linear(x, weight, torch.empty(3, 2))
    with pytest.raises(ValueError, match="bias has shape"):
        ops.linear(x, weight, out, torch.ones(2))
    gated = ops.pack_weight(torch.ones(4, 5), gated=True)
    with pytest.raises(ValueError, match="weight is not packed for gated_linear"):
        ops.gated_linear(x, weight, out, out)
    with pytest.raises(ValueError, match="weight is packed for gated_linear"):
        ops.linear(x, gated, out)
    with pytest.raises(ValueError, match=r"bias has shape \(2,\): \(4,\) is needed"):
        ops.gated_linear(x, gated, torch.empty(2, 2), torch.empty(2, 4), torch.ones(2))
    with pytest.raises(ValueError, match="even number of rows"):
        ops.pack_weight(torch.ones(3, 5), gated=True)
