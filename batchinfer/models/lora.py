"""LoRA adapters beside the weights of a decoder: y += (x A^T) B^T, for the rows that go through one of them.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv:2106.09685). Both products are ``linear``
ops, so that a row's result depends on the other rows no more than it does without an adapter; rows of the base model
are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchinfer.models.model_spec import ModelSpec
from batchinfer.models.peft_files import AdapterFile, read_adapter
from batchinfer.models.weights import read_tensor, reorder
from batchinfer.ops import Ops

Groups = tuple[tuple[int, Tensor], ...]
"""Which rows (int64, ascending) of a tensor go through which adapter (numbers from 0 on)."""


@dataclass(frozen=True)
class AdapterRows:
    """Of a step's tokens, and of its sampled rows."""

    tokens: Groups = ()
    samples: Groups = ()


NO_ADAPTERS = AdapterRows()


@dataclass(frozen=True)
class Factors:
    """A [rank, in] and B [out, rank] of a matrix of the decoder, packed; the scale is in B."""

    a: Any
    b: Any
    rank: int

    def add(self, ops: Ops, x: Tensor, rows: Tensor, out: Tensor) -> None:
        """out[rows] += B A x[rows]. x [T, in], out [T, out] of the dtype of ``ops.activations``."""
        chosen = x.index_select(0, rows)
        inner = torch.empty(len(rows), self.rank, dtype=out.dtype, device=out.device)
        added = torch.empty(len(rows), out.shape[1], dtype=out.dtype, device=out.device)
        ops.linear(chosen, self.a, inner)
        ops.linear(inner, self.b, added)
        out.index_add_(0, rows, added)


Adapter = Mapping[str, Factors]
"""By the decoder's name of a matrix (models/layout.py)."""


def load_adapter(folder: str, spec: ModelSpec, ops: Ops, dtype: torch.dtype) -> Adapter:
    """The adapter of a folder that PEFT has written. Raises ModelError."""
    adapter = read_adapter(folder, spec)
    return {target: _pack(adapter, target, ops, dtype) for target in adapter.rows}


def _pack(adapter: AdapterFile, target: str, ops: Ops, dtype: torch.dtype) -> Factors:
    """Of a matrix that is merged of several, the As stand one below the other, and each B in the rows of its part."""
    factors = [f for f in adapter.factors if f.part.target == target]
    a = torch.cat([read_tensor(adapter.file.path, f.a) for f in factors])
    b = torch.zeros(adapter.rows[target], len(a))
    column = 0
    for f in factors:
        rank = f.a.shape[0]
        place = b[f.part.row : f.part.row + f.part.shape[0], column : column + rank]
        place.copy_(reorder(read_tensor(adapter.file.path, f.b), f.part) * adapter.scale)
        column += rank
    return Factors(ops.pack_weight(a.to(dtype)), ops.pack_weight(b.to(dtype)), len(a))
