"""Attention of whole texts by torch's own fused kernels, which every device that torch knows has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

QUERIES = 512
"""That look at their neighbourhood together: with 64 tokens to see on either side, a fifth of the scores are masked."""


class TextAttention:
    """The op ``attend_texts`` of backends without a kernel of their own for it."""

    def attend_texts(
        self, qkv: Tensor, starts: Sequence[int], scale: float, out: Tensor, reach: int | None = None
    ) -> None:
        if qkv.ndim != 4 or qkv.shape[1] != 3 or out.shape != qkv[:, 0].shape or out.dtype is not qkv.dtype:
            raise ValueError(f"qkv {tuple(qkv.shape)} and out {tuple(out.shape)} must be [T, 3, H, E] and [T, H, E]")
        for begin, end in pairwise(starts):  # one by one: a text's sums are then the same in every batch
            q, k, v = qkv[begin:end].permute(1, 2, 0, 3).unsqueeze(1)
            for first, last, left, right in _blocks(end - begin, reach):
                seen = None if reach is None else _near(first, last, left, right, reach, qkv.device)
                keys, values = k[:, :, left:right], v[:, :, left:right]
                part = scaled_dot_product_attention(q[:, :, first:last], keys, values, attn_mask=seen, scale=scale)
                out[begin + first : begin + last] = part[0].transpose(0, 1)


def _blocks(length: int, reach: int | None) -> list[tuple[int, int, int, int]]:
    """Ranges of queries and the keys that some of them see."""
    if reach is None:
        return [(0, length, 0, length)]
    return [
        (first, min(first + QUERIES, length), max(first - reach, 0), min(first + QUERIES + reach, length))
        for first in range(0, length, QUERIES)
    ]


def _near(first: int, last: int, left: int, right: int, reach: int, device: torch.device) -> Tensor:
    """bool [queries, keys]: those not too far from each other."""
    query, key = torch.arange(first, last, device=device), torch.arange(left, right, device=device)
    return (query[:, None] - key).abs() <= reach
