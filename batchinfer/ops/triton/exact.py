"""The sampler's arithmetic, bit for bit that of ``reference_sampler.py``, which says what it is for and how exact.

Every product and sum is to be rounded by itself: kernels that use this are launched with ``enable_fp_fusion=False``,
and quotients are ``div_rn``, since ``/`` is an approximation in Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNIT = tl.constexpr(2.0**34)  # masses are integers in units of 2**-34


@triton.jit
def exp(x):
    """e**x for x <= 0; 0 below -87."""
    inside = tl.maximum(x, -88.0)
    n = (inside * 1.44269504 + 12582912.0) - 12582912.0
    r = n * 2.12194440e-4 + (n * -0.693359375 + inside)
    p = r * 0.00138144672 + 0.00836878084
    p = p * r + 0.0416683927
    p = p * r + 0.166665196
    p = p * r + 0.49999994
    y = (p * (r * r) + r) + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.0, 0.0, y * power)


@triton.jit
def log(x):
    """Natural logarithm of positive normal numbers."""
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    s = tl.div_rn(f, f + 2.0)
    z = s * s
    p = (z * 0.298851877 + 0.399770796) * z + 0.666667819
    n = k.to(tl.float32)
    return n * 0.693359375 + ((s + s) + (s * (z * p) + n * -2.12194440e-4))


@triton.jit
def mass(x):
    """e**x, x <= 0, in units of 2**-34, int64."""
    return (((exp(x) + 0.00048828125) - 0.00048828125) * UNIT).to(tl.int64)


@triton.jit
def gumbel(word):
    """Gumbel noise of random words uint32."""
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
    rest = 1.0 - v
    lost = (1.0 - rest) - v
    return 0.0 - log(0.0 - (log(rest) + tl.div_rn(lost, rest)))
