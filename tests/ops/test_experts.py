"""Mixtures of experts: the compiled backend against the reference in float64, and independence of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.expert_cases import ROUTINGS, options_of
from torch import Tensor

from batchinfer.ops import Experts, Ops
from batchinfer.ops.native import NativeOps
from batchinfer.ops.reference import ReferenceOps

NATIVE, EXACT = NativeOps("cpu", 2), ReferenceOps(torch.float64)
WIDTH = 24


def make(ops: Ops, widths: tuple[int, ...], **options: Any) -> Experts:
    g = torch.Generator().manual_seed(sum(widths))
    gate_up = tuple(ops.pack_weight(torch.randn(2 * width, WIDTH, generator=g) / 5) for width in widths)
    down = tuple(ops.pack_weight(torch.randn(WIDTH, width, generator=g) / 5) for width in widths)
    return Experts(gate_up, down, widths, **options)


def mix(ops: Ops, x: Tensor, router: Tensor, experts: Experts, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full(x.shape, torch.nan, dtype=dtype)
    ops.mix_experts(x, router, experts, out)
    return out


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    count, shared = draw(st.integers(1, 9)), draw(st.booleans())
    widths = (16,) * count + ((40,) if shared else ())
    top_k = draw(st.integers(1, count))
    return {"widths": widths, "top_k": top_k, "renormalise": draw(st.booleans()), "shared": shared}


@pytest.mark.feature("CPU kernels", "mixtures of experts, shared expert too, grouped by expert")
@given(case=cases(), tokens=st.integers(0, 30), seed=st.integers(0, 2**31))
def test_against_float64(case: dict[str, Any], tokens: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, WIDTH, generator=g)
    router = 2 * torch.randn(tokens, len(case["widths"]), generator=g)
    want = mix(EXACT, x, router, make(EXACT, **case), torch.float64)
    got = mix(NATIVE, x, router, make(NATIVE, **case))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    for i in range(min(tokens, 3)):  # a token alone has the same bits
        assert torch.equal(mix(NATIVE, x[i : i + 1], router[i : i + 1], make(NATIVE, **case))[0], got[i])


@pytest.mark.feature("CPU kernels", "mixtures of experts: groups, sigmoids, corrections, biases, the clamped gate")
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("shared", ["", "whole", "weighed"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.hardware("mixtures of experts, routings of GPT-OSS and DeepSeek")
def test_routings_against_float64(routing: str, shared: str, biased: bool) -> None:
    g = torch.Generator().manual_seed(len(routing))
    case: dict[str, Any] = {"widths": (16,) * 12 + ((40,) if shared else ()), "top_k": 5, "shared": bool(shared)}
    case |= {"shared_gate": shared == "weighed"} | options_of(routing, 12, 16, WIDTH, biased, 3)
    exact, native = make(EXACT, **case), make(NATIVE, **case)
    x, router = torch.randn(23, WIDTH, generator=g), 2 * torch.randn(23, exact.logits, generator=g)
    want, got = mix(EXACT, x, router, exact, torch.float64), mix(NATIVE, x, router, native)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    for i in (0, 7, 22):  # a token alone has the same bits
        assert torch.equal(mix(NATIVE, x[i : i + 1], router[i : i + 1], native)[0], got[i])


@pytest.mark.parametrize("ops", [NATIVE, EXACT], ids=["native", "reference"])
def test_the_smaller_of_equal_experts_is_chosen(ops: Ops) -> None:
    x, router = torch.ones(1, WIDTH), torch.zeros(1, 3)
    experts = make(ops, (8, 8, 8), top_k=1, renormalise=True)
    first = make(ops, (8, 8, 8), top_k=1, renormalise=True)
    alone = Experts(first.gate_up[:1], first.down[:1], (8,), 1, True)
    got, want = mix(ops, x, router, experts), mix(ops, x, router[:, :1].contiguous(), alone)
    torch.testing.assert_close(got, want)


def test_out_may_be_x() -> None:
    g = torch.Generator().manual_seed(0)
    x, router = torch.randn(5, WIDTH, generator=g), torch.randn(5, 4, generator=g)
    experts = make(NATIVE, (8, 8, 8, 8), top_k=2, renormalise=False)
    want = mix(NATIVE, x, router, experts)
    NATIVE.mix_experts(x, router, experts, x)
    assert torch.equal(x, want)


def test_a_router_of_another_width_is_named() -> None:
    experts = make(NATIVE, (8, 8), top_k=1, renormalise=False)
    with pytest.raises(ValueError, match=r"router has shape \(1, 3\): \(1, 2\) is needed"):
        mix(NATIVE, torch.ones(1, WIDTH), torch.zeros(1, 3), experts)
