"""How large the kernels' blocks are. Pure: no torch, no device.

Bounds: 64 KiB of shared memory on AMD GPUs (99 on NVIDIA's smallest), and no spills; tests/ops/triton_targets.py
compiles the choices and holds them to both.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """``rows`` of queries and ``keys`` taken at a time; ``warps`` and pipeline ``stages`` of a program."""

    rows: int
    keys: int
    warps: int
    stages: int


def power_of_2(n: int) -> int:
    """The smallest power of two that is not less than ``n`` >= 1."""
    return 1 << (n - 1).bit_length()


def head_block(width: int) -> int:
    """A head's width as the matrix units take it."""
    return max(16, power_of_2(width))


def attention_blocks(decode: bool, width: int, itemsize: int, rdna: bool = False) -> Blocks:
    """For heads of ``width`` elements of ``itemsize`` bytes. A decoding sequence has few rows, so that 16, the least
    that a matrix unit takes, are enough. float32 has no matrix unit here: its tiles live in registers. On AMD's RDNA
    GPUs (waves of 32) a second pipeline stage spills up to 560 bytes a thread, where CDNA and NVIDIA spill none."""
    wide = head_block(width)
    if itemsize == 4:
        return Blocks(16, 32 if wide <= 128 else 16, 4, 1)
    if decode:
        return Blocks(16, 64 if wide <= 128 and not rdna else 32, 4, 1 if rdna else 2)
    return Blocks(64, 64 if wide <= 64 and not rdna else 32, 8 if rdna else 4, 1 if rdna else 2)


def row_block(width: int) -> int:
    """Elements of a row that a program takes, where rows can be cut anywhere."""
    return min(1024, power_of_2(width))


def norm_warps(width: int) -> int:
    """Warps for a row in registers: up to 64 elements a thread of 32."""
    return min(16, max(1, power_of_2(width) // 1024))


def heads_together(width: int) -> int:
    """Heads of a token that one program rotates: 1,024 elements or so."""
    return max(1, 1024 // power_of_2(width))


@dataclass(frozen=True)
class ProductBlocks:
    """``rows`` by ``columns`` of a product's result, ``depth`` of its sum at a time; ``warps`` and pipeline ``stages``
    of a program."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory of a program whose right-hand side are two matrices."""
        return (self.rows + 2 * self.columns) * self.depth * itemsize * self.stages


FEW = (ProductBlocks(16, 64, 128, 4, 2), ProductBlocks(16, 64, 64, 4, 2))
SOME = (ProductBlocks(32, 64, 128, 4, 2), ProductBlocks(32, 64, 64, 4, 2))
MORE = (ProductBlocks(64, 64, 64, 4, 3), ProductBlocks(64, 64, 64, 4, 2))
MANY = (ProductBlocks(128, 128, 64, 8, 3), *MORE)
"""For experts with so many tokens, the best first: on an H100 (128 experts, 2,048 x 768, 8 a token) 86 and 93 % of the
time that reading the weights takes with 16 and 64 tokens in the step, 90 and 74 % with 256 and 1,024, and 46 % of the
matrix units' with 8,192."""


def expert_blocks(tokens: int, itemsize: int, shared: int, rdna: bool = False) -> ProductBlocks:
    """For experts with ``tokens`` tokens each on average, where a program has ``shared`` bytes of shared memory."""
    if itemsize == 4:
        return ProductBlocks(16, 32, 32, 4, 1)
    if rdna:
        return ProductBlocks(16 if tokens <= 16 else 32, 32, 32, 4, 1)
    choices = FEW if tokens <= 12 else SOME if tokens <= 48 else MORE if tokens < 192 else MANY
    return next((blocks for blocks in choices if blocks.shared(itemsize) <= shared), choices[-1])


@dataclass(frozen=True)
class GroupBlocks:
    """``rows`` by ``columns`` of the result of a product with codes; ``warps`` and pipeline ``stages`` of a program."""

    rows: int
    columns: int
    warps: int
    stages: int


def group_blocks(rows: int, itemsize: int, rdna: bool = False) -> GroupBlocks:
    """For so many rows of activations of ``itemsize`` bytes."""
    if itemsize == 4:
        return GroupBlocks(16, 32, 4, 1)
    if rdna:
        return GroupBlocks(16 if rows <= 16 else 32, 32, 4, 1)
    if rows <= 16:
        return GroupBlocks(16, 64, 4, 4)
    return GroupBlocks(32 if rows <= 32 else 64, 64, 4, 3)


def splits(tiles: int, deep: int, multiprocessors: int) -> int:
    """Parts of K, ``deep`` blocks of codes, so that ``tiles`` of a result keep a device busy: two programs for each
    multiprocessor, with four blocks at least."""
    return max(1, min(-(-2 * multiprocessors // max(tiles, 1)), deep // 4, 16))
