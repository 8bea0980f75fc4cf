"""Packed weights in shared memory are the same bits as in a process's own, and nobody can change them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from ops.test_quantized import FORMATS, quantized

from batchinfer import _ops
from batchinfer.ops.native import NativeOps
from batchinfer.ops.reference import ReferenceOps
from batchinfer.ops.shared import Filling, can_share, mapped

ISAS = _ops.build_info["usable_isas"]
OPS = NativeOps("cpu", 2)


def product(ops: NativeOps, x: torch.Tensor, weight: object, gated: bool) -> torch.Tensor:
    out = torch.empty(len(x), weight.outputs)
    ops.gated_linear(x, weight, out, out) if gated else ops.linear(x, weight, out)
    return out


@pytest.fixture
def descriptors() -> Iterator[list[int]]:
    opened: list[int] = []
    yield opened
    for fd in opened:
        os.close(fd)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_mapped_is_what_was_packed(isa: str, dtype: torch.dtype, descriptors: list[int]) -> None:
    ops = NativeOps("cpu", 2, isa)
    weights = {f"w{n}": (torch.randn(2 * n, 70).to(dtype), n % 2 == 1) for n in (1, 20, 33, 100)}
    table, norm = torch.randn(50, 70).to(dtype), torch.randn(70)
    filling = Filling(ops, 10 << 20)
    filling.put("table", table, packed=False)
    for name, (weight, gated) in weights.items():
        filling.put(name, weight, packed=True, gated=gated)
    filling.put("norm", norm, packed=False)
    descriptors.append(filling.seal())
    found = mapped(descriptors[0], NativeOps("cpu", 1, isa))
    assert torch.equal(found["table"], table)
    assert torch.equal(found["norm"], norm)
    x = torch.randn(9, 70)
    for name, (weight, gated) in weights.items():
        assert torch.equal(product(ops, x, found[name], gated), product(ops, x, ops.pack_weight(weight, gated), gated))


@pytest.mark.parametrize("kind", FORMATS)
def test_codes_are_shared_too(kind: str, descriptors: list[int]) -> None:
    filling, weight = Filling(OPS, 1 << 20), quantized(kind, 40, 64)
    filling.put("w", weight, packed=True)
    descriptors.append(filling.seal())
    x = torch.randn(3, 64)
    found = mapped(descriptors[0], OPS)["w"]
    assert torch.equal(product(OPS, x, found, False), product(OPS, x, OPS.pack_weight(weight), False))


def test_the_mapping_outlives_the_descriptor_and_its_dictionary() -> None:
    filling = Filling(OPS, 1 << 20)
    weight = torch.randn(40, 30)
    filling.put("w", weight, packed=True)
    filling.put("t", weight, packed=False)
    fd = filling.seal()
    found = mapped(fd, OPS)
    os.close(fd)
    packed, table = found["w"], found["t"]
    del found
    x = torch.randn(3, 30)
    assert torch.equal(product(OPS, x, packed, False), product(OPS, x, OPS.pack_weight(weight), False))
    assert torch.equal(table, weight)


def test_nobody_writes_to_what_is_sealed(descriptors: list[int]) -> None:
    filling = Filling(OPS, 1 << 20)
    filling.put("w", torch.ones(4, 4), packed=True)
    fd = filling.seal()
    descriptors.append(fd)
    for attempt in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0), lambda: os.ftruncate(fd, 1 << 30)):
        with pytest.raises(PermissionError):
            attempt()
    with pytest.raises(OSError, match="Operation not permitted"):
        OPS.map_shared(fd, 64, writable=True)


def test_it_takes_what_it_holds(descriptors: list[int]) -> None:
    filling = Filling(OPS, 1 << 40)  # of address space
    filling.put("w", torch.ones(1000, 1000), packed=True)
    descriptors.append(filling.seal())
    assert 4_000_000 <= os.fstat(descriptors[0]).st_size < 4_200_000
    with pytest.raises(ValueError, match="'w' ends at byte 4096000, behind the capacity of 1000000"):
        Filling(OPS, 1_000_000).put("w", torch.ones(1000, 1000), packed=True)


def test_memory_that_is_no_use_is_refused(descriptors: list[int]) -> None:
    unsealed = os.memfd_create("x")
    descriptors.append(unsealed)
    with pytest.raises(ValueError, match="not sealed"):
        mapped(unsealed, OPS)
    filling = Filling(NativeOps("cpu", 1, "generic"), 1 << 20)
    descriptors.append(filling.seal())
    if len(ISAS) > 1:
        with pytest.raises(ValueError, match=f"packed for generic, and this process computes with {ISAS[0]}"):
            mapped(descriptors[1], NativeOps("cpu", 1, ISAS[0]))


def test_who_can_share() -> None:
    assert can_share(OPS)
    assert not can_share(ReferenceOps())
