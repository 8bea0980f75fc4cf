"""LoRA adapters beside the weights of a decoder: y += (x A^T) B^T, for the rows that go through one of them.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv:2106.09685). Two ways, with ``linear`` ops
both, so that a row's result depends on the other rows no more than it does without an adapter. By groups of rows, each
through its own adapter: little work, whose launches depend on the step. Or all rows through all adapters side by side,
where what is not theirs becomes zero in between: launches that a graph can hold. The second costs the share of rank in
width: with 16 adapters of rank 16 an eighth of the product of a matrix of 4096 x 4096.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from batchinfer.models.files import StoredTensor, open_for_reading, read_at
from batchinfer.models.model_spec import ModelSpec
from batchinfer.models.peft_files import AdapterFile, read_adapter
from batchinfer.models.weights import DTYPES, reorder
from batchinfer.ops import Ops

Groups = tuple[tuple[int, Tensor], ...]
"""Which rows (int64, ascending) of a tensor go through which adapter (numbers from 0 on)."""

Rows = Groups | Tensor
"""Groups, or int32 [T]: the adapter of each row, -1 for none."""


@dataclass(frozen=True)
class AdapterRows:
    """Of a step's tokens, and of its sampled rows."""

    tokens: Rows = ()
    samples: Rows = ()


NO_ADAPTERS = AdapterRows()


@dataclass(frozen=True)
class Factors:
    """A [rank, in] and B [out, rank] of a matrix of the decoder; the scale is in B."""

    a: Tensor
    b: Tensor


Adapter = Mapping[str, Factors]
"""By the decoder's name of a matrix (models/layout.py)."""


class Adapters(Protocol):
    """What all adapters add to one matrix, packed."""

    def add(self, ops: Ops, x: Tensor, rows: Rows, out: Tensor) -> None:
        """out[t] += B A x[t] of the adapter of t. x [T, in], out [T, out] of the dtype of ``ops.activations``."""


@dataclass(frozen=True)
class Grouped:
    """``factors``: packed A and B, and the rank, by the adapters' numbers; None for those that leave the matrix alone.
    Rows come as groups; those of the base model are not touched."""

    factors: tuple[tuple[Any, Any, int] | None, ...]

    @classmethod
    def of(cls, factors: Sequence[Factors | None], ops: Ops, dtype: torch.dtype) -> Grouped:
        def packed(f: Factors) -> tuple[Any, Any, int]:
            return ops.pack_weight(f.a.to(dtype)), ops.pack_weight(f.b.to(dtype)), len(f.a)

        return cls(tuple(None if f is None else packed(f) for f in factors))

    def add(self, ops: Ops, x: Tensor, rows: Groups, out: Tensor) -> None:
        for number, mine in rows:
            factors = self.factors[number]
            if factors is None:
                continue
            a, b, rank = factors
            chosen = x.index_select(0, mine)
            inner, added = (out.new_empty(len(mine), width) for width in (rank, out.shape[1]))
            ops.linear(chosen, a, inner)
            ops.linear(inner, b, added)
            out.index_add_(0, mine, added)


@dataclass(frozen=True)
class Stacked:
    """``a`` [R, in] and ``b`` [out, R], packed: the factors of all adapters one after the other; ``owner`` int32 [R]:
    whose each of the R is. Rows come as a tensor."""

    a: Any
    b: Any
    owner: Tensor

    @classmethod
    def of(cls, factors: Sequence[Factors | None], ops: Ops, dtype: torch.dtype) -> Stacked:
        there = [(number, f) for number, f in enumerate(factors) if f is not None]
        owner = [number for number, f in there for _ in range(len(f.a))]
        return cls(
            ops.pack_weight(torch.cat([f.a for _, f in there]).to(dtype)),
            ops.pack_weight(torch.cat([f.b for _, f in there], 1).to(dtype)),
            torch.tensor(owner, dtype=torch.int32, device=ops.device),
        )

    def add(self, ops: Ops, x: Tensor, rows: Tensor, out: Tensor) -> None:
        inner, added = out.new_empty(len(x), len(self.owner)), torch.empty_like(out)
        ops.linear(x, self.a, inner)
        inner.masked_fill_(rows.unsqueeze(1) != self.owner, 0.0)
        ops.linear(inner, self.b, added)
        out += added


def pack_adapters(
    adapters: Sequence[Adapter], ops: Ops, dtype: torch.dtype, kind: type[Grouped] | type[Stacked]
) -> dict[str, Adapters]:
    """By matrix, for those that some of them add to."""
    names = dict.fromkeys(name for adapter in adapters for name in adapter)
    return {name: kind.of([adapter.get(name) for adapter in adapters], ops, dtype) for name in names}


def load_adapter(folder: str, spec: ModelSpec) -> Adapter:
    """The adapter of a folder that PEFT has written, in float32. Raises ModelError."""
    adapter = read_adapter(folder, spec)
    return {target: _merged(adapter, target) for target in adapter.rows}


def _merged(adapter: AdapterFile, target: str) -> Factors:
    """Of a matrix that is merged of several, the As stand one below the other, and each B in the rows of its part."""
    factors = [f for f in adapter.factors if f.part.target == target]
    a = torch.cat([_read(adapter, f.a) for f in factors])
    b = torch.zeros(adapter.rows[target], len(a))
    column = 0
    for f in factors:
        rank = f.a.shape[0]
        place = b[f.part.row : f.part.row + f.part.shape[0], column : column + rank]
        place.copy_(reorder(_read(adapter, f.b), f.part) * adapter.scale)
        column += rank
    return Factors(a, b)


def _read(adapter: AdapterFile, tensor: StoredTensor) -> Tensor:
    """float32."""
    data = bytearray(tensor.nbytes)
    with open_for_reading(adapter.file.path) as (fd, _):
        read_at(fd, tensor.offset, memoryview(data), adapter.file.path)
    return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).view(tensor.shape).float()
