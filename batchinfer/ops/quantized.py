"""Matrices kept as small codes, and how activations become codes beside them: what every backend computes.

A weight is ``scale * code + minimum``. With blocks, both belong to so many weights along K, as in the formats of GGUF;
without, each output has a scale, and its minimum is -128 scales (int8). In a product with such a matrix the activations
are codes too, signed bytes with a scale for each token (int8) or each of its blocks: dynamic quantisation, as in
Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339, without its outliers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ZERO = 128
"""The code of 0 where there are no minima."""

LARGEST = 127
"""Code of an activation that is the largest of its block."""

SMALLEST = torch.finfo(torch.float32).tiny
"""Scales below are as good as 0; their inverse may be infinite."""


@dataclass(frozen=True)
class Quantized:
    """A matrix [N, K]: ``codes`` uint8 [N, K], below 2**``bits`` (4 or 8). ``scales`` and ``minima`` float16
    [N, K / block], a block being 16 or 32; or float32 [N] and None."""

    codes: Tensor
    scales: Tensor
    minima: Tensor | None = None
    bits: int = 8

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.codes.shape)

    @property
    def block(self) -> int:
        """Weights with a scale of their own; all K of them without minima."""
        return self.codes.shape[1] // (1 if self.minima is None else self.scales.shape[1])

    def chosen(self, rows: Sequence[int]) -> Quantized:
        """The matrix of these rows alone."""
        minima = None if self.minima is None else self.minima[list(rows)]
        return Quantized(self.codes[list(rows)], self.scales[list(rows)], minima, self.bits)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weights that the codes stand for, computed in ``dtype``."""
        codes = self.codes.to(dtype)
        if self.minima is None:
            return (codes - ZERO) * self.scales.to(dtype)[:, None]
        blocks = codes.unflatten(1, (-1, self.block)) * self.scales.to(dtype)[..., None]
        return (blocks + self.minima.to(dtype)[..., None]).flatten(1)


def int8(weight: Tensor) -> Quantized:
    """Codes of a matrix of any dtype, symmetric: the largest of each output is 127 scales."""
    scales = weight.abs().amax(dim=1).float() / LARGEST
    codes = (weight.float() / scales.clamp(min=SMALLEST)[:, None]).round_()
    return Quantized((codes + ZERO).to(torch.uint8), scales)


def encode(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Activations [T, K] as codes -127..127 (float32) [T, K / block, block] and scales float32 [T, K / block, 1]: the
    same integers on every machine. A block that is not finite has a scale of NaN."""
    blocks = x.float().unflatten(1, (-1, block))
    largest = blocks.abs().amax(dim=2, keepdim=True)
    scales = torch.where(largest.isfinite(), largest / LARGEST, torch.nan)
    return (blocks * torch.where(scales >= SMALLEST, 1 / scales, 0.0)).round(), scales


FLOAT8 = torch.float8_e4m3fn
"""A KV cache's numbers in 8 bits: sign, 4 bits of exponent, 3 of mantissa, up to 448 (Micikevicius et al. 2022,
arXiv:2209.05433). NVIDIA's and the OCP's e4m3, not the one of AMD's MI300."""

LARGEST_FLOAT8 = 448.0

KV_SCALE_BYTES = 4
"""Behind the codes of a head in an int8 KV cache: their scale, float32."""


def kv_row(width: int, dtype: torch.dtype) -> int:
    """Entries of a key or value of ``width`` elements in a KV cache of ``dtype``."""
    return width + KV_SCALE_BYTES if dtype is torch.int8 else width


def encode_kv(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values [..., E] as the rows of a KV cache of ``dtype``.

    int8 [..., E + 4]: every head as one block of :func:`encode`, then its scale. float8_e4m3fn [..., E]: each number by
    itself, in float32, rounded to nearest even; beyond 448 it becomes 448, infinity too, and NaN stays NaN. It has no
    scales: from 1/64 to 448 numbers have the same 3 bits behind their first, and a scale only moves that range. With
    one for each head SmolLM2's greedy tokens are float32's in 98 % of places, without in 97 (int8: 99); but rows
    would no longer be whole 16-byte pieces, which the GPUs' copies want.
    """
    if dtype is FLOAT8:
        return heads.float().clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(FLOAT8)
    if dtype is not torch.int8:
        return heads.to(dtype)
    codes, scales = encode(heads.flatten(0, -2), heads.shape[-1])
    rows = torch.cat((codes.flatten(1).to(torch.int8), scales.flatten(1).view(torch.int8)), dim=1)
    return rows.view(*heads.shape[:-1], -1)


def decode_kv(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What the rows of a KV cache stand for, in ``dtype``."""
    if rows.dtype is not torch.int8:
        return rows.to(dtype)
    codes, scales = rows[..., :-KV_SCALE_BYTES], rows[..., -KV_SCALE_BYTES:]
    return codes.to(dtype) * scales.contiguous().view(torch.float32).to(dtype)


def product(x: Tensor, weight: Quantized, dtype: torch.dtype) -> Tensor:
    """x [T, K] @ weight.T in ``dtype``, after encoding x."""
    codes, scales = encode(x, weight.block)
    return (codes.to(dtype) * scales.to(dtype)).flatten(1) @ weight.dense(dtype).T
