"""Paged attention in Triton against the reference in float64; the cases are those of the compiled GPU kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu.test_gpu_attention import Case, draw_lengths, make_case
from torch import Tensor
from triton import language as tl

from batchinfer.ops.reference import ReferenceOps
from batchinfer.ops.triton import attention
from batchinfer.ops.triton.backend import TritonOps

TRUTH = ReferenceOps(torch.float64)
ROUNDOFF = {torch.float32: 2.0**-20, torch.float16: 2.0**-11}


def attend(ops, case: Case, scale: float, window: int = 0, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """In float64 by the reference, else in the case's dtype."""
    exact = ops is TRUTH
    out = torch.full(case.q.shape, torch.nan, dtype=torch.float64 if exact else case.q.dtype)
    lse = torch.full(case.q.shape[:2], torch.nan, dtype=torch.float64 if exact else torch.float32)
    plan = ops.plan_attention(case.inputs, case.q.shape[1], case.k, window)
    ops.attention(case.q, case.k, case.v, plan, scale, out, lse, softcap)
    return out, lse


def check(ops: TritonOps, case: Case, scale: float, window: int = 0, softcap: float = 0.0) -> None:
    out, lse = attend(ops, case, scale, window, softcap)
    want, want_lse = attend(TRUTH, case, scale, window, softcap)
    # The weights are rounded to the dtype (values are of size 1 to 4), then the result.
    error = ((out.double() - want).abs() / (2 + 2 * want.abs())).max().item()
    assert error <= ROUNDOFF[out.dtype], error  # false for NaN
    assert (lse.double() - want_lse).abs().max().item() <= 1e-4


@pytest.mark.feature("Triton kernels (interpreted)", "paged attention of mixed steps, GQA, sliding window, soft cap")
@pytest.mark.parametrize(
    ("shape", "dtype", "page_size", "window", "softcap"),
    [
        ((6, 2, 64), torch.float16, 16, 0, 0.0),
        ((2, 2, 32), torch.float32, 32, 0, 0.0),
        ((4, 2, 32), torch.float16, 24, 0, 0.0),  # pages of no power of two
        ((20, 1, 16), torch.float16, 16, 0, 0.0),  # more rows than a tile for each token
        ((3, 1, 80), torch.float32, 64, 0, 0.0),  # a width that is no power of two
        ((6, 2, 32), torch.float16, 16, 1, 0.0),
        ((6, 2, 32), torch.float32, 16, 37, 0.0),
        ((4, 2, 32), torch.float32, 16, 0, 3.0),
        ((4, 2, 32), torch.float16, 32, 64, 1.5),
    ],
)
@pytest.mark.hardware("sliding windows, soft caps")
def test_mixed_batches(ops, shape, dtype, page_size, window, softcap):
    lengths = draw_lengths(shape[0] + shape[2], 5, 100)
    check(ops, make_case(shape, dtype, lengths, page_size), 2 * shape[2] ** -0.5, window, softcap)


@pytest.mark.parametrize("window", [0, 700])
def test_split_boundaries(ops, window):
    lengths = [(1, n) for n in (1, 16, 17, 1024, 1025, 2049)]
    check(ops, make_case((2, 1, 16), torch.float32, lengths, 64), 0.5, window)


def test_extreme_scores(ops):
    """A scale of 4 makes scores of +-100: one key takes all, and the running maximum must move."""
    check(ops, make_case((4, 2, 64), torch.float16, [(1, 200), (30, 90), (40, 40)]), 4.0)


def test_independent_of_neighbours(ops):
    """Bit for bit: alone, and among others, in another place of the batch."""
    mine = [(1, 1100), (17, 61)]
    alone = make_case((6, 2, 32), torch.float16, mine, seed=3)
    out, lse = attend(ops, alone, 0.1)
    others = draw_lengths(1, 4, 60)
    crowd = make_case((6, 2, 32), torch.float16, others + mine, seed=1, slots=16)
    start = int(crowd.inputs.q_start[len(others)])
    crowd.q[start:] = alone.q
    for i, (_, keys) in enumerate(mine):
        to, source = (
            case.inputs.page_table[case.inputs.slot[at], : -(-keys // 16)].long()
            for case, at in ((crowd, len(others) + i), (alone, i))
        )
        crowd.k[to], crowd.v[to] = alone.k[source], alone.v[source]
    crowd_out, crowd_lse = attend(ops, crowd, 0.1)
    assert torch.equal(crowd_out[start:], out)
    assert torch.equal(crowd_lse[start:], lse)


def test_the_promise_of_decodes_alone_changes_nothing(ops):
    case = make_case((6, 2, 32), torch.float16, [(1, n) for n in (1, 17, 300)])
    want = attend(ops, case, 0.1)
    case.inputs = replace(case.inputs, decode_only=True)
    assert all(torch.equal(a, b) for a, b in zip(attend(ops, case, 0.1), want, strict=True))


def test_more_sequences_than_are_looked_at_together(ops, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", tl.constexpr(4))
    check(ops, make_case((1, 1, 16), torch.float32, [(1 + i % 2, 2 + i % 3) for i in range(9)]), 0.3)


def test_empty_steps(ops):
    case = make_case((2, 1, 16), torch.float32, [(0, 0), (0, 20)])
    none = torch.zeros(0, dtype=torch.int32)
    inputs = replace(case.inputs, q_start=torch.zeros(1, dtype=torch.int32), kv_len=none, slot=none)
    for empty in (case, replace(case, inputs=inputs)):
        out, lse = attend(ops, empty, 0.1)
        assert (out.shape, lse.shape) == ((0, 2, 16), (0, 2))


def test_wild_metadata_stays_inside(ops):
    """Contradictory lengths and pages give some number, and write nothing beyond the step's rows."""
    case = make_case((4, 2, 32), torch.float16, [(1, 40), (20, 30), (1, 3)])
    case.k.nan_to_num_(0), case.v.nan_to_num_(0)
    i = case.inputs
    i.kv_len[:] = torch.tensor([2**31 - 1, 3, -7], dtype=torch.int32)
    i.slot[:] = torch.tensor([-4, 1000, 0], dtype=torch.int32)
    i.page_table[0, 0] = 2**30
    out, lse = attend(ops, case, 0.1)
    assert torch.isfinite(out.float()).all()
    assert torch.isfinite(lse).all()
