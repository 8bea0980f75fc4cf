"""The sampler's whole-number arithmetic for devices that divide inexactly and have no double, against IEEE's."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from gpu.backend import EMULATOR, SYCL

pytestmark = [
    pytest.mark.skipif(not SYCL, reason="needs the kernels that make sycl-check compiles"),
    pytest.mark.feature("engine", "the SYCL sampler's quotients and shares are IEEE's, without doubles"),
]

SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, 1.1754944e-38, 1.1754942e-38, 3.4028235e38, 3.0]


def call(name: str, *inputs: np.ndarray, out: np.dtype) -> np.ndarray:
    result = np.zeros(len(inputs[0]), out)
    addresses = (ctypes.c_void_p(array.ctypes.data) for array in (*inputs, result))
    getattr(ctypes.CDLL(EMULATOR), name)(*addresses, ctypes.c_int64(len(result)))
    return result


def floats(kind: str, count: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    if kind == "bits":  # every exponent, NaN and infinity
        return random.integers(0, 2**32, count, np.uint32).view(np.float32)
    if kind == "tiny":  # subnormal, or nearly
        return random.integers(0, 2**24, count, np.uint32).view(np.float32)
    if kind == "short":  # quotients that are exact, or halfway between two floats
        return random.integers(1, 5000, count).astype(np.float32)
    return random.uniform(0.5, 2, count).astype(np.float32)


@pytest.mark.parametrize("a", ["bits", "tiny", "short", "near"])
@pytest.mark.parametrize("b", ["bits", "tiny", "short", "near"])
def test_quotients(a: str, b: str) -> None:
    x = np.concatenate([floats(a, 200_000, 1), np.repeat(np.float32(SPECIAL), len(SPECIAL))])
    y = np.concatenate([floats(b, 200_000, 2), np.tile(np.float32(SPECIAL), len(SPECIAL))])
    with np.errstate(all="ignore"):
        want = x / y
    got = call("sycl_divide", x, y, out=np.dtype(np.float32))
    same = (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))
    wrong = np.flatnonzero(~same)
    assert not len(wrong), [(x[i], y[i], got[i], want[i]) for i in wrong[:5]]


def test_shares_of_a_whole_number() -> None:
    """Their products with a double are rounded, and halfway cases are among them."""
    random = np.random.default_rng(3)
    count = 300_000
    total = random.integers(1, 2**53, count, np.uint64, endpoint=True) >> random.integers(0, 53, count, np.uint64)
    total = np.maximum(total, np.uint64(1))
    bits = random.integers(1, np.float32(1).view(np.uint32), count, np.uint32)
    share = np.where(random.random(count) < 0.2, bits.view(np.float32), random.random(count, np.float32))
    share = np.where(random.random(count) < 0.3, random.integers(1, 2**9, count) / 2**9, share).astype(np.float32)
    share = np.maximum(share, np.float32(1e-45))
    want = np.ceil(total.astype(np.float64) * share.astype(np.float64)).astype(np.uint64)
    got = call("sycl_share", total, share, out=np.dtype(np.uint64))
    wrong = np.flatnonzero(got != want)
    assert not len(wrong), [(total[i], share[i], got[i], want[i]) for i in wrong[:5]]
