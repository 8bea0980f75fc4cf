"""The steps of a decoder layer as functions of weights, workspace and ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchinfer.models.spec import ModelSpec
from batchinfer.ops import HeadNorm, Ops, Rope


@dataclass(frozen=True)
class Linear:
    """``weight`` as packed by the ops; ``bias`` float32 [N] or None."""

    weight: Any
    bias: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """Weights of one layer. Norms float32 [D]; qkv and gate_up are merged, in the order of their names."""

    attn_norm: Tensor
    qkv: Linear
    head_norm: HeadNorm | None
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Workspace:
    """Activations of a step, shared by all layers: for T tokens the first T rows of each.

    ``residual`` [T, D] is the running sum, ``x`` what attention and MLP read (normalised), ``delta`` what they add.
    """

    residual: Tensor
    x: Tensor
    delta: Tensor  # the memory of x where both have the same dtype
    qkv: Tensor  # [T, (H+2G)*E]
    q: Tensor  # [T, H, E]
    attn: Tensor  # [T, H, E]
    lse: Tensor  # [T, H]
    gate_up: Tensor  # [T, 2*I], for gated_linear
    gated: Tensor  # [T, I]

    @staticmethod
    def allocate(spec: ModelSpec, tokens: int, ops: Ops, weights: torch.dtype) -> Workspace:
        """Buffers for ``tokens`` tokens of a model whose weights have the dtype ``weights``."""
        h, g, e = spec.heads, spec.kv_heads, spec.head_dim
        kept, read = ops.activations(weights), ops.linear_inputs(weights)

        def buffer(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(tokens, *shape, dtype=dtype, device=ops.device)

        x = buffer(read, spec.width)
        return Workspace(
            residual=buffer(kept, spec.width),
            x=x,
            delta=x if kept == read else buffer(kept, spec.width),
            qkv=buffer(kept, (h + 2 * g) * e),
            q=buffer(kept, h, e),
            attn=buffer(read, h, e),
            lse=buffer(torch.float32, h),
            gate_up=buffer(kept, 2 * spec.mlp_width),
            gated=buffer(read, spec.mlp_width),
        )

    def first(self, tokens: int) -> Workspace:
        """The same buffers, for a step of ``tokens`` tokens."""
        return Workspace(**{name: buffer[:tokens] for name, buffer in vars(self).items()})


@dataclass(frozen=True)
class Attention:
    """What attention needs besides the layer's weights; the same for every layer of a step."""

    positions: Tensor
    kv_index: Tensor
    plan: Any
    rope: Rope
    scale: float


def attend(ops: Ops, layer: Layer, w: Workspace, step: Attention, k_cache: Tensor, v_cache: Tensor) -> None:
    """w.attn = attention heads of the normalised w.x; writes this step's keys and values to the caches."""
    ops.linear(w.x, layer.qkv.weight, w.qkv, layer.qkv.bias)
    ops.rope_and_cache(w.qkv, step.positions, step.kv_index, step.rope, k_cache, v_cache, w.q, layer.head_norm)
    ops.attention(w.q, k_cache, v_cache, step.plan, step.scale, w.attn, w.lse)


def project(ops: Ops, layer: Layer, w: Workspace) -> None:
    """w.delta = what attention adds to the residual."""
    ops.linear(w.attn.flatten(1), layer.o.weight, w.delta, layer.o.bias)


def mlp(ops: Ops, layer: Layer, w: Workspace) -> None:
    """w.delta = down(silu(gate(w.x)) * up(w.x)), which is what the MLP adds to the residual."""
    ops.gated_linear(w.x, layer.gate_up.weight, w.gated, w.gate_up, layer.gate_up.bias)
    ops.linear(w.gated, layer.down.weight, w.delta, layer.down.bias)


def keep_rows(ops: Ops, w: Workspace, index: Tensor, into: Workspace) -> Workspace:
    """The rows ``index`` int32 [N] of what goes on after attention, in the first N rows of ``into``."""
    kept = into.first(len(index))
    ops.gather_rows(w.attn.flatten(1), index, kept.attn.flatten(1))
    ops.gather_rows(w.residual, index, kept.residual)
    return kept
