"""What of a model's weights is packed for the ops, and what stays a tensor."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchinfer.models.encoder_spec import EncoderSpec
from batchinfer.models.files import ModelError
from batchinfer.models.layout import TABLES
from batchinfer.models.model_spec import ModelSpec
from batchinfer.models.weights import layout_of
from batchinfer.ops import Ops
from batchinfer.ops.grouped import GroupQuantized
from batchinfer.ops.quantized import Quantized, int8

Spec = ModelSpec | EncoderSpec
Matrix = Tensor | Quantized | GroupQuantized
Weights = Iterable[tuple[str, Matrix]]

EXPERT = re.compile(r"layers\.\d+\.experts\..*")
GATE_UP = re.compile(r"layers\.\d+\.gate_up")


@dataclass(frozen=True)
class Packable:
    """A weight by its name in the layout. ``packed``: for ``linear``, or with ``gated`` for ``gated_linear``."""

    name: str
    tensor: Matrix
    packed: bool
    gated: bool = False


class Suiting:
    """The weights of a quantised checkpoint in forms that ``ops`` can pack: those without one become dense, in
    ``dtype``. Counts them: ``kept`` and ``dense``."""

    def __init__(self, ops: Ops, dtype: torch.dtype):
        self._groups, self._dtype = "groups of codes" not in ops.lacks, dtype
        self.kept = self.dense = 0

    def __call__(self, weights: Weights) -> Weights:
        for name, tensor in weights:
            if isinstance(tensor, GroupQuantized):
                found = self._suited(name, tensor)
                self.kept += found is not None
                self.dense += found is None
                tensor = tensor.dense(self._dtype) if found is None else found
            yield name, tensor

    def _suited(self, name: str, matrix: GroupQuantized) -> GroupQuantized | Quantized | None:
        """Experts are dense: no backend's kernels for mixtures take groups."""
        if not self._groups:
            return matrix.blocks()
        return None if EXPERT.fullmatch(name) else matrix


def packable(spec: Spec, weights: Weights, to_int8: bool = False, adapted: Collection[str] = ()) -> Iterator[Packable]:
    """Each of what :func:`batchinfer.models.weights.load_weights` yields, and the LM head of a tied model, which is its
    embedding packed. ``to_int8``: matrices that are not quantised yet become int8, all but the routers of mixtures.
    ``adapted``: names of those that adapters add to; gates and values are then needed by themselves."""
    head = False
    for name, tensor in weights:
        matrix = len(tensor.shape) == 2 and name not in TABLES
        gated = spec.fused_gate and GATE_UP.fullmatch(name) is not None and name not in adapted
        short = matrix and to_int8 and isinstance(tensor, Tensor) and not name.endswith(".router")
        yield Packable(name, int8(tensor) if short else tensor, matrix, gated)
        head |= name == "lm_head"
        if name == "embed" and not head and spec.tied_head:
            yield Packable("lm_head", int8(tensor) if to_int8 else tensor, True)


def pack(
    spec: Spec, weights: Weights, ops: Ops, to_int8: bool = False, adapted: Collection[str] = ()
) -> dict[str, Any]:
    """By name what the decoder or encoder works with. ``weights`` are used up tensor by tensor, after a look at what
    ``ops`` has: ModelError where that is not enough for the model."""
    if isinstance(spec, ModelSpec):
        _check_ops(spec, ops)
    return {
        one.name: ops.pack_weight(one.tensor, one.gated) if one.packed else one.tensor.to(ops.device)
        for one in packable(spec, weights, to_int8, adapted)
    }


def bytes_of(packed: Mapping[str, Any]) -> int:
    """Memory of what :func:`pack` has made, as far as it says so."""
    return sum(getattr(one, "nbytes", 0) or getattr(one, "bytes", 0) for one in packed.values())


def most_bytes(spec: Spec, dtype: torch.dtype) -> int:
    """No backend's packing of the model's matrices, together with its tensors, is larger: padding fills up to 64
    columns and rows, and 64 bytes between two of them."""
    shapes = list(layout_of(spec).targets.values())
    if spec.tied_head:
        shapes.append((spec.vocab_size, spec.width))
    padded = [(shape[0] + 64) * (shape[1] + 64 if len(shape) == 2 else 1) for shape in shapes]
    return sum(padded) * max(dtype.itemsize, 4)


def _check_ops(spec: ModelSpec, ops: Ops) -> None:
    """Raises ModelError where the backend is not so far as to have all ops of the model."""
    needs = {
        "mix_experts": spec.experts is not None,
        "norm of all heads": spec.qk_norm == "all",
    }
    lacking = sorted(op for op, needed in needs.items() if needed and op in ops.lacks)
    if lacking:
        needed = f"{spec.architecture} needs {', '.join(lacking)}, which {type(ops).__name__} has only with Triton"
        raise ModelError(f"{needed}: pip install triton, or set engine.device=cpu")
