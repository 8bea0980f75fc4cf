"""Products with matrices of codes: against the reference in float64, and against the dense weights in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_linear import ISAS, gated_linear, linear, native
from torch import Tensor

from batchinfer.ops.quantized import Quantized, encode, int8
from batchinfer.ops.reference import ReferenceOps

isas = pytest.mark.parametrize("isa", ISAS)
FORMATS = {"int8": (8, 0), "blocks8": (8, 32), "blocks4": (4, 32), "short_blocks8": (8, 16)}
formats = pytest.mark.parametrize("kind", FORMATS)
TRUTH = ReferenceOps(torch.float64)


def quantized(kind: str, outputs: int, depth: int, seed: int = 0) -> Quantized:
    g = torch.Generator().manual_seed(seed)
    bits, block = FORMATS[kind]
    if not block:
        return int8(torch.randn(outputs, depth, generator=g))
    codes = torch.randint(0, 2**bits, (outputs, depth), generator=g, dtype=torch.uint8)
    scales = torch.randn(outputs, depth // block, generator=g).abs().half() / 2**bits
    return Quantized(
        codes, scales, (-(2.0 ** (bits - 1)) * scales * torch.rand(scales.shape, generator=g)).half(), bits
    )


def inputs(rows: int, depth: int, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, depth, generator=g) * torch.exp(2 * torch.randn(rows, 1, generator=g))


def sizes(x: Tensor, weight: Quantized) -> Tensor:
    """Sums of the magnitudes of what is added up for each output."""
    codes, scales = encode(x, weight.block)
    seen = (codes * scales).flatten(1).double().abs()
    parts = Quantized(
        weight.codes, weight.scales.abs(), None if weight.minima is None else weight.minima.abs(), weight.bits
    )
    return seen @ (parts.dense(torch.float64).abs()).T


@pytest.mark.feature(
    "CPU kernels", "products with weights kept as codes of 4 and 8 bits, and int8 weights and activations"
)
@isas
@formats
@settings(max_examples=15)
@given(
    rows=st.integers(1, 30) | st.integers(100, 230),
    outputs=st.integers(1, 140),
    depth=st.integers(1, 9),
    threads=st.integers(1, 3),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@pytest.mark.hardware("weights kept as codes")
def test_against_the_reference_in_float64(
    isa: str, kind: str, rows: int, outputs: int, depth: int, threads: int, with_bias: bool, seed: int
) -> None:
    """The integers are the same; what is left is the rounding of a few operations for each block."""
    depth = 32 * depth if FORMATS[kind][1] else 7 * depth
    x, weight = inputs(rows, depth, seed), quantized(kind, outputs, depth, seed)
    bias = torch.randn(outputs) if with_bias else None
    want = torch.empty(rows, outputs, dtype=torch.float64)
    TRUTH.linear(x, TRUTH.pack_weight(weight), want, bias)
    error = (linear(native(isa, threads), x, weight, bias).double() - want).abs()
    assert (error <= (sizes(x, weight) + 4) * (depth // weight.block + 6) * 2**-23).all()


@formats
def test_against_the_dense_weights(kind: str) -> None:
    """An activation is at most half a scale beside its code."""
    x, weight = inputs(40, 576), quantized(kind, 100, 576)
    _, scales = encode(x, weight.block)
    off = 0.5 * scales.double().expand(-1, -1, weight.block).flatten(1)
    dense = weight.dense(torch.float64)
    error = (linear(native(ISAS[0]), x, weight).double() - x.double() @ dense.T).abs()
    assert (error <= off @ dense.abs().T + 1e-4 * sizes(x, weight)).all()


@isas
@formats
def test_a_row_does_not_depend_on_batch_or_threads(isa: str, kind: str) -> None:
    x, weight = inputs(130, 352), quantized(kind, 150, 352)
    alone = torch.cat([linear(native(isa, 1), row, weight) for row in x.split(1)])
    for threads in (1, 3):
        ops = native(isa, threads)
        for rows in [*range(1, 27), 111, 130]:
            assert torch.equal(linear(ops, x[:rows], weight), alone[:rows]), (threads, rows)
            assert torch.equal(linear(ops, x[-rows:], weight), alone[-rows:]), (threads, rows)


@isas
@formats
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gated_is_silu_mul_of_the_plain_product(isa: str, kind: str, out_dtype: torch.dtype) -> None:
    for rows, width in [(1, 1), (3, 40), (30, 33)]:
        ops, x, weight = native(isa), inputs(rows, 2080), quantized(kind, 2 * width, 2080)
        bias = torch.randn(2 * width)
        want = torch.empty(rows, width, dtype=out_dtype)
        ops.silu_mul(linear(ops, x, weight, bias), want)
        assert torch.equal(gated_linear(ops, x, weight, bias, out_dtype), want)


@isas
@formats
def test_bfloat16_inputs_are_the_float32_ones_rounded(isa: str, kind: str) -> None:
    x, weight = inputs(9, 96).bfloat16(), quantized(kind, 40, 96)
    assert torch.equal(linear(native(isa), x, weight), linear(native(isa), x.float(), weight))


@isas
@formats
def test_a_bad_row_does_not_reach_the_others(isa: str, kind: str) -> None:
    x, weight = inputs(20, 64), quantized(kind, 50, 64)
    clean = linear(native(isa), x, weight)
    x[7, 3], x[8, 0] = torch.nan, -torch.inf
    dirty = linear(native(isa), x, weight)
    others = [i for i in range(20) if i not in (7, 8)]
    assert torch.equal(dirty[others], clean[others])
    assert dirty[[7, 8]].isnan().all()


@isas
@formats
def test_extremes(isa: str, kind: str) -> None:
    """Zeros, numbers too small to have a scale, and the largest products that sums of integers can come to."""
    weight = quantized(kind, 33, 4096)
    weight.codes.fill_(2**weight.bits - 1)
    x = torch.zeros(4, 4096)
    x[1], x[2], x[3] = 1e-44, 3.0, -3.0
    want = torch.empty(4, 33, dtype=torch.float64)
    TRUTH.linear(x, weight, want)
    out = linear(native(isa), x, weight)
    assert not out[0].any()
    assert out[1].abs().max() < 1e-35
    assert torch.allclose(out[2:].double(), want[2:], rtol=1e-4)


def test_int8_codes_round_to_the_nearest() -> None:
    weight = torch.randn(20, 100).bfloat16()
    weight[3] = 0
    kept = int8(weight)
    error = (kept.dense(torch.float64) - weight.double()).abs()
    assert (error <= 0.5001 * kept.scales.double()[:, None]).all()
    assert (kept.codes.int() - 128).abs().max() == 127


def test_packed_bytes() -> None:
    ops = native(ISAS[0])
    bytes_of = {kind: ops.pack_weight(quantized(kind, 64, 64)).bytes * 8 / 64 / 64 for kind in FORMATS}
    assert bytes_of == {"int8": 8.5, "blocks8": 9.0, "blocks4": 5.0, "short_blocks8": 10.0}  # bits a weight


def test_wrong_arguments_are_named() -> None:
    ops, good = native(ISAS[0]), quantized("blocks4", 4, 64)
    with pytest.raises(ValueError, match="codes of 4 bits in blocks of 16"):
        ops.pack_weight(Quantized(good.codes, good.scales.repeat(1, 2), good.minima.repeat(1, 2), 4))
    with pytest.raises(ValueError, match=r"minima has shape \(4, 1\): \(4, 2\) is needed"):
        ops.pack_weight(Quantized(good.codes, good.scales, good.minima[:, :1], 4))
    with pytest.raises(ValueError, match=r"scales has dtype torch\.float32"):
        ops.pack_weight(Quantized(good.codes, good.scales.float(), good.minima, 4))
    with pytest.raises(ValueError, match="even number of rows"):
        ops.pack_weight(quantized("int8", 3, 64), gated=True)


@formats
def test_chosen_rows_stand_for_the_same_weights(kind: str) -> None:
    weight, rows = quantized(kind, 7, 64), [4, 0, 4]
    assert torch.equal(weight.chosen(rows).dense(torch.float32), weight.dense(torch.float32)[rows])
