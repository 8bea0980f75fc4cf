"""Mixtures of experts by the Triton kernels against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.expert_cases import ROUTINGS, options_of

from batchinfer.ops import Experts, Ops
from batchinfer.ops.reference import ReferenceOps

TRUTH = ReferenceOps(torch.float64)


def make(ops: Ops, widths: tuple[int, ...], width: int, dtype: torch.dtype, **options: Any) -> Experts:
    g = torch.Generator().manual_seed(sum(widths))

    def draw(*shape: int) -> Any:
        return ops.pack_weight((torch.randn(shape, generator=g) * shape[1] ** -0.5).to(dtype))

    gate_up = tuple(draw(2 * inner, width) for inner in widths)
    return Experts(gate_up, tuple(draw(width, inner) for inner in widths), widths, **options)


def mix(ops: Ops, x: torch.Tensor, router: torch.Tensor, experts: Experts, dtype: torch.dtype) -> torch.Tensor:
    out = torch.full(x.shape, torch.nan, dtype=dtype)
    ops.mix_experts(x, router, experts, out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "width", "widths", "top_k", "renormalise", "shared"),
    [
        (1, 64, (32,) * 8, 2, True, False),
        (23, 80, (48,) * 5, 3, False, False),
        (9, 64, (16,) * 3 + (40,), 2, True, True),
        (150, 33, (24,) * 2, 1, False, False),
        (4, 64, (32,), 1, True, False),
        (0, 64, (32,) * 4, 2, True, False),
    ],
)
@pytest.mark.feature("Triton kernels (interpreted)", "mixtures of experts, shared expert too")
def test_against_float64(ops, dtype, tokens, width, widths, top_k, renormalise, shared):
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, width, generator=g).to(dtype)
    router = 2 * torch.randn(tokens, len(widths), generator=g)
    router[: tokens // 3] = 0.5  # ties: the smaller experts are chosen
    options = {"top_k": top_k, "renormalise": renormalise, "shared": shared}
    want = mix(TRUTH, x, router, make(TRUTH, widths, width, dtype, **options), torch.float64)
    experts = make(ops, widths, width, dtype, **options)
    got = mix(ops, x, router, experts, dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 4e-3
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    for i in range(0 if shared else min(tokens, 2)):  # a token alone has the same bits, but for torch's products
        assert torch.equal(mix(ops, x[i : i + 1], router[i : i + 1], experts, dtype)[0], got[i])
    if tokens:
        ops.mix_experts(x, router, experts, x)  # in place
        assert torch.equal(x, got)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.feature(
    "Triton kernels (interpreted)", "mixtures of experts: groups, sigmoids, corrections, biases, the clamped gate"
)
@pytest.mark.hardware("mixtures of experts, routings of GPT-OSS and DeepSeek")
def test_routings_against_float64(ops, routing, biased):
    g = torch.Generator().manual_seed(len(routing))
    options = {"top_k": 5} | options_of(routing, 12, 20, 48, biased, 3)
    if not biased:
        options |= {"shared": True, "shared_gate": False}
    widths = (20,) * 12 + ((32,) if not biased else ())
    x, router = torch.randn(7, 48, generator=g), 2 * torch.randn(7, 12, generator=g)
    router[0] = 0.5  # ties: the smaller experts are chosen, and the smaller groups
    want = mix(TRUTH, x, router, make(TRUTH, widths, 48, torch.float32, **options), torch.float64)
    got = mix(ops, x, router, make(ops, widths, 48, torch.float32, **options), torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_logits_that_are_no_numbers_stay_within_their_rows(ops):
    experts = make(ops, (16,) * 5, 32, torch.float32, top_k=3, renormalise=True)
    g = torch.Generator().manual_seed(1)
    x, router = torch.randn(6, 32, generator=g), torch.randn(6, 5, generator=g)
    want = mix(ops, x, router, experts, torch.float32)
    for i, bad in ((0, torch.nan), (2, -torch.inf), (4, torch.inf)):
        router[i] = bad
    got = mix(ops, x, router, experts, torch.float32)
    assert torch.equal(got[1::2], want[1::2])
