"""Attention sinks and copies of views: the compiled backend and the reference."""

from __future__ import annotations

import pytest
import torch

from batchinfer.ops import Ops
from batchinfer.ops.native import NativeOps
from batchinfer.ops.reference import ReferenceOps

NATIVE, EXACT = NativeOps("cpu", 2), ReferenceOps(torch.float64)
EACH = pytest.mark.parametrize("ops", [NATIVE, ReferenceOps()], ids=["native", "reference"])


@EACH
@pytest.mark.feature("CPU kernels", "attention sinks: a score in every sum of a softmax")
def test_a_sink_is_a_key_without_a_value(ops: Ops) -> None:
    torch.manual_seed(0)
    scores, values = torch.randn(50, 3, 9, dtype=torch.float64), torch.randn(9, 8, dtype=torch.float64)
    scores[7] -= 60
    scores[8] += 60
    sinks = torch.tensor([-2.0, 0.5, 40.0], dtype=torch.float64)
    want = torch.cat((scores, sinks.expand(50, 3).unsqueeze(2)), 2).softmax(2)[..., :-1] @ values
    attn, lse = (scores.softmax(2) @ values).float(), scores.logsumexp(2).float()
    alone = attn[7:8].clone()
    ops.sink(attn, lse, sinks.float())
    torch.testing.assert_close(attn.double(), want, rtol=1e-5, atol=1e-7)
    ops.sink(alone, lse[7:8].clone(), sinks.float())
    assert torch.equal(alone[0], attn[7])


def test_no_keys_and_no_sink() -> None:
    attn = torch.ones(1, 2, 4)
    NATIVE.sink(attn, torch.tensor([[-torch.inf, 3.0]]), torch.tensor([1.0, -torch.inf]))
    assert attn[0, :, 0].tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"sinks has shape \(3,\): \(2,\) is needed"):
        NATIVE.sink(attn, torch.zeros(1, 2), torch.zeros(3))


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_of_views(ops: Ops, dtype: torch.dtype) -> None:
    x, out = torch.randn(5, 3, 8).to(dtype), torch.zeros(5, 3, 8, dtype=dtype)
    ops.copy(x[..., 1::2], out[:, :, 2:6])
    assert torch.equal(out[:, :, 2:6], x[..., 1::2])
    assert not out[:, :, :2].any()
    ops.copy(x[:, :1].expand(-1, 3, -1), out)
    assert torch.equal(out[:, 2], x[:, 0])


def test_a_copy_does_not_convert() -> None:
    with pytest.raises(ValueError, match=r"out has dtype torch\.bfloat16: torch\.float32 is needed"):
        NATIVE.copy(torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16))
