"""What of a model's weights is packed for the ops, and what stays a tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchinfer.models.files import ModelError
from batchinfer.models.layout import layout
from batchinfer.models.model_spec import ModelSpec
from batchinfer.ops import Ops

TABLES = ("embed", "positions")
"""Matrices of which rows are gathered."""


@dataclass(frozen=True)
class Packable:
    """A weight by its name in the layout. ``packed``: for ``linear``, or with ``gated`` for ``gated_linear``."""

    name: str
    tensor: Tensor
    packed: bool
    gated: bool = False


def packable(spec: ModelSpec, weights: Iterable[tuple[str, Tensor]]) -> Iterator[Packable]:
    """Each of what :func:`batchinfer.models.weights.load_weights` yields, and the LM head of a tied model, which is its
    embedding packed."""
    for name, tensor in weights:
        matrix = tensor.ndim == 2 and name not in TABLES
        gated = spec.fused_gate and re.fullmatch(r"layers\.\d+\.gate_up", name) is not None
        yield Packable(name, tensor, matrix, gated)
        if name == "embed" and spec.tied_embeddings:
            yield Packable("lm_head", tensor, True)


def pack(spec: ModelSpec, weights: Iterable[tuple[str, Tensor]], ops: Ops) -> dict[str, Any]:
    """By name what the decoder works with. ``weights`` are used up tensor by tensor, after a look at what ``ops`` has:
    ModelError where that is not enough for the model."""
    _check_ops(spec, ops)
    return {
        one.name: ops.pack_weight(one.tensor, one.gated) if one.packed else one.tensor.to(ops.device)
        for one in packable(spec, weights)
    }


def most_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """No backend's packing of the model's matrices, together with its tensors, is larger: padding fills up to 64
    columns and rows, and 64 bytes between two of them."""
    shapes = list(layout(spec).targets.values())
    if spec.tied_embeddings:
        shapes.append((spec.vocab_size, spec.width))
    padded = [(shape[0] + 64) * (shape[1] + 64 if len(shape) == 2 else 1) for shape in shapes]
    return sum(padded) * max(dtype.itemsize, 4)


def _check_ops(spec: ModelSpec, ops: Ops) -> None:
    """Raises ModelError where the backend is not so far as to have all ops of the model."""
    needs = {"mix_experts": spec.experts is not None, "norm of all heads": spec.qk_norm == "all"}
    lacking = sorted(op for op in ops.lacks if needs[op])
    if lacking:
        others = "engine.device=cpu" if "mix_experts" in lacking else "engine.ops=triton, or engine.device=cpu"
        needed = f"{spec.architecture} needs {', '.join(lacking)}, which {type(ops).__name__} has not got yet"
        raise ModelError(f"{needed}: set {others}")
