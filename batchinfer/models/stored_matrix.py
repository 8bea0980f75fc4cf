"""From the stored tensors of a quantised checkpoint to matrices: which there must be, and what they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from batchinfer.models.layout import TABLES, Layout, Part
from batchinfer.models.scheme import AWQ_ORDER, FLOATS, UNUSED, Scheme
from batchinfer.ops.grouped import GroupQuantized

WEIGHT = "weight"


def quantised_layout(plan: Layout, scheme: Scheme, stored: Mapping[str, str]) -> Layout:
    """``plan`` with the components of each matrix that is quantised in the files, in the place of the matrix.
    ``stored``: the dtype of each stored tensor by its name."""
    parts, ignored = dict(plan.parts), set(plan.ignored)

    def dtype(name: str) -> str | None:
        return stored.get(name, stored.get(name.removeprefix(plan.root)))

    for name, part in plan.parts.items():
        if len(part.shape) != 2 or part.target in TABLES or dtype(name) in FLOATS:
            continue
        base = name.removesuffix(WEIGHT)
        found = {base + suffix: component for suffix, component in scheme.components(*part.shape).items()}
        if not any(dtype(one) for one in found):
            continue  # said to be missing, under its plain name
        del parts[name]
        order = "" if part.order == "transposed" else part.order  # codes always have K in their own direction
        for one, component in found.items():
            if component.needed or dtype(one):
                parts[one] = dataclasses.replace(part, order=order, component=component)
        ignored.update(base + suffix for suffix in UNUSED)
    return dataclasses.replace(plan, parts=parts, ignored=frozenset(ignored))


class Gathered:
    """The components of a matrix, while they come."""

    def __init__(self, scheme: Scheme, part: Part, expected: int):
        self._scheme, self._part, self._missing = scheme, part, expected
        self._tensors: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}

    def put(self, holds: str, name: str, shape: tuple[int, ...], row: int, values: Tensor) -> bool:
        """Rows of a component from ``row`` on. Whether the matrix is complete."""
        if holds not in self._tensors:
            self._tensors[holds], self._names[holds] = torch.empty(shape, dtype=values.dtype), name
        rows = self._tensors[holds].view(shape or (1,))
        end = row + len(values)
        # Copies between tensors of 8-bit floats are not everywhere; their bytes are.
        _bytes(rows)[row:end].copy_(_bytes(values))
        self._missing -= end == len(rows)
        return self._missing == 0

    def matrix(self) -> GroupQuantized:
        """Once it is complete. Raises ValueError: a scale that is not finite, a group of another size."""
        outputs, depth = self._part.shape
        scheme, got = self._scheme, self._tensors
        kind = scheme.kind
        codes, scales, zeros = got["codes"], got["scales"], got.get("zeros")
        if kind == "gptq":
            codes, scales = unpacked(codes.T.contiguous(), scheme.bits)[:, :depth], scales.T
        elif kind == "awq":
            codes, scales = _awq(codes).T, scales.T
        elif kind == "packed":
            codes = unpacked(codes, scheme.bits)[:, :depth]
        elif kind == "int8":
            codes = codes.view(torch.uint8) ^ 0x80
        if not scales.isfinite().all() or (kind == "float8" and codes.float().isnan().any()):
            raise ValueError(f"{self._names['scales']!r} or its codes hold a number that is not finite")
        groups = scheme.groups(depth)
        if scheme.rows:
            scales = scales.repeat_interleave(scheme.rows, 0)[:outputs]
        elif scales.numel() in (1, outputs) and groups == 1:
            scales = scales.reshape(-1, 1).expand(outputs, 1)
        if zeros is not None:
            zeros = self._zeros(zeros, outputs, groups)
        order = None
        if "order" in got:
            order = _order(got["order"].long(), scheme.group or depth, self._names["order"])
        if order is not None:
            codes = codes[:, order]
        return GroupQuantized(codes.contiguous(), scales.contiguous(), scheme.group or depth, zeros, scheme.bits, order)

    def _zeros(self, stored: Tensor, outputs: int, groups: int) -> Tensor | None:
        """uint8 [outputs, groups], None where all are in the middle."""
        scheme = self._scheme
        if scheme.kind == "awq":
            zeros = _awq(stored).T
        elif scheme.kind == "gptq":
            # With the offset a zero of 0 was stored as -1, which is the largest number of its bits.
            zeros = (unpacked(stored, scheme.bits)[:, :outputs].T + scheme.zero_offset) & (1 << scheme.bits) - 1
        elif scheme.kind == "packed":
            zeros = unpacked(stored.T.contiguous(), scheme.bits)[:, :outputs].T
        else:
            zeros = (stored.view(torch.uint8) ^ 0x80).reshape(-1, groups).expand(outputs, groups)
        return None if (zeros == 1 << scheme.bits - 1).all() else zeros.contiguous()


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [R, C] -> uint8 [R, C * 32 / bits], 4 or 8 bits each, the lowest of a word first."""
    data = words.contiguous().view(torch.uint8)
    return data if bits == 8 else torch.stack((data & 15, data >> 4), dim=-1).flatten(1)


def _awq(words: Tensor) -> Tensor:
    """int32 [R, C] -> uint8 [R, 8C]."""
    places = [AWQ_ORDER.index(column) for column in range(len(AWQ_ORDER))]
    return unpacked(words, 4).unflatten(1, (-1, len(places)))[..., places].flatten(1)


def _order(group: Tensor, size: int, name: str) -> Tensor | None:
    """The columns group by group, from each one's group; None where they are so already."""
    wanted = torch.arange(len(group)) // size
    if torch.equal(group, wanted):
        return None
    order = group.argsort(stable=True)
    if not torch.equal(group[order], wanted):
        raise ValueError(f"{name!r} makes groups of another size than {size}")
    return order


def _bytes(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.element_size() == 1 else t
