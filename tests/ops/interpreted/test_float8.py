"""KV caches of e4m3 in Triton: written and read exactly, and attention over them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu.test_gpu_attention import draw_lengths, make_case
from ops.float8_cases import codes, hard_numbers, one_key_each, same

from batchinfer.ops.quantized import FLOAT8, encode_kv

BF16, F16, WIDTH = torch.bfloat16, torch.float16, 64  # the interpreter has no products in bfloat16


@pytest.mark.feature("Triton kernels (interpreted)", "KV cache of e4m3, written and read exactly")
def test_numbers_are_written_and_read_exactly(ops):
    x = hard_numbers().view(-1, WIDTH)
    qkv, index = torch.cat([torch.zeros_like(x), x, x], 1).to(BF16), torch.arange(len(x))
    caches = [torch.zeros(2, 1, 16, WIDTH).to(FLOAT8) for _ in "kv"]
    ops.rope_and_cache(qkv, index.int(), index, None, *caches, torch.empty(len(x), 1, WIDTH, dtype=BF16))
    for cache in caches:
        assert same(cache.view(-1, WIDTH)[: len(x)], encode_kv(x, FLOAT8))

    cache, step = one_key_each(WIDTH)
    finite = torch.where(cache.float().isnan(), 0.0, cache.float()).to(FLOAT8)
    heads = 4
    q = torch.eye(WIDTH, dtype=F16)[:heads].expand(len(cache), -1, -1).contiguous()
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
    ops.attention(q, finite, cache, ops.plan_attention(step, heads, finite), 1.0, out, lse)
    values = codes().float().view(-1, 1, WIDTH).expand(out.shape)
    torch.testing.assert_close(out.float(), values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(lse, finite[:, 0, 0, :heads].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (37, 3.0)])
def test_mixed_batches(ops, window, softcap):
    case = make_case((6, 2, 32), F16, draw_lengths(38, 5, 100))
    case = replace(case, k=encode_kv(case.k, FLOAT8), v=encode_kv(case.v, FLOAT8), window=window, softcap=softcap)
    out, lse = torch.empty_like(case.q), torch.empty(case.q.shape[:2])
    plan = ops.plan_attention(case.inputs, 6, case.k, window)
    ops.attention(case.q, case.k, case.v, plan, 0.3, out, lse, softcap)
    want, want_lse = case.truth(0.3)
    assert ((out.double() - want).abs() / (2 + 2 * want.abs())).max() <= 2.0**-11
    assert (lse.double() - want_lse).abs().max() <= 1e-4


def test_float8_beside_other_activations_is_refused(ops):
    case = make_case((2, 1, 16), torch.float32, [(1, 5)])
    k, v = (encode_kv(cache, FLOAT8) for cache in (case.k, case.v))
    plan, out = ops.plan_attention(case.inputs, 2, k), torch.empty_like(case.q)
    with pytest.raises(ValueError, match=r"k_cache has dtype torch.float8_e4m3fn: torch.float32 is needed"):
        ops.attention(case.q, k, v, plan, 0.3, out, torch.empty(out.shape[:2]))
