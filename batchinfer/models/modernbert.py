"""ModernBERT: norms before attention and MLP, rotated positions, a gated MLP, and local attention in most layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchinfer.models.encoder import Encoder, EncoderInput
from batchinfer.models.encoder_spec import EncoderSpec
from batchinfer.models.layers import Linear, Norm
from batchinfer.models.modernbert_spec import ModernBert
from batchinfer.ops import Ops
from batchinfer.types import Pooling


@dataclass(frozen=True)
class _Layer:
    attn_norm: Norm | None
    qkv: Linear
    o: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear
    local: bool


class ModernBertEncoder(Encoder):
    """Holds packed weights, what :func:`batchinfer.models.packing.pack` makes, and the rope tables."""

    def __init__(self, spec: EncoderSpec, modern: ModernBert, weights: Mapping[str, Any], ops: Ops, dtype: torch.dtype):
        super().__init__(spec, ops, dtype)
        self.modern, self.word = modern, weights["word"]

        def linear(name: str) -> Linear:
            return Linear(weights[name], weights.get(f"{name}_bias"))

        def norm(name: str) -> Norm:
            return Norm(weights[name], weights.get(f"{name}_bias"), spec.norm_eps, center=True)

        self.norm, self.final_norm = norm("norm"), norm("final_norm")
        self.layers = []
        for i, local in enumerate(modern.local):
            name = f"layers.{i}."
            attn_norm = norm(name + "attn_norm") if i else None
            qkv, o, up, down = (linear(name + part) for part in ("qkv", "o", "up", "down"))
            self.layers.append(_Layer(attn_norm, qkv, o, norm(name + "mlp_norm"), up, down, local))
        self.tables = [
            torch.from_numpy(rope.table(spec.max_positions)).to(ops.device) for rope in (modern.rope, modern.local_rope)
        ]
        self.head = (linear("dense"), norm("head_norm"), linear("classes")) if spec.head == "classes" else None

    def states(self, texts: EncoderInput) -> Tensor:
        ops, spec, count = self.ops, self.spec, len(texts.token_ids)
        x, y, delta, attn = (self.buffer(count, spec.width) for _ in range(4))
        qkv, up = self.buffer(count, 3 * spec.width), self.buffer(count, 2 * spec.mlp_width)
        heads = qkv.view(count, 3, spec.heads, -1)
        turns = [table.index_select(0, texts.positions).unsqueeze(1) for table in self.tables]
        scale = (spec.width // spec.heads) ** -0.5
        ops.embed(texts.token_ids, self.word, y)
        self.norm(ops, y, x)
        y.copy_(x)  # y is what the first layer reads, x the running sum
        for layer in self.layers:
            if layer.attn_norm is not None:
                layer.attn_norm(ops, delta, y, x)
            layer.qkv(ops, y, qkv, ())
            rotate(heads[:, :2], turns[layer.local])
            reach = self.modern.reach if layer.local else None
            ops.attend_texts(heads, texts.starts, scale, attn.view(count, spec.heads, -1), reach)
            layer.o(ops, attn, delta, ())
            layer.mlp_norm(ops, delta, y, x)
            layer.up(ops, y, up, ())
            gated = up[:, : spec.mlp_width].contiguous()
            ops.activate(spec.activation, gated, gated)
            layer.down(ops, gated.mul_(up[:, spec.mlp_width :]), delta, ())
        self.final_norm(ops, delta, y, x)
        return y

    def pool(self, texts: EncoderInput, pooling: Pooling) -> Tensor:
        if self.head is None:
            return super().pool(texts, pooling)
        dense, norm, classes = self.head
        read = super().pool(texts, self.modern.pooled).to(self.kept)
        inner = torch.empty_like(read)
        dense(self.ops, read, inner, ())
        self.ops.activate(self.modern.head_activation, inner, inner)
        norm(self.ops, inner, inner)
        values = torch.empty(len(read), self.spec.classes, dtype=torch.float32, device=read.device)
        classes(self.ops, inner, values, ())
        return values.double()


def rotate(heads: Tensor, turn: Tensor) -> None:
    """Rotate heads [T, 2, H, E] in place by a token's cosines and sines float32 [T, 1, E], first half against second,
    in float32."""
    first, second = heads.float().chunk(2, -1)
    cos, sin = turn.unsqueeze(1).chunk(2, -1)
    heads.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))
