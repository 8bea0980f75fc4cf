"""GGUF's blocks as codes: the same weights as the ``gguf`` package's dequantisation."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from batchinfer.models.gguf_blocks import FORMS, Form, codes_of
from batchinfer.ops.quantized import Quantized

HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
HALVES["Q6_K"] = (208,)
"""Where a block has numbers in float16; all else may be any bytes."""


def random_blocks(kind: str, rows: int, blocks: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    raw = rng.integers(0, 256, (rows * blocks, size), np.uint8)
    for at in HALVES[kind]:
        raw[:, at : at + 2] = rng.uniform(0.0005, 0.02, (len(raw), 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.feature("models", "GGUF weights kept quantised on the CPU: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K")
@pytest.mark.parametrize("kind", FORMS)
def test_codes_are_the_packages_weights(kind: str) -> None:
    raw = random_blocks(kind, 5, 3)
    want = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])).double()
    codes, scales, minima = (torch.from_numpy(part) for part in codes_of(raw, kind))
    kept = Quantized(codes, scales, minima, FORMS[kind].bits)
    assert (kept.shape, kept.block) == (tuple(want.shape), FORMS[kind].block)
    assert int(codes.max()) < 2**kept.bits
    # Exact but for the rounding of the package's float32, and of the products of super-blocks.
    exact = kind.endswith(("0", "1"))
    sizes = Quantized(codes, scales.abs(), minima.abs(), kept.bits).dense(torch.float64)
    assert ((kept.dense(torch.float64) - want).abs() <= sizes * (2**-22 if exact else 2**-11)).all()


def test_scales_that_are_no_numbers_are_refused() -> None:
    raw = random_blocks("Q8_0", 2, 2)
    raw[0, :2] = np.array([np.inf], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="not a finite number of float16"):
        codes_of(raw, "Q8_0")


def test_forms_that_are_kept_together() -> None:
    assert Form(4) | Form(8) == Form(8)
    assert FORMS["Q4_K"] | FORMS["Q6_K"] == Form(8, 16)
