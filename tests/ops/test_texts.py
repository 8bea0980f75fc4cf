"""Attention of whole texts: every backend's against the reference in higher precision."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from batchinfer.ops import texts
from batchinfer.ops.reference import ReferenceOps
from batchinfer.ops.texts import TextAttention

LENGTHS = [[1], [5], [3, 1, 40, 7], [129, 64, 2]]


def inputs(lengths: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return torch.randn(starts[-1], 3, 4, 16, generator=generator).to(dtype), starts


@pytest.mark.feature("CPU kernels", "attention of whole texts, for encoders (torch's fused kernels, on every device)")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("reach", [None, 0, 3, 50])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_texts_are_those_of_the_reference(
    lengths: list[int], reach: int | None, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "QUERIES", 32)
    qkv, starts = inputs(lengths, dtype)
    expected = torch.empty(qkv[:, 0].shape, dtype=torch.float64)
    ReferenceOps(torch.float64).attend_texts(qkv, starts, 0.3, expected, reach)
    out = torch.full(qkv[:, 0].shape, torch.nan, dtype=dtype)
    TextAttention().attend_texts(qkv, starts, 0.3, out, reach)
    assert (out.double() - expected).abs().max() < bound
    for begin, end in pairwise(starts):  # the others do not matter
        alone = torch.empty_like(out[begin:end])
        TextAttention().attend_texts(qkv[begin:end], [0, end - begin], 0.3, alone, reach)
        assert torch.equal(alone, out[begin:end])


@pytest.mark.parametrize("reach", [None, 2])
def test_the_reference_sees_all_of_a_text_or_of_what_is_near_and_nothing_else(reach: int | None) -> None:
    qkv, starts = inputs([6, 3], torch.float64)
    out = torch.empty(qkv[:, 0].shape, dtype=torch.float64)
    ReferenceOps(torch.float64).attend_texts(qkv, starts, 0.5, out, reach)
    for begin, end in pairwise(starts):
        for head in range(4):
            q, k, v = qkv[begin:end, :, head].unbind(1)
            weights = torch.tensor([[0.5 * float(a @ b) for b in k] for a in q], dtype=torch.float64).exp()
            for i, j in product(range(end - begin), repeat=2):
                weights[i, j] *= reach is None or abs(i - j) <= reach
            torch.testing.assert_close(out[begin:end, head], weights / weights.sum(1, keepdim=True) @ v)


def test_shapes_outside_the_contract() -> None:
    qkv = torch.zeros(4, 3, 2, 8)
    for wrong in (torch.zeros(4, 2, 9), torch.zeros(3, 2, 8), torch.zeros(4, 2, 8, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="must be"):
            TextAttention().attend_texts(qkv, [0, 4], 1.0, wrong)
