"""The plain torch truth of ``mix_experts``: token by token, one expert after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from batchinfer.ops import Experts


def mix(x: Tensor, router: Tensor, experts: Experts, product: Callable[[Tensor, object], Tensor]) -> Tensor:
    """[T, D] in the dtype of x [T, D] and ``router``. ``product(row, weight)``: row [K] times a packed weight."""
    mixed = torch.zeros_like(x)
    for t, row in enumerate(x):
        weights = choose(router[t, : experts.choices], experts)
        if experts.shared:
            one = router[t, -1].sigmoid() if experts.shared_gate else torch.ones_like(router[t, 0])
            weights.append((len(experts.down) - 1, one))
        for j, weight in weights:
            biased = experts.gate_up_bias is not None and j < experts.choices
            both = product(row, experts.gate_up[j]) + (experts.gate_up_bias[j] if biased else 0)
            done = product(gated(both, experts), experts.down[j]) + (experts.down_bias[j] if biased else 0)
            mixed[t] += weight * done
    return mixed


def choose(logits: Tensor, experts: Experts) -> list[tuple[int, Tensor]]:
    """(expert, weight) of one token, the experts in ascending order."""
    scores = logits.softmax(0) if experts.scores == "softmax" else logits.sigmoid()
    keys = scores if experts.correction is None else scores + experts.correction
    groups = keys.view(experts.groups, -1)
    best = groups.topk(1 if experts.scores == "softmax" else min(2, groups.shape[1])).values.sum(1)
    kept = torch.zeros(experts.groups, dtype=torch.bool)
    kept[best.argsort(descending=True, stable=True)[: experts.kept_groups]] = True
    keys = groups.masked_fill(~kept[:, None], -torch.inf).flatten()
    chosen = sorted(keys.argsort(descending=True, stable=True)[: experts.top_k].tolist())
    total = scores[chosen].sum() if experts.renormalise else 1.0
    return [(j, scores[j] / total * experts.scale) for j in chosen]


def gated(both: Tensor, experts: Experts) -> Tensor:
    """[I] of the gates and values [2*I]."""
    gate, up = both.chunk(2)
    if experts.clamp is None:
        return gate * gate.sigmoid() * up
    limit = experts.clamp.limit
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * (experts.clamp.alpha * gate).sigmoid() * (up + 1)
