"""Numbers that an e4m3 KV cache must round rightly, and its codes; for the tests of every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer.ops import AttentionInput
from batchinfer.ops.quantized import FLOAT8


def codes() -> Tensor:
    """All 256, float8_e4m3fn."""
    return torch.arange(256, dtype=torch.uint8).view(FLOAT8)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether these are the same codes; a NaN may have either sign."""
    both = [t.cpu().contiguous().view(torch.uint8) for t in (a, b)]
    return torch.equal(*(t.masked_fill(t == 0xFF, 0x7F) for t in both))


def hard_numbers() -> Tensor:
    """Float32 [1152], all of them bfloat16 numbers, too: what codes stand for, what lies in the middle of two and
    beside it, numbers beyond the ends, infinities and NaN."""
    ends = torch.tensor([448.0, 464.0, 466.0, 480.0, 2.0**100, torch.inf, torch.nan, 2.0**-11, 2.0**-126, 2.0**-133])
    exact = codes()[:127].float()
    middles = (exact[1:] + exact[:-1]) / 2
    beside = [(middles.view(torch.int32) + step * 2**16).view(torch.float32) for step in (-1, 1)]
    sizes = torch.cat([exact, middles, *beside, ends])
    return torch.cat([sizes, -sizes, torch.zeros(1152 - 2 * len(sizes))])


def one_key_each(width: int) -> tuple[Tensor, AttentionInput]:
    """A cache [P, 1, 16, width] in whose pages' first places stand all codes, and a step of sequences of that one key,
    a token each."""
    count = 256 // width
    cache = torch.zeros(count, 1, 16, width).to(FLOAT8)
    cache[:, 0, 0] = codes().view(count, width)
    numbers = torch.arange(count, dtype=torch.int32)
    start = torch.arange(count + 1, dtype=torch.int32)
    return cache, AttentionInput(start, torch.ones_like(numbers), numbers, numbers[:, None].clone())
