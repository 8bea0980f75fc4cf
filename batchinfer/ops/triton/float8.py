"""e4m3 by the bits: all GPUs can do that, and only the latest have instructions for it. ops/quantized.py says what a KV
cache of it holds."""

from __future__ import annotations

import triton
import triton.language as tl

FLOAT8_SCALE = tl.constexpr(256.0)  # 2**(15 - 7), between the exponents of float16 and e4m3


@triton.jit
def finite(code):
    """float32: the numbers that codes uint8 stand for, where none of them is NaN."""
    # The same bits at the other place make a float16 too small by a power of two, also where it has no exponent.
    bits = ((code & 0x80).to(tl.uint16) << 8) | ((code & 0x7F).to(tl.uint16) << 7)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * FLOAT8_SCALE


@triton.jit
def cached(code, dtype: tl.constexpr):
    """The numbers of a cache's codes uint8, exactly, in a float ``dtype``; of another cache the numbers themselves."""
    number = code
    if code.dtype == tl.uint8:
        number = tl.where((code & 0x7F) == 0x7F, float("nan"), finite(code)).to(dtype)
    return number


@triton.jit
def for_cache(x, dtype: tl.constexpr):
    """Numbers float32 as a cache of elements of ``dtype`` takes them: uint8 are codes, rounded to nearest even, at most
    448; NaN stays NaN."""
    if dtype == tl.uint8:
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # Below 2**-6 codes count in units of 2**-9: that of the last bit of 2**14.
        small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(size < 0x3C800000, small, ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3))
        code = tl.where(size >= 0x43E00000, 0x7E, code)
        code = tl.where(size > 0x7F800000, 0x7F, code)
        number = (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        number = x.to(dtype)
    return number
