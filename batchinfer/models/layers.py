"""The steps of a decoder layer as functions of weights, workspace and ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchinfer.models.lora import Adapters, Rows
from batchinfer.models.model_spec import ModelSpec
from batchinfer.ops import Experts, HeadNorm, Ops, Rope

if TYPE_CHECKING:
    from batchinfer.models.latent import LatentInput, LatentOutput


@dataclass(frozen=True)
class Linear:
    """``weight`` as packed by the ops; ``bias`` float32 [N] or None; ``adapters``: None if all leave it alone."""

    weight: Any
    bias: Tensor | None = None
    adapters: Adapters | None = None

    def __call__(self, ops: Ops, x: Tensor, out: Tensor, rows: Rows) -> None:
        """out = x through weight and bias, and ``rows`` through their adapters too."""
        ops.linear(x, self.weight, out, self.bias)
        if self.adapters is not None and len(rows):
            self.adapters.add(ops, x, rows, out)


@dataclass(frozen=True)
class Norm:
    """RMSNorm, or LayerNorm if ``center``. Weight and bias float32 [D]."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    center: bool = False

    def __call__(self, ops: Ops, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """out = norm(x); with ``residual``, that of residual += x. out may be x."""
        if self.center:
            ops.layer_norm(x, self.weight, self.bias, self.eps, out, residual)
        else:
            ops.rms_norm(x, self.weight, self.eps, out, residual)


@dataclass(frozen=True)
class Mlp:
    """``gate_up`` merged in this order, or what stands for it in an MLP without a gate."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts in the place of an MLP."""

    router: Linear
    experts: Experts


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; norms are None where the architecture has none. qkv is merged in this order."""

    attn_norm: Norm | None
    qkv: Linear | LatentInput
    head_norm: HeadNorm | None
    o: Linear | LatentOutput
    attn_post_norm: Norm | None
    mlp_norm: Norm | None
    mlp: Mlp | Mixture
    mlp_post_norm: Norm | None
    sinks: Tensor | None = None  # float32 [H]


@dataclass(frozen=True)
class Workspace:
    """Activations of a step, shared by all layers: for T tokens the first T rows of each.

    ``residual`` [T, D] is the running sum, ``x`` what attention and MLP read (normalised), ``delta`` what they add.
    """

    residual: Tensor
    x: Tensor
    delta: Tensor  # the memory of x where both have the same dtype
    y: Tensor  # [T, D], attention's part where the MLP goes first
    qkv: Tensor  # [T, (H+2G)*E]
    q: Tensor  # [T, H, E]
    attn: Tensor  # [T, H, E]
    lse: Tensor  # [T, H]
    gate_up: Tensor  # [T, 2*I], or [T, I] without a gate
    gated: Tensor  # [T, I]
    router: Tensor  # [T, X]

    @staticmethod
    def allocate(spec: ModelSpec, tokens: int, ops: Ops, weights: torch.dtype) -> Workspace:
        """Buffers for ``tokens`` tokens of a model whose weights have the dtype ``weights``."""
        h, g, e = spec.heads, spec.kv_heads, spec.head_dim
        kept, read = ops.activations(weights), ops.linear_inputs(weights)

        def buffer(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(tokens, *shape, dtype=dtype, device=ops.device)

        # A mixture gathers rows of x, which only ``linear`` may read shortened.
        x = buffer(read if spec.experts is None else kept, spec.width)
        return Workspace(
            residual=buffer(kept, spec.width),
            x=x,
            delta=x if x.dtype == kept else buffer(kept, spec.width),
            y=buffer(kept, spec.width if spec.parallel else 0),
            qkv=buffer(kept, (h + 2 * g) * e),
            q=buffer(kept, h, e),
            attn=buffer(kept if spec.sinks else read, h, e),  # sinks scale it, and it is rounded once
            lse=buffer(torch.float32, h),
            gate_up=buffer(kept, (1 + spec.gated) * spec.mlp_width),
            gated=buffer(read, spec.mlp_width),
            router=buffer(torch.float32, 0 if spec.experts is None else spec.experts.logits),
        )

    def first(self, tokens: int) -> Workspace:
        """The same buffers, for a step of ``tokens`` tokens."""
        return Workspace(**{name: buffer[:tokens] for name, buffer in vars(self).items()})


@dataclass(frozen=True)
class Copies:
    """C pages of the cache, ``target`` int32 [C], that become copies of others, ``source`` int32 [C]: what a sequence
    of the step computes is there for another that begins alike."""

    source: Tensor
    target: Tensor


@dataclass(frozen=True)
class Attention:
    """What attention needs besides the layer's weights; the same for every layer of a kind in a step."""

    positions: Tensor
    kv_index: Tensor
    plan: Any
    rope: Rope | None
    scale: float
    softcap: float
    copies: Copies | None = None


def normed(ops: Ops, norm: Norm | None, w: Workspace, pending: bool) -> Tensor:
    """What attention or MLP reads: the residual through ``norm``. ``pending``: w.delta is still to be added."""
    if norm is None:
        if pending:
            ops.add(w.delta, w.residual)
        return w.residual
    norm(ops, w.delta if pending else w.residual, w.x, w.residual if pending else None)
    return w.x


def attend(
    ops: Ops,
    layer: Layer,
    x: Tensor,
    w: Workspace,
    step: Attention,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Rows = (),
) -> None:
    """w.attn = attention heads of x; writes this step's keys and values to the caches."""
    layer.qkv(ops, x, w.qkv, rows)
    ops.rope_and_cache(w.qkv, step.positions, step.kv_index, step.rope, k_cache, v_cache, w.q, layer.head_norm)
    if step.copies is not None:
        ops.copy_pages(k_cache, v_cache, step.copies.source, step.copies.target)
    ops.attention(w.q, k_cache, v_cache, step.plan, step.scale, w.attn, w.lse, step.softcap)
    if layer.sinks is not None:
        ops.sink(w.attn, w.lse, layer.sinks)


def project(ops: Ops, layer: Layer, w: Workspace, out: Tensor, rows: Rows = ()) -> None:
    """out = what attention adds to the residual."""
    layer.o(ops, w.attn.flatten(1), out, rows)
    if layer.attn_post_norm is not None:
        layer.attn_post_norm(ops, out, out)


def feed(ops: Ops, spec: ModelSpec, layer: Layer, x: Tensor, w: Workspace, rows: Rows = ()) -> None:
    """w.delta = what the MLP adds to the residual. x may be w.x."""
    if isinstance(layer.mlp, Mixture):
        _mix(ops, layer.mlp, x, w)
    else:
        _mlp(ops, spec, layer.mlp, x, w, rows)
    if layer.mlp_post_norm is not None:
        layer.mlp_post_norm(ops, w.delta, w.delta)


def _mlp(ops: Ops, spec: ModelSpec, mlp: Mlp, x: Tensor, w: Workspace, rows: Rows) -> None:
    if spec.fused_gate and mlp.gate_up.adapters is None:
        ops.gated_linear(x, mlp.gate_up.weight, w.gated, w.gate_up, mlp.gate_up.bias)
    else:
        mlp.gate_up(ops, x, w.gate_up, rows)
        if spec.fused_gate:  # on a CPU the same bits as in one op
            ops.silu_mul(w.gate_up, w.gated)
        elif spec.gated:
            ops.gelu_mul(w.gate_up, w.gated)
        else:
            ops.activate(spec.activation, w.gate_up, w.gated)
    mlp.down(ops, w.gated, w.delta, rows)


def _mix(ops: Ops, mixture: Mixture, x: Tensor, w: Workspace) -> None:
    ops.linear(x, mixture.router.weight, w.router, mixture.router.bias)
    ops.mix_experts(x, w.router, mixture.experts, w.delta)


def keep_rows(ops: Ops, w: Workspace, index: Tensor, into: Workspace) -> Workspace:
    """The rows ``index`` int32 [N] of what goes on after attention, in the first N rows of ``into``."""
    kept = into.first(len(index))
    ops.gather_rows(w.attn.flatten(1), index, kept.attn.flatten(1))
    ops.gather_rows(w.residual, index, kept.residual)
    return kept
