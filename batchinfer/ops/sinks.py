"""Attention sinks, for backends whose attention gives the log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor


def share_of_keys(lse: Tensor, sinks: Tensor) -> Tensor:
    """[T, H]: what part of exp(lse) + exp(sinks) is exp(lse); as a softmax of pairs, which gives a pair the same bits
    wherever it stands."""
    return torch.stack((lse, sinks.expand_as(lse)), -1).softmax(-1)[..., 0]
