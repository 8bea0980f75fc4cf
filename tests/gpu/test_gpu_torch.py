"""What every GPU backend leaves to torch, against the reference in float64; Triton alone has a LayerNorm of its own."""

from __future__ import annotations

import pytest
import torch
from gpu.backend import put
from gpu.test_gpu_ops import DTYPES, TOLERANCE, TRUTH, assert_close, empty_like, randn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_layer_norm(gpu, dtype, with_bias, with_residual):
    x, weight = randn(7, 576, dtype=dtype) + 1, randn(576, seed=1)
    bias = randn(576, seed=2) if with_bias else None
    residual = randn(7, 576, dtype=dtype, seed=3) if with_residual else None
    summed = x if residual is None else x + residual  # in their dtype, as the residual stream is kept
    want, out = torch.empty(x.shape, dtype=torch.float64), empty_like(x)
    TRUTH.layer_norm(summed.double(), weight.double(), None if bias is None else bias.double(), 1e-5, want)
    stream = None if residual is None else put(residual)
    gpu.layer_norm(put(x), put(weight), None if bias is None else put(bias), 1e-5, out, stream)
    assert_close(out, want)
    assert stream is None or torch.equal(stream.cpu(), summed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["relu", "gelu", "gelu_tanh"])
def test_activations(gpu, dtype, kind):
    x = 4 * randn(5, 70, dtype=dtype)
    want, out = torch.empty(x.shape, dtype=torch.float64), empty_like(x)
    TRUTH.activate(kind, x, want)
    gpu.activate(kind, put(x), out)
    assert_close(out, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_copies_and_soft_caps(gpu, dtype):
    x, residual = randn(5, 70, dtype=dtype), randn(5, 70, dtype=dtype, seed=1)
    stream = put(residual)
    gpu.add(put(x), stream)
    assert torch.equal(stream.cpu(), x + residual)
    out = empty_like(x)
    gpu.copy(put(x)[:, ::2], out[:, 1::2])
    assert torch.equal(out.cpu()[:, 1::2], x[:, ::2])
    logits = 40 * randn(3, 50)
    capped = put(logits)
    gpu.softcap(capped, 30.0)
    assert_close(capped, 30 * torch.tanh(logits.double() / 30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reach", [None, 3])
@pytest.mark.hardware("encoders")
def test_attention_of_whole_texts(gpu, dtype, reach):
    qkv, starts = randn(171, 3, 4, 64, dtype=dtype), [0, 1, 41, 42, 171]
    want, out = torch.empty(qkv[:, 0].shape, dtype=torch.float64), empty_like(qkv[:, 0])
    TRUTH.attend_texts(qkv, starts, 0.125, want, reach)
    gpu.attend_texts(put(qkv), starts, 0.125, out, reach)
    assert_close(out, want, 4 * TOLERANCE[dtype])  # weights are rounded, too
