"""A mixture of experts by the ops of a CPU: the tokens of each expert are gathered and go through its MLP together.

What is large beside the ops is numpy's, because torch's threads spin for a while when they have worked, on the cores
that the ops' own threads want then: 64 experts of DeepSeek-V2-Lite and 128 tokens took 1.4 s that way on two cores, and
0.09 s this way. The routing is torch's, but only what gives an element the same bits wherever it stands in a tensor:
its elementwise functions do not, where they compute the last few elements another way than the others.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from batchinfer.ops import Experts, Ops

SMALLEST_SUM = 1e-20
"""Of weights that are divided by their sum; as in DeepSeek-V3's own code."""


def mix_by_expert(ops: Ops, x: Tensor, router: Tensor, experts: Experts, out: Tensor) -> None:
    """``Ops.mix_experts`` where ``linear`` gives a row the same bits in any batch, so that this does too."""
    goes, weights = (values.numpy() for values in route(router, experts))
    mixed = np.zeros(x.shape, np.float32)
    for expert in np.flatnonzero(goes.any(axis=0)):
        rows = np.flatnonzero(goes[:, expert])
        mixed[rows] += weights[rows, expert, None] * _mlp(ops, x, rows, experts, expert).numpy()
    np.copyto(out.numpy(), mixed)


def route(router: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    """Which tokens go through which experts, the shared one last: bool, and their weights, float32 [T, experts]."""
    logits = router[:, : experts.choices]
    share = logits.softmax(dim=1) if experts.scores == "softmax" else _sigmoid(logits)
    key = share if experts.correction is None else share + experts.correction
    if experts.kept_groups < experts.groups:
        key = _in_best_groups(key, experts)
    chosen = key.argsort(dim=1, descending=True, stable=True)[:, : experts.top_k]
    goes = torch.zeros(len(router), len(experts.down), dtype=torch.bool, device=router.device)
    goes.scatter_(1, chosen, True)
    weights = torch.zeros(goes.shape, device=router.device).scatter_(1, chosen, share.gather(1, chosen))
    if experts.renormalise:
        weights /= weights.sum(dim=1, keepdim=True).clamp(min=SMALLEST_SUM)
    if experts.scale != 1.0:
        weights *= experts.scale
    if experts.shared:
        goes[:, -1] = True
        weights[:, -1] = _sigmoid(router[:, -1]) if experts.shared_gate else 1.0
    return goes, weights


def _in_best_groups(key: Tensor, experts: Experts) -> Tensor:
    """key [T, choices], but -inf outside of a token's best groups."""
    groups = key.unflatten(1, (experts.groups, -1))
    best = groups.amax(2)
    if experts.scores == "sigmoid":
        best = groups.topk(2, dim=2).values.sum(2)
    kept = best.argsort(dim=1, descending=True, stable=True)[:, : experts.kept_groups]
    inside = torch.zeros(best.shape, dtype=torch.bool, device=key.device).scatter_(1, kept, True)
    return groups.masked_fill(~inside.unsqueeze(2), -torch.inf).flatten(1)


def _sigmoid(x: Tensor) -> Tensor:
    """As the softmax of x and 0, each pair of which is a row by itself."""
    return torch.stack((x, torch.zeros_like(x)), -1).softmax(-1)[..., 0]


def _mlp(ops: Ops, x: Tensor, rows: np.ndarray, experts: Experts, expert: int) -> Tensor:
    """What the expert makes of the rows of x."""
    width = experts.widths[expert]
    mine = x.new_empty(len(rows), x.shape[1])
    gate_up, gated = x.new_empty(len(rows), 2 * width), x.new_empty(len(rows), width)
    in_bias, out_bias = (
        None if bias is None or expert >= experts.choices else bias[expert]
        for bias in (experts.gate_up_bias, experts.down_bias)
    )
    ops.gather_rows(x, torch.from_numpy(rows.astype(np.int32)), mine)
    ops.linear(mine, experts.gate_up[expert], gate_up, in_bias)
    if experts.clamp is not None:  # silu(alpha * gate) / alpha is gate * sigmoid(alpha * gate)
        both, alpha, limit = gate_up.numpy(), np.float32(experts.clamp.alpha), np.float32(experts.clamp.limit)
        gate, up = both[:, :width], both[:, width:]
        np.multiply(np.minimum(gate, limit, out=gate), alpha, out=gate)
        np.divide(np.clip(up, -limit, limit, out=up) + 1, alpha, out=up)
    ops.silu_mul(gate_up, gated)
    ops.linear(gated, experts.down[expert], mine, out_bias)
    return mine
