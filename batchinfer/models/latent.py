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
from batchinfer.models.lora import Groups
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

    def __call__(self, ops: Ops, x: Tensor, out: Tensor, groups: Groups) -> None:
        """out [T, 3*H*E] = q, k and v of x, as ``Ops.rope_and_cache`` takes them."""
        spec, tokens = self.spec, len(x)
        rotated, used = spec.rotated, spec.rotated + spec.plain

        def product(linear: Linear, given: Tensor, width: int) -> Tensor:
            result = torch.empty(tokens, width, dtype=out.dtype, device=out.device)
            linear(ops, given, result, groups)
            return result

        if self.q_a is not None and self.q_norm is not None:
            x_q = product(self.q_a, x, spec.query_rank)
            self.q_norm(ops, x_q, x_q)
        else:
            x_q = x
        queries = product(self.q_b, x_q, self.heads * used).view(tokens, self.heads, used)
        both = product(self.kv_a, x, spec.rank + rotated)
        latent = both[:, : spec.rank].contiguous()
        self.kv_norm(ops, latent, latent)
        expanded = product(self.kv_b, latent, self.heads * (spec.plain + spec.values)).view(tokens, self.heads, -1)

        q, k, v = out.view(tokens, 3, self.heads, self.width).unbind(1)
        self._rotary(queries[..., spec.plain :], q)
        self._rotary(both[:, None, spec.rank :], k)
        q[..., rotated:used] = queries[..., : spec.plain]
        k[..., rotated:used] = expanded[..., : spec.plain]
        v[..., : spec.values] = expanded[..., spec.plain :]
        for head, end in ((q, used), (k, used), (v, spec.values)):
            if end < self.width:
                head[..., end:] = 0

    def _rotary(self, values: Tensor, out: Tensor) -> None:
        """The first elements of heads ``out`` = values, which are pairs side by side, or in halves already."""
        if self.spec.interleaved:
            half = self.spec.rotated // 2
            out[..., :half] = values[..., 0::2]
            out[..., half : 2 * half] = values[..., 1::2]
        else:
            out[..., : self.spec.rotated] = values


@dataclass(frozen=True)
class LatentOutput:
    """The projection of attention's output, of which each head's first ``values`` elements count."""

    linear: Linear
    heads: int
    values: int

    def __call__(self, ops: Ops, x: Tensor, out: Tensor, groups: Groups) -> None:
        """out [T, D] from x [T, H*E]."""
        counting = x.view(len(x), self.heads, -1)[..., : self.values].flatten(1)
        self.linear(ops, counting.contiguous(), out, groups)
