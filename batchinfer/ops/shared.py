"""Packed weights of the compiled CPU backend in memory that processes share: one fills it, and all map it for reading.

The memory is an anonymous file (memfd_create), which lives as long as a process maps it or has its descriptor. Once it
is full it is sealed: nobody can write to it or change its size any more, so no process can harm another one, and the
one that has filled it may die. The file says itself what is in it: JSON at its end, followed by the length of the JSON.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchinfer.ops import Ops
from batchinfer.ops.native import NativeOps
from batchinfer.ops.native_linear import format_of
from batchinfer.ops.quantized import Quantized

ALIGNMENT = 64
"""Of everything in the memory: a cache line, and what the kernels of the CPU ask for."""

MAX_INDEX_BYTES = 64 << 20
"""Far more than the JSON of the largest mixture of experts."""

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True)
class Entry:
    """What lies at byte ``offset``: a tensor of ``shape`` and dtype ``kind``, or a matrix ``packed`` in the format
    ``kind``."""

    name: str
    offset: int
    shape: tuple[int, ...]
    kind: str
    packed: bool
    gated: bool


def can_share(ops: Ops) -> bool:
    """Whether these are ops that the memory is for."""
    return isinstance(ops, NativeOps)


class Filling:
    """Memory for up to ``capacity`` bytes, of which it takes what it gets. Raises OSError where the system gives none.

    Used once: :meth:`put` everything, then :meth:`seal`.
    """

    def __init__(self, ops: NativeOps, capacity: int):
        self._ops, self._entries = ops, list[Entry]()
        self._fd = os.memfd_create("batchinfer-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, capacity)
            self._memory = ops.map_shared(self._fd, capacity, writable=True)
        except OSError:
            os.close(self._fd)
            raise
        self._end, self._capacity = 0, capacity

    def put(self, name: str, tensor: Tensor | Quantized, packed: bool, gated: bool = False) -> None:
        """Pack it as ``pack_weight`` does, or copy it."""
        kind = format_of(tensor) if packed else str(tensor.dtype).removeprefix("torch.")
        size = self._ops.packed_bytes(tuple(tensor.shape), kind, gated) if packed else tensor.nbytes
        offset = -(-self._end // ALIGNMENT) * ALIGNMENT
        self._end = offset + size
        if self._end > self._capacity:
            raise ValueError(f"{name!r} ends at byte {self._end}, behind the capacity of {self._capacity}")
        self._ops.populate(self._memory, self._end)
        if packed:
            self._ops.pack_weight(tensor, gated, (self._memory, offset))
        else:
            _tensor_at(self._memory, offset, tensor.shape, tensor.dtype).copy_(tensor)
        self._entries.append(Entry(name, offset, tuple(tensor.shape), kind, packed, gated))

    def seal(self) -> int:
        """The descriptor of the full memory."""
        self._memory = None  # a file that somebody can still write to can't be sealed
        index = {"isa": self._ops.isa, "entries": [dataclasses.astuple(entry) for entry in self._entries]}
        data = json.dumps(index).encode()
        os.ftruncate(self._fd, self._end)
        os.pwrite(self._fd, data + len(data).to_bytes(8, "little"), self._end)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)
        return self._fd


def mapped(fd: int, ops: NativeOps) -> dict[str, Any]:
    """All that is in the memory ``fd``, by name: tensors, which may not be written to, and weights packed for ``ops``.

    Raises ValueError where it is not what a Filling has sealed, or is packed for another instruction set.
    """
    size = os.fstat(fd).st_size
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
        raise ValueError("the shared weights are not sealed")
    length = int.from_bytes(os.pread(fd, 8, size - 8), "little") if size > 8 else 0
    if not 0 < length <= min(size - 8, MAX_INDEX_BYTES):
        raise ValueError("the shared weights have no index")
    index = json.loads(os.pread(fd, length, size - 8 - length))
    if index["isa"] != ops.isa:
        raise ValueError(f"the shared weights are packed for {index['isa']}, and this process computes with {ops.isa}")
    memory = ops.map_shared(fd, size, writable=False)
    return {entry.name: _view(memory, entry, ops) for entry in (Entry(*values) for values in index["entries"])}


def _view(memory: Any, entry: Entry, ops: NativeOps) -> Any:
    if entry.packed:
        return ops.packed_weight(entry.shape, entry.kind, entry.gated, (memory, entry.offset))
    return _tensor_at(memory, entry.offset, entry.shape, getattr(torch, entry.kind))


def _tensor_at(memory: Any, offset: int, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    shape = tuple(shape)
    count = torch.Size(shape).numel()
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
