"""Launches the kernels of groups.py, for any backend whose memory torch can reach on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from batchinfer.ops.grouped import GroupQuantized
from batchinfer.ops.triton import groups as kernels
from batchinfer.ops.triton.blocks import group_blocks, row_block, splits

HALF = 64
"""Codes of a tile along K, where groups are as large: two loads of 16 bytes for each of four threads."""

LEAST = 16
"""Of a tile, as the matrix units take it."""

FROM_DENSE = 200
"""Rows from which on weights are dequantised first and multiplied by the vendor's library. 4,096 to 28,672 on an H100,
kernel and library: 192 rows int4 220 and 220 us, int8 195 and 243; 256 rows 275 and 232, 245 and 254."""

SCRATCH = 64 << 20
"""Bytes of weights that are dequantised at a time."""


@dataclass(frozen=True)
class PackedGroups:
    """A GroupQuantized [N, K] on the device: codes as groups.py has them, ``scales`` [G, N], ``zeros`` uint8 [G, N] or
    None, ``group`` of K, the padding of codes too where there is one, ``half`` codes of a tile."""

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
    def rows_of_float8(self) -> bool:
        """Whether the library's products take it: a scale float32 for each output, and sizes that its tiles need."""
        single = self.scales.shape[0] == 1 and self.scales.dtype is torch.float32
        return self.float8 and single and self.shape[0] % 16 == 0 and self.shape[1] % 16 == 0

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


def pack(weight: GroupQuantized, device: torch.device) -> PackedGroups:
    """Raises ValueError: groups that are not whole tiles."""
    outputs, depth = weight.shape
    half = HALF
    if weight.scales.shape[1] > 1:
        half = min(HALF, weight.group & -weight.group)
        if half < LEAST:
            raise ValueError(f"weight has groups of {weight.group}: multiples of {LEAST} are possible")
    codes, scales = weight.codes.view(torch.uint8), weight.scales.T
    if weight.codes.dtype is torch.float8_e4m3fn:
        scales = scales.float()
    if weight.bits == 4:
        blocks = torch.nn.functional.pad(codes, (0, -depth % (2 * half))).unflatten(1, (-1, 2, half))
        codes = (blocks[:, :, 0] | blocks[:, :, 1] << 4).flatten(1)
    return PackedGroups(
        codes.to(device).contiguous(),
        scales.to(device).contiguous(),
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


def multiplies_float8(device: torch.device) -> bool:
    """Whether torch has a product of float8 matrices with a scale for each row of both, and ``device`` the units for
    it: NVIDIA's, from compute capability 8.9 on."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    codes, scales = torch.zeros(16, 16, device=device), torch.ones(16, 1, device=device)
    codes = codes.to(torch.float8_e4m3fn)
    try:
        _scaled_product(codes, scales, codes, scales.T, scales.new_empty(16, 16, dtype=torch.bfloat16), None)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


def _scaled_product(
    codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, out: Tensor, bias: Tensor | None
) -> None:
    torch._scaled_mm(codes, weight.t(), scales, weight_scales, bias, out_dtype=out.dtype, out=out)


class Groups:
    """``multiprocessors`` of the device; ``float8``: what :func:`multiplies_float8` says."""

    def __init__(self, multiprocessors: int, rdna: bool, float8: bool = False):
        self._multiprocessors, self._rdna, self._float8 = multiprocessors, rdna, float8

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
        if self._float8 and weight.rows_of_float8 and x.dtype is torch.bfloat16:
            self._multiply_float8(launch, x, weight, out, bias)
            return
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

    def _multiply_float8(
        self, launch: Callable[..., None], x: Tensor, weight: PackedGroups, out: Tensor, bias: Tensor | None
    ) -> None:
        """With activations that become float8 too, which twice as many multiply at a time."""
        codes, scales = x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(len(x), 1, dtype=torch.float32)
        self.encode(launch, x, codes, scales)
        to = out if out.dtype is x.dtype else x.new_empty(out.shape)
        matrix = weight.codes.view(torch.float8_e4m3fn)
        _scaled_product(codes, scales, matrix, weight.scales, to, None if bias is None else bias.to(x.dtype))
        if to is not out:
            out.copy_(to)

    def encode(self, launch: Callable[..., None], x: Tensor, codes: Tensor, scales: Tensor) -> None:
        """x [T, K] as float8 ``codes`` with a scale float32 [T, 1] for each row."""
        depth, to = x.shape[1], codes.view(torch.uint8)
        launch(kernels.encode_rows, (len(x),), x, to, scales, DEPTH=depth, BLOCK=row_block(depth), num_warps=4)

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
