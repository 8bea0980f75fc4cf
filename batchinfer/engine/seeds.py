"""Seeds that depend on what is drawn, never on when or where: the reason why a row keeps its tokens on any rank."""

from __future__ import annotations

_MASK = 2**64 - 1


def mix(value: int) -> int:
    """The SplitMix64 finaliser (Steele, Lea & Flood 2014): a bijection on 64-bit words that spreads every bit."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def sample_seed(request_seed: int, sample_index: int) -> int:
    """64-bit seed of one sample of a request."""
    return mix(mix(request_seed) ^ sample_index)
