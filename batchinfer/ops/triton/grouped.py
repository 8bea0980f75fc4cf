"""Launches the kernels of groups.py, for any backend whose memory torch can reach on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from batchinfer.ops.grouped import Grouped
from batchinfer.ops.triton import groups as kernels
from batchinfer.ops.triton.blocks import group_blocks, row_block, splits

HALF = 64
"""Codes of a tile along K, where groups are as large: two loads of 16 bytes for each of four threads."""

LEAST = 16
"""Of a tile, as the matrix units take it."""

FROM_DENSE = 128
"""Rows from which on weights are dequantised first and multiplied by the vendor's library: to write and read 16 bits
takes an H100 as long as 500 products with a weight (4 bytes at 3 TB/s, 800 TFLOPS), and the kernel multiplies at a
fraction of that rate."""

SCRATCH = 64 << 20
"""Bytes of weights that are dequantised at a time."""


@dataclass(frozen=True)
class PackedGroups:
    """A Grouped [N, K] on the device: codes as groups.py has them, ``scales`` [G, N], ``zeros`` uint8 [G, N] or None,
    ``group`` of K, the padding of codes too where there is one, ``half`` codes of a tile."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    group: int
    half: int
    bits: int
    middle: int
    float8: bool
    order: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.scales, self.zeros, self.order) if t is not None)

    @property
    def constants(self) -> dict[str, Any]:
        """Of the kernels."""
        return {
            "OUTPUTS": self.shape[0],
            "DEPTH": self.shape[1],
            "STRIDE": self.codes.shape[1],
            "GROUP": self.group,
            "BITS": self.bits,
            "FLOAT8": self.float8,
            "HALF": self.half,
        }


def pack(weight: Grouped, device: torch.device) -> PackedGroups:
    """Raises ValueError: groups that are not whole tiles."""
    outputs, depth = weight.shape
    half = HALF
    if weight.scales.shape[1] > 1:
        half = min(HALF, weight.group & -weight.group)
        if half < LEAST:
            raise ValueError(f"weight has groups of {weight.group}: multiples of {LEAST} are possible")
    codes = weight.codes.view(torch.uint8)
    if weight.bits == 4:
        blocks = torch.nn.functional.pad(codes, (0, -depth % (2 * half))).unflatten(1, (-1, 2, half))
        codes = (blocks[:, :, 0] | blocks[:, :, 1] << 4).flatten(1)
    return PackedGroups(
        codes.to(device).contiguous(),
        weight.scales.T.to(device).contiguous(),
        None if weight.zeros is None else weight.zeros.T.to(device).contiguous(),
        (outputs, depth),
        weight.group if weight.scales.shape[1] > 1 else depth + 2 * half,
        half,
        weight.bits,
        weight.middle,
        weight.codes.dtype is torch.float8_e4m3fn,
        None if weight.order is None else weight.order.to(device),
    )


Dense = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]
"""out = x @ weight.T + bias, by the vendor's library."""


class Groups:
    """``multiprocessors`` of the device."""

    def __init__(self, multiprocessors: int, rdna: bool):
        self._multiprocessors, self._rdna = multiprocessors, rdna

    def linear(
        self,
        launch: Callable[..., None],
        dense: Dense,
        x: Tensor,
        weight: PackedGroups,
        out: Tensor,
        bias: Tensor | None,
    ) -> None:
        """``Ops.linear`` by ``launch(kernel, grid, arguments ..., options=...)``."""
        if weight.order is not None:
            x = x.index_select(1, weight.order)
        if len(x) < FROM_DENSE:
            self._multiply(launch, x, weight, out, bias)
            return
        outputs, depth = weight.shape
        step = max(1, SCRATCH // (depth * x.element_size()))
        scratch = x.new_empty(min(step, outputs), depth)
        for first in range(0, outputs, step):
            count = min(step, outputs - first)
            self.dequantise(launch, weight, first, scratch[:count])
            here = slice(first, first + count)
            dense(x, scratch[:count], out[:, here], None if bias is None else bias[here])

    def dequantise(self, launch: Callable[..., None], weight: PackedGroups, first: int, out: Tensor) -> None:
        """out [n, K] = the weights of the outputs from ``first`` on."""
        arrays = (weight.codes, weight.scales, weight.zeros)
        grid = (cdiv(len(out), 32), cdiv(weight.codes.shape[1], weight.half))
        launch(
            kernels.group_weights, grid, *arrays, out, weight.middle, first, len(out), **weight.constants, COLUMNS=32
        )

    def _multiply(
        self, launch: Callable[..., None], x: Tensor, weight: PackedGroups, out: Tensor, bias: Tensor | None
    ) -> None:
        rows, outputs = out.shape
        blocks = group_blocks(rows, x.element_size(), self._rdna)
        tiles = cdiv(rows, blocks.rows), cdiv(outputs, blocks.columns)
        deep = cdiv(weight.codes.shape[1], weight.half)
        parts = splits(tiles[0] * tiles[1], deep, self._multiprocessors)
        to = out if parts == 1 else x.new_empty(parts, rows, outputs, dtype=torch.float32)
        launch(
            kernels.group_products,
            (*tiles, parts),
            x,
            weight.codes,
            weight.scales,
            weight.zeros,
            bias if parts == 1 else None,
            to,
            weight.middle,
            rows,
            **weight.constants,
            SPLITS=parts,
            ROWS=blocks.rows,
            COLUMNS=blocks.columns,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        if parts > 1:
            block = row_block(outputs)
            grid = (rows, cdiv(outputs, block))
            launch(kernels.add_parts, grid, to, bias, out, rows, OUTPUTS=outputs, SPLITS=parts, BLOCK=block)
