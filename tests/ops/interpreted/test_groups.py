"""Products with codes in groups by the Triton kernels, against the weights they stand for in float64."""

from __future__ import annotations

import pytest
import torch
from ops.group_cases import KINDS, draw

from batchinfer.ops.grouped import GroupQuantized
from batchinfer.ops.reference import ReferenceOps
from batchinfer.ops.triton.grouped import FROM_DENSE

TRUTH = ReferenceOps(torch.float64)


def linear(ops, x, weight, bias=None, dtype=None):
    out = torch.full((len(x), weight.shape[0]), torch.nan, dtype=dtype or x.dtype)
    ops.linear(x, ops.pack_weight(weight), out, bias)
    return out


@pytest.mark.feature(
    "Triton kernels (interpreted)", "products with codes: int4, int8 and float8 in groups, with zeros and orders"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "outputs", "depth"), [(1, 40, 96), (19, 130, 352), (FROM_DENSE, 33, 160), (0, 8, 64)])
@pytest.mark.hardware("weights kept as codes")
def test_against_float64(ops, dtype, kind, rows, outputs, depth):
    g = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, depth, generator=g).to(dtype), draw(kind, outputs, depth)
    bias = torch.randn(outputs, generator=g)
    want, sizes = linear(TRUTH, x, weight, bias, torch.float64), x.double().abs() @ weight.dense(torch.float64).abs().T
    rounded = dtype is torch.float16 and rows == FROM_DENSE  # weights in 16 bits
    for out_dtype in {dtype, torch.float32}:
        error = (linear(ops, x, weight, bias, out_dtype).double() - want).abs()
        last_bit = 2**-11 if out_dtype is torch.float16 else 2**-23
        assert (error <= sizes * (2**-11 if rounded else 2**-18) + (want.abs() + 1) * 2 * last_bit).all()


@pytest.mark.parametrize("kind", KINDS)
def test_split_sums_are_added_in_order(ops, kind, monkeypatch):
    """As on a device that one tile would leave idle."""
    x, weight = torch.randn(3, 704), draw(kind, 48, 704)
    want = linear(TRUTH, x, weight, torch.ones(48), torch.float64)
    monkeypatch.setattr(ops._groups, "_multiprocessors", 4)
    got = linear(ops, x, weight, torch.ones(48))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_every_code_of_float8_is_its_number(ops):
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].view(1, -1)  # all but NaN
    weight = GroupQuantized(codes.repeat(254, 1).view(torch.float8_e4m3fn), torch.ones(254, 1), 254)
    got = linear(ops, torch.eye(254), weight)
    assert torch.equal(got, weight.dense(torch.float32).T)


def test_activations_become_float8_row_by_row(ops):
    x = torch.randn(5, 1500) * torch.tensor([1.0, 300.0, 1e-5, 0.0, 1.0])[:, None]
    x[4, 7] = torch.nan
    codes, scales = torch.empty(5, 1500, dtype=torch.float8_e4m3fn), torch.empty(5, 1)
    ops._groups.encode(ops._launch, x, codes, scales)
    assert torch.equal(scales[:3], x[:3].abs().amax(1, keepdim=True) / 448)
    error = (codes[:4].double() * scales[:4] - x[:4]).abs()
    assert (error <= x[:4].abs() * 1.001 * 2**-4 + scales[:4] * 2**-10).all()
    assert codes[4].float().isnan().any() or scales[4].isnan()


def test_wrong_arguments_are_named(ops):
    weight = ops.pack_weight(draw("int4", 16, 256))
    x, out = torch.zeros(2, 256), torch.zeros(2, 16)
    with pytest.raises(ValueError, match=r"x has shape \(2, 255\)"):
        ops.linear(x[:, 1:], weight, out)
    with pytest.raises(ValueError, match=r"out has dtype torch\.float16: torch\.float32 is needed"):
        ops.linear(x, weight, out.half())
    one = draw("int4", 16, 256)
    odd = GroupQuantized(one.codes, one.scales.repeat(1, 6)[:, :11], 24, None, 4)
    with pytest.raises(ValueError, match=r"groups of 24: multiples of 16 are possible"):
        ops.pack_weight(odd)


@pytest.mark.parametrize(
    ("kind", "bits"), [("int4", 4.125), ("int4 with zeros", 4.75), ("int8 of outputs", 8.0), ("float8 in blocks", 8.25)]
)
def test_memory(ops, kind, bits):
    """A scale of 16 bits for each group (32 of float8, as in the files), and a zero of 8."""
    packed = ops.pack_weight(draw(kind, 512, 2048))
    assert packed.nbytes * 8 / 512 / 2048 == pytest.approx(bits, rel=2e-3)
