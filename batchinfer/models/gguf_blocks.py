"""GGUF's block formats as codes with scales and minima, which the ops keep as they are.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. A weight of a block is scale * code + minimum,
with code unsigned; formats with signed numbers have a constant offset in the minimum. The formats of super-blocks (K)
make scale and minimum of a block of two numbers each; their products are rounded to float16 here, by 2**-11 of
themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Codes uint8 [rows, K], scales and minima float16 [rows, K / block]."""


@dataclass(frozen=True)
class Form:
    """Codes below 2**``bits``, of which ``block`` share a scale."""

    bits: int
    block: int = 32

    def __or__(self, other: Form) -> Form:
        """That in which matrices of both forms can be kept together."""
        return Form(max(self.bits, other.bits), min(self.block, other.block))


FORMS = {
    "Q4_0": Form(4),
    "Q4_1": Form(4),
    "Q5_0": Form(8),
    "Q5_1": Form(8),
    "Q8_0": Form(8),
    "Q4_K": Form(4),
    "Q5_K": Form(8),
    "Q6_K": Form(8, 16),
}
"""Of the types that can be kept. Codes of 5 and 6 bits take 8."""


def codes_of(raw: np.ndarray, kind: str) -> Arrays:
    """Of the bytes uint8 [rows, n] of whole rows of the ggml type ``kind``. ValueError if a scale is not finite."""
    size, unpack = _READERS[kind]
    blocks = raw.reshape(-1, size)
    codes, scales, minima = unpack(blocks)
    if not (np.isfinite(scales).all() and np.isfinite(minima).all()):
        raise ValueError("a block's scale is not a finite number of float16")
    return tuple(part.reshape(len(raw), -1) for part in (codes, scales, minima))


def _halves(blocks: np.ndarray, begin: int) -> np.ndarray:
    return blocks[:, begin : begin + 2].copy().view(np.float16)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[..., n] bytes -> [..., 2n]: all lower halves, then all upper ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """4 bytes -> 32 bits, each in the place of a code's fifth."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


def _q4_0(b: np.ndarray) -> Arrays:
    return _nibbles(b[:, 2:]), _halves(b, 0), -8 * _halves(b, 0)


def _q4_1(b: np.ndarray) -> Arrays:
    return _nibbles(b[:, 4:]), _halves(b, 0), _halves(b, 2)


def _q5_0(b: np.ndarray) -> Arrays:
    return _nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6]), _halves(b, 0), -16 * _halves(b, 0)


def _q5_1(b: np.ndarray) -> Arrays:
    return _nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8]), _halves(b, 0), _halves(b, 2)


def _q8_0(b: np.ndarray) -> Arrays:
    return b[:, 2:] + np.uint8(128), _halves(b, 0), -128 * _halves(b, 0)


def _k_scales(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima float16 [blocks, 8] of Q4_K and Q5_K: of 12 bytes with 6 bits for each of 8 + 8 numbers, times
    the two float16 before them."""
    low, middle, high = (b[:, at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6) << 4], axis=1)
    factor, offset = (_halves(b, at).astype(np.float32) for at in (0, 2))
    return (factor * scales).astype(np.float16), (-offset * minima).astype(np.float16)


def _q4_k(b: np.ndarray) -> Arrays:
    return _nibbles(b[:, 16:].reshape(-1, 4, 32)), *_k_scales(b)


def _q5_k(b: np.ndarray) -> Arrays:
    fifth = np.unpackbits(b[:, 16:48, None], axis=2, bitorder="little").transpose(0, 2, 1) << 4  # [blocks, 8, 32]
    return _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | fifth, *_k_scales(b)


def _q6_k(b: np.ndarray) -> Arrays:
    low, high = b[:, :128].reshape(-1, 2, 64), b[:, 128:192].reshape(-1, 2, 1, 32)
    upper = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3) << 4  # [blocks, 2, 4, 32]
    codes = _nibbles(low).reshape(-1, 2, 4, 32) | upper
    scales = (_halves(b, 208).astype(np.float32) * b[:, 192:208].view(np.int8)).astype(np.float16)
    return codes, scales, -32 * scales


_READERS: dict[str, tuple[int, Callable[[np.ndarray], Arrays]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
}
"""Bytes of a block, and what reads it."""
