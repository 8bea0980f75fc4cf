"""Matrices of codes in groups for the tests of the ops."""

from __future__ import annotations

import torch

from batchinfer.ops.grouped import GroupQuantized

KINDS = {
    "int4": (4, 128, False, False),
    "int4 with zeros": (4, 32, True, False),
    "int4 in another order": (4, 64, True, True),
    "int4, groups of 48": (4, 48, True, False),
    "int8 of outputs": (8, 0, False, False),
    "int8 with zeros": (8, 32, True, False),
    "float8 of outputs": (0, 0, False, False),
    "float8 in blocks": (0, 128, False, False),
}
"""Name: (bits, 0: float8; group, 0: all; zeros; order)."""


def draw(kind: str, outputs: int, depth: int, seed: int = 0) -> GroupQuantized:
    """Weights of about 1, scales as files have them."""
    bits, group, with_zeros, with_order = KINDS[kind]
    g = torch.Generator().manual_seed(seed)
    group = group or depth
    groups = -(-depth // group)
    scales = torch.rand(outputs, groups, generator=g) + 0.5
    order = torch.randperm(depth, generator=g) if with_order else None
    if not bits:
        codes = (torch.randn(outputs, depth, generator=g) * 10).to(torch.float8_e4m3fn)
        return GroupQuantized(codes, scales / 10, group, order=order)
    codes = torch.randint(0, 2**bits, (outputs, depth), generator=g, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (outputs, groups), generator=g, dtype=torch.uint8) if with_zeros else None
    return GroupQuantized(codes, (scales / 2 ** (bits - 1)).half(), group, zeros, bits, order)
