"""Encoders: texts in, their final hidden states out; here that of BERT and its like. Every token sees its whole text,
and nothing is kept for later, so that there is no cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchinfer.models.encoder_spec import EncoderSpec
from batchinfer.models.layers import Linear, Norm
from batchinfer.ops import Ops
from batchinfer.types import Pooling


@dataclass(frozen=True)
class EncoderInput:
    """S texts of T tokens together. ``token_ids``, ``positions``, ``types`` int32 [T]; ``starts`` [S + 1] on the host:
    text i is the tokens starts[i]..starts[i + 1]."""

    token_ids: Tensor
    positions: Tensor
    types: Tensor
    starts: list[int]


@dataclass(frozen=True)
class _Layer:
    qkv: Linear
    o: Linear
    attn_norm: Norm
    up: Linear
    down: Linear
    mlp_norm: Norm


class Encoder(ABC):
    """What encoders have in common: how texts' states become one."""

    def __init__(self, spec: EncoderSpec, ops: Ops, dtype: torch.dtype):
        self.spec, self.ops, self.kept = spec, ops, ops.activations(dtype)

    @abstractmethod
    def states(self, texts: EncoderInput) -> Tensor:
        """Final hidden states [T, width] of the dtype of activations."""

    def pool(self, texts: EncoderInput, pooling: Pooling) -> Tensor:
        """float64 [S, width], the texts' pooled states; with a classification head its values [S, classes]."""
        states, starts = self.states(texts), torch.tensor(texts.starts, device=self.ops.device)
        if pooling == "mean":
            return torch.segment_reduce(states.double(), "mean", offsets=starts, axis=0)
        return states.index_select(0, starts[:-1] if pooling == "cls" else starts[1:] - 1).double()

    def buffer(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.kept, device=self.ops.device)


class BertEncoder(Encoder):
    """Holds packed weights, what :func:`batchinfer.models.packing.pack` makes."""

    def __init__(self, spec: EncoderSpec, weights: Mapping[str, Any], ops: Ops, dtype: torch.dtype):
        super().__init__(spec, ops, dtype)

        def linear(name: str) -> Linear:
            return Linear(weights[name], weights[f"{name}_bias"])

        def norm(name: str) -> Norm:
            return Norm(weights[name], weights[f"{name}_bias"], spec.norm_eps, center=True)

        self.tables = [weights[name] for name in ("word", "position", "token_type")]
        self.norm = norm("norm")
        self.layers = [
            _Layer(
                *(linear(f"layers.{i}.{name}") for name in ("qkv", "o")),
                norm(f"layers.{i}.attn_norm"),
                *(linear(f"layers.{i}.{name}") for name in ("up", "down")),
                norm(f"layers.{i}.mlp_norm"),
            )
            for i in range(spec.layers)
        ]
        self.head = (linear("dense"), linear("classes")) if spec.head == "classes" else None

    def states(self, texts: EncoderInput) -> Tensor:
        ops, spec, count = self.ops, self.spec, len(texts.token_ids)
        x, y, delta, attn = (self.buffer(count, spec.width) for _ in range(4))
        qkv, up = self.buffer(count, 3 * spec.width), self.buffer(count, spec.mlp_width)
        words, positions, types = self.tables
        ops.embed(texts.token_ids, words, y)
        for ids, table in ((texts.positions, positions), (texts.types, types)):
            ops.embed(ids, table, delta)
            ops.add(delta, y)
        self.norm(ops, y, x)
        scale = (spec.width // spec.heads) ** -0.5
        for layer in self.layers:
            layer.qkv(ops, x, qkv, ())
            ops.attend_texts(qkv.view(count, 3, spec.heads, -1), texts.starts, scale, attn.view(count, spec.heads, -1))
            layer.o(ops, attn, delta, ())
            layer.attn_norm(ops, delta, y, x)  # what is normalised is x + delta, and x is free then
            layer.up(ops, y, up, ())
            ops.activate(spec.activation, up, up)
            layer.down(ops, up, delta, ())
            layer.mlp_norm(ops, delta, x, y)
        return x

    def pool(self, texts: EncoderInput, pooling: Pooling) -> Tensor:
        if self.head is None:
            return super().pool(texts, pooling)
        dense, classes = self.head
        first = super().pool(texts, "cls").to(self.kept)
        inner = torch.empty_like(first)
        values = torch.empty(len(first), self.spec.classes, dtype=torch.float32, device=first.device)
        dense(self.ops, first, inner, ())
        classes(self.ops, inner.tanh_(), values, ())
        return values.double()
