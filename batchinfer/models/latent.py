"""Latent attention (DeepSeek-V2, arXiv:2405.04434): the projections around the attention op.

Keys and values of all heads are products of ``rank`` values of a token, and all heads share the rotated part of their
keys. They are expanded before they go into the cache, which holds heads of one width: [rotated, plain] of keys, and
values, filled up with zeros. That is 2 * heads * width values of a token and layer where the latent ones would be rank
+ rotated: 6144 and 576 in DeepSeek-V2-Lite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.models.layers import Linear, Norm
from batchinfer.models.lora import Rows
from batchinfer.models.model_spec import LatentSpec
from batchinfer.ops import Ops

LATENT_NORM_EPS = 1e-6
"""Of the norms within, whatever a config says of the others."""


@dataclass(frozen=True)
class LatentInput:
    """Stands where other models have one matrix for queries, keys and values. ``q_a`` and its norm are None where
    queries have no latent values. Heads in the cache have ``width`` elements."""

    spec: LatentSpec
    heads: int
    width: int
    q_a: Linear | None
    q_norm: Norm | None
    q_b: Linear
    kv_a: Linear
    kv_norm: Norm
    kv_b: Linear

    def __call__(self, ops: Ops, x: Tensor, out: Tensor, rows: Rows) -> None:
        """out [T, 3*H*E] = q, k and v of x, as ``Ops.rope_and_cache`` takes them."""
        spec, tokens = self.spec, len(x)
        rotated, used = spec.rotated, spec.rotated + spec.plain

        def product(linear: Linear, given: Tensor, width: int) -> Tensor:
            result = torch.empty(tokens, width, dtype=out.dtype, device=out.device)
            linear(ops, given, result, rows)
            return result

        if self.q_a is not None and self.q_norm is not None:
            x_q = product(self.q_a, x, spec.query_rank)
            self.q_norm(ops, x_q, x_q)
        else:
            x_q = x
        queries = product(self.q_b, x_q, self.heads * used).view(tokens, self.heads, used)
        both = product(self.kv_a, x, spec.rank + rotated)
        latent = torch.empty(tokens, spec.rank, dtype=out.dtype, device=out.device)
        ops.copy(both[:, : spec.rank], latent)
        self.kv_norm(ops, latent, latent)
        expanded = product(self.kv_b, latent, self.heads * (spec.plain + spec.values)).view(tokens, self.heads, -1)

        q, k, v = out.view(tokens, 3, self.heads, self.width).unbind(1)
        self._rotary(ops, queries[..., spec.plain :], q)
        self._rotary(ops, both[:, None, spec.rank :].expand(-1, self.heads, -1), k)
        ops.copy(queries[..., : spec.plain], q[..., rotated:used])
        ops.copy(expanded[..., : spec.plain], k[..., rotated:used])
        ops.copy(expanded[..., spec.plain :], v[..., : spec.values])
        for head, end in ((q, used), (k, used), (v, spec.values)):
            if end < self.width:
                ops.copy(torch.zeros_like(out[:1, :1]).expand(head[..., end:].shape), head[..., end:])

    def _rotary(self, ops: Ops, values: Tensor, out: Tensor) -> None:
        """The first elements of heads ``out`` = values, which are pairs side by side, or in halves already."""
        half = self.spec.rotated // 2
        if self.spec.interleaved:
            ops.copy(values[..., 0::2], out[..., :half])
            ops.copy(values[..., 1::2], out[..., half : 2 * half])
        else:
            ops.copy(values, out[..., : 2 * half])


@dataclass(frozen=True)
class LatentOutput:
    """The projection of attention's output, of which each head's first ``values`` elements count."""

    linear: Linear
    heads: int
    values: int

    def __call__(self, ops: Ops, x: Tensor, out: Tensor, rows: Rows) -> None:
        """out [T, D] from x [T, H*E]."""
        counting = torch.empty(len(x), self.heads, self.values, dtype=x.dtype, device=x.device)
        ops.copy(x.view(len(x), self.heads, -1)[..., : self.values], counting)
        self.linear(ops, counting.flatten(1), out, rows)
