"""Attention of whole texts by torch's own fused kernels, which every device that torch knows has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class TextAttention:
    """The op ``attend_texts`` of backends without a kernel of their own for it."""

    def attend_texts(self, qkv: Tensor, starts: Sequence[int], scale: float, out: Tensor) -> None:
        if qkv.ndim != 4 or qkv.shape[1] != 3 or out.shape != qkv[:, 0].shape or out.dtype is not qkv.dtype:
            raise ValueError(f"qkv {tuple(qkv.shape)} and out {tuple(out.shape)} must be [T, 3, H, E] and [T, H, E]")
        for begin, end in pairwise(starts):  # one by one: a text's sums are then the same in every batch
            q, k, v = qkv[begin:end].permute(1, 2, 0, 3).unsqueeze(1)
            out[begin:end] = scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)
