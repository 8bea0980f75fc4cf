"""Matrices in the formats of quantised checkpoints: codes in groups along K, each with a scale and maybe a zero.

The codes are of the weights alone: a product with such a matrix is that with the weights they stand for. Backends keep
the codes, or compute with the dense weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.ops.quantized import Quantized

SLICE = 1024
"""Rows that are dequantised at a time: what is computed in float32 is several times as large as the codes."""

BLOCK = 32
"""Weights with a scale of their own in the formats that CPUs compute with."""


@dataclass(frozen=True)
class GroupQuantized:
    """A matrix [N, K]: weight = scale * (code - zero), the scale and the zero those of the weight's group, ``group`` of
    which follow one another along K (the last one may be shorter).

    ``codes`` [N, K], uint8 below 2**``bits`` (4 or 8) or float8_e4m3fn; ``scales`` [N, G] of a float dtype; ``zeros``
    uint8 [N, G], None for 2**(bits - 1), or for 0 with float8. ``order`` int64 [K]: column k of the codes is of column
    order[k] of the matrix (GPTQ with desc_act); None: of column k.
    """

    codes: Tensor
    scales: Tensor
    group: int
    zeros: Tensor | None = None
    bits: int = 8
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.codes.shape)

    @property
    def middle(self) -> int:
        """The code of 0 without zeros."""
        return 0 if self.codes.dtype is torch.float8_e4m3fn else 1 << self.bits - 1

    def chosen(self, rows: Sequence[int]) -> GroupQuantized:
        """The matrix of these rows alone."""
        rows = list(rows)
        zeros = None if self.zeros is None else self.zeros[rows]
        # Indexing takes no dtype of 8 bits but the integers.
        codes = self.codes.view(torch.uint8)[rows].view(self.codes.dtype)
        return GroupQuantized(codes, self.scales[rows], self.group, zeros, self.bits, self.order)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weights that the codes stand for, computed in float32 (or in ``dtype``, if that is longer)."""
        out = torch.empty(self.shape, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        for begin in range(0, len(out), SLICE):
            rows = slice(begin, begin + SLICE)
            zeros = self.middle if self.zeros is None else self._wide(self.zeros[rows].to(wide))
            values = (self.codes[rows].to(wide) - zeros) * self._wide(self.scales[rows].to(wide))
            if self.order is None:
                out[rows] = values
            else:
                out[rows, self.order] = values.to(dtype)
        return out

    def blocks(self) -> Quantized | None:
        """The same in a format with whose codes CPUs compute, rounding activations to codes too; None where there is
        none: float8, an order of columns, or scales that float16 does not hold. Minima other than zero times a power of
        two are rounded to float16, by 2**-11 of themselves, as those of GGUF's K formats are."""
        depth = self.shape[1]
        if self.order is not None or self.codes.dtype is not torch.uint8:
            return None
        if self.bits == 8 and self.zeros is None and self.scales.shape[1] == 1:
            return Quantized(self.codes, self.scales[:, 0].float())
        if self.group % BLOCK or depth % BLOCK:
            return None
        scales = self.scales.half()
        zeros = self.middle if self.zeros is None else self.zeros.float()
        minima = (-zeros * self.scales.float()).half()
        if not torch.equal(scales.float(), self.scales.float()) or not minima.isfinite().all():
            return None
        short = min(self.group, depth) // BLOCK
        wide = [values.repeat_interleave(short, 1)[:, : depth // BLOCK].contiguous() for values in (scales, minima)]
        return Quantized(self.codes, *wide, self.bits)

    def _wide(self, values: Tensor) -> Tensor:
        """[N, G] -> [N, K]."""
        return values.repeat_interleave(self.group, 1)[:, : self.shape[1]]


def stacked(parts: Sequence[GroupQuantized]) -> GroupQuantized | None:
    """One above the other; None where they have different groups or orders of columns."""
    first = parts[0]
    for one in parts[1:]:
        same = one.order is first.order or (
            one.order is not None and first.order is not None and torch.equal(one.order, first.order)
        )
        if not same or (one.group, one.bits, one.codes.dtype) != (first.group, first.bits, first.codes.dtype):
            return None
    middle, zeros = torch.full((1, 1), first.middle, dtype=torch.uint8), None
    if any(one.zeros is not None for one in parts):
        zeros = torch.cat([middle.expand(one.scales.shape) if one.zeros is None else one.zeros for one in parts])
    codes = torch.cat([one.codes.view(torch.uint8) for one in parts]).view(first.codes.dtype)
    return GroupQuantized(codes, torch.cat([one.scales for one in parts]), first.group, zeros, first.bits, first.order)
