"""A mixture of experts by other ops: the tokens of each expert are gathered and go through its MLP together."""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer.ops import Experts, Ops


def mix_by_expert(ops: Ops, x: Tensor, router: Tensor, experts: Experts, out: Tensor) -> None:
    """``Ops.mix_experts`` where ``linear`` gives a row the same bits in any batch, so that this does too."""
    choices = len(experts.down) - experts.shared
    share = router[:, :choices].softmax(dim=1)
    chosen = share.argsort(dim=1, descending=True, stable=True)[:, : experts.top_k]
    weights = torch.zeros_like(router)
    weights.scatter_(1, chosen, share.gather(1, chosen))
    if experts.renormalise:
        weights /= weights.sum(dim=1, keepdim=True)
    goes = torch.zeros(router.shape, dtype=torch.bool, device=x.device).scatter_(1, chosen, True)
    if experts.shared:
        goes[:, -1] = True
        weights[:, -1] = router[:, -1].sigmoid()
    mixed = torch.zeros_like(x)
    for expert in goes.any(dim=0).nonzero().flatten().tolist():
        rows = goes[:, expert].nonzero().flatten()
        mixed[rows] += weights[rows, expert, None] * _mlp(ops, x, rows, experts, expert)
    out.copy_(mixed)


def _mlp(ops: Ops, x: Tensor, rows: Tensor, experts: Experts, expert: int) -> Tensor:
    """What the expert makes of the rows of x."""
    width = experts.widths[expert]
    mine = x.new_empty(len(rows), x.shape[1])
    gate_up, gated = x.new_empty(len(rows), 2 * width), x.new_empty(len(rows), width)
    ops.gather_rows(x, rows.int(), mine)
    ops.linear(mine, experts.gate_up[expert], gate_up)
    ops.silu_mul(gate_up, gated)
    ops.linear(gated, experts.down[expert], mine)
    return mine
