"""Matrix products of the compiled backend: weights are packed once, and may lie in memory that processes share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchinfer.ops.native_checks import DTYPES, address, check, shape_of
from batchinfer.ops.quantized import Quantized

if TYPE_CHECKING:
    from batchinfer._ops import PackedWeight, SharedMemory

    Place = tuple[SharedMemory, int]
    """A mapped memory, and an offset in it in bytes."""

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "blocks8": 3, "blocks4": 4, "short_blocks8": 5}
"""Of packed weights, with their number in csrc/cpu/kernels/gemm.h."""


def format_of(weight: Tensor | Quantized) -> str:
    """The format in which a weight is packed. ValueError where there is none for it."""
    if isinstance(weight, Tensor):
        check("weight", weight, None, shape_of("weight", weight, 2))
        return str(weight.dtype).removeprefix("torch.")
    formats = {(8, 32): "blocks8", (4, 32): "blocks4", (8, 16): "short_blocks8"}
    found = "int8" if weight.minima is None else formats.get((weight.bits, weight.block))
    if found is None:
        raise ValueError(f"weight has codes of {weight.bits} bits in blocks of {weight.block}: {formats} are possible")
    return found


class NativeLinear:
    """``linear`` and ``gated_linear`` of :class:`batchinfer.ops.native.NativeOps`, and what they read."""

    _cpu: Any

    def pack_weight(self, weight: Tensor | Quantized, gated: bool = False, place: Place | None = None) -> PackedWeight:
        """``place``: where the packed weight is to lie, else in memory of its own."""
        kind = format_of(weight)
        outputs, depth = weight.shape
        if gated and outputs % 2:
            raise ValueError(f"weight has shape {tuple(weight.shape)}: a gated one needs an even number of rows")
        memory, offset = place or (None, 0)
        arrays = _arrays(weight)
        return self._cpu.pack_weight(*map(address, arrays), FORMATS[kind], outputs, depth, gated, memory, offset)

    def packed_bytes(self, shape: tuple[int, ...], kind: str, gated: bool) -> int:
        """Of a packed weight of that shape and format."""
        return self._cpu.packed_bytes(FORMATS[kind], *shape, gated)

    def packed_weight(self, shape: tuple[int, ...], kind: str, gated: bool, place: Place) -> PackedWeight:
        """The weight that ``pack_weight`` has packed there, in this process or another one."""
        memory, offset = place
        return self._cpu.packed_weight(FORMATS[kind], *shape, gated, memory, offset)

    def map_shared(self, fd: int, size: int, writable: bool) -> SharedMemory:
        """The first ``size`` bytes of the anonymous file ``fd``. Raises OSError."""
        try:
            return self._cpu.map_shared(fd, size, writable)
        except RuntimeError as error:
            raise OSError(str(error)) from None

    def populate(self, memory: SharedMemory, end: int) -> None:
        """Take memory for its first ``end`` bytes, in huge pages where the kernel can."""
        self._cpu.populate(memory, end)

    def linear(self, x: Tensor, weight: PackedWeight, out: Tensor, bias: Tensor | None = None) -> None:
        if weight.gated:
            raise ValueError("weight is packed for gated_linear")
        rows = shape_of("x", x, 2)[0]
        check("out", out, torch.float32, (rows, weight.outputs))
        self._multiply(x, weight, out, bias, weight.outputs)

    def gated_linear(
        self, x: Tensor, weight: PackedWeight, out: Tensor, sums: Tensor, bias: Tensor | None = None
    ) -> None:
        """``sums`` is not touched."""
        if not weight.gated:
            raise ValueError("weight is not packed for gated_linear")
        rows = shape_of("x", x, 2)[0]
        check("out", out, None, (rows, weight.outputs))
        self._multiply(x, weight, out, bias, 2 * weight.outputs)

    def _multiply(self, x: Tensor, weight: PackedWeight, out: Tensor, bias: Tensor | None, biases: int) -> None:
        check("x", x, None, (len(x), weight.depth))
        if bias is not None:
            check("bias", bias, torch.float32, (biases,))
        self._cpu.linear(
            x.data_ptr(), DTYPES[x.dtype], weight, address(bias), out.data_ptr(), DTYPES[out.dtype], len(x)
        )


def _arrays(weight: Tensor | Quantized) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Values, scales and minima, checked."""
    if isinstance(weight, Tensor):
        return weight, None, None
    outputs, depth = weight.shape
    if weight.minima is None:
        check("scales", weight.scales, torch.float32, (outputs,))
    else:
        for name in ("scales", "minima"):
            check(name, getattr(weight, name), torch.float16, (outputs, depth // weight.block))
    check("codes", weight.codes, torch.uint8, (outputs, depth))
    return weight.codes, weight.scales, weight.minima
