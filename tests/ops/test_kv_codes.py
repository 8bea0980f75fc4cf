"""KV caches of 8 bits: what is written to them, what a bad key does, and who has none."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from ops.float8_cases import codes, hard_numbers, one_key_each, same
from ops.test_attention import ISAS, attend, make_case, native
from ops.test_elementwise import rope_cases

from batchinfer.arguments import token_ids
from batchinfer.config import EngineConfig
from batchinfer.engine.kv_dtype import check_kv_dtype
from batchinfer.llm import LLM
from batchinfer.ops import gpu
from batchinfer.ops.quantized import FLOAT8, decode_kv, encode_kv
from batchinfer.ops.reference import ReferenceOps
from batchinfer.types import JobError, SamplingParams

isas = pytest.mark.parametrize("isa", ISAS)


def test_a_head_is_off_by_half_a_step_at_most() -> None:
    heads = (
        torch.randn(50, 3, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 50)[:, None, None]
    )
    heads[0, 0] = 0.0
    rows = encode_kv(heads, torch.int8)
    assert rows.shape == (50, 3, 28)
    error = (decode_kv(rows, torch.float64) - heads.double()).abs()
    assert (error <= 0.501 * heads.abs().amax(dim=2, keepdim=True) / 127).all()


def test_float8_is_rounded_to_the_nearest_number() -> None:
    """By distance in float64; of two that are as near, the one with the even code."""
    x = hard_numbers()
    rows, numbers = encode_kv(x, FLOAT8), codes()[:127].double()
    assert torch.equal(rows.float().isnan(), x.isnan())
    distance = (numbers - x.double().abs().clamp(max=448)[:, None]).abs()
    nearest = distance == distance.amin(1, keepdim=True)
    code = torch.arange(127).expand(nearest.shape).masked_fill(~nearest, 1000)
    first, second = code.amin(1), code.masked_fill(~nearest, -1).amax(1)
    want = torch.where(first % 2 == 0, first, second) | torch.signbit(x).long() << 7
    there = ~x.isnan()
    assert torch.equal(rows.view(torch.uint8)[there].long(), want[there])


@isas
def test_float8_numbers_are_written_and_read_exactly(isa: str) -> None:
    ops, width, x = native(isa), 64, hard_numbers()
    qkv = torch.cat([torch.zeros(len(x) // width, width), x.view(-1, width), x.view(-1, width)], 1)
    index = torch.arange(len(qkv))
    caches = [torch.zeros(2, 1, 16, width).to(FLOAT8) for _ in "kv"]
    ops.rope_and_cache(qkv, index.int(), index, None, *caches, torch.empty(len(qkv), 1, width))
    for cache in caches:
        assert same(cache.flatten()[: len(x)], encode_kv(x, FLOAT8))

    cache, step = one_key_each(width)
    plan = ops.plan_attention(step, width, cache)
    q, out = torch.eye(width).expand(len(cache), -1, -1).contiguous(), torch.empty(len(cache), width, width)
    lse = torch.empty(len(cache), width)
    finite = torch.where(cache.float().isnan(), 0.0, cache.float()).to(FLOAT8)
    ops.attention(q, finite, cache, plan, 1.0, out, lse)
    values = codes().float().view(len(cache), 1, width).expand(out.shape)
    torch.testing.assert_close(out, values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(lse, finite[:, 0, 0].float(), rtol=1e-6, atol=0)


@pytest.mark.feature("CPU kernels", "KV cache of 8-bit codes with a scale for each head of a token, or of e4m3")
@isas
@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8], ids=str)
@settings(max_examples=15, deadline=None)
@given(case=rope_cases())
@pytest.mark.hardware("KV cache in 8 bits")
def test_what_is_written_is_the_float32_cache_as_codes(isa: str, dtype: torch.dtype, case: dict) -> None:
    """The same bits, and nothing beside the step's tokens."""
    whole = case | {name: torch.zeros(case[name].shape) for name in ("k_cache", "v_cache", "q_out")}
    coded = case | {name: encode_kv(whole[name], dtype) for name in ("k_cache", "v_cache")}
    coded["q_out"] = torch.zeros(whole["q_out"].shape)
    native(isa).rope_and_cache(**whole)
    native(isa).rope_and_cache(**coded)
    assert torch.equal(coded["q_out"], whole["q_out"])
    for name in ("k_cache", "v_cache"):
        assert torch.equal(*(t.view(torch.uint8) for t in (coded[name], encode_kv(whole[name], dtype))))


@isas
@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8], ids=str)
def test_a_bad_key_does_not_reach_other_sequences(isa: str, dtype: torch.dtype) -> None:
    case = make_case([(1, 90), (20, 20), (1, 130)], dtype=dtype)
    clean, _ = attend(native(isa), case)
    page = case.inputs.page_table[case.inputs.slot[0], 2]
    keys = decode_kv(case.k_cache[page], torch.float32)
    keys[1, 3, 5] = torch.nan
    case.k_cache[page] = encode_kv(keys, dtype)
    dirty, _ = attend(native(isa), case)
    assert dirty[0, 3:].isnan().all()
    assert torch.equal(dirty[0, :3], clean[0, :3])
    assert torch.equal(dirty[1:], clean[1:])


def test_other_shapes_are_refused() -> None:
    ops, case = native(ISAS[0]), make_case([(1, 30)], dtype=torch.int8)
    plan = ops.plan_attention(case.inputs, 6, case.k_cache)
    out, lse = torch.empty(case.q.shape), torch.empty(case.q.shape[:2])
    with pytest.raises(ValueError, match=r"v_cache has shape .*, 64\): .*, 68\) is needed"):
        ops.attention(case.q, case.k_cache, case.v_cache[..., :64].contiguous(), plan, case.scale, out, lse)
    with pytest.raises(ValueError, match=r"k_cache has dtype torch\.float16"):
        ops.attention(case.q, case.k_cache.half(), case.v_cache, plan, case.scale, out, lse)


def test_a_backend_without_such_a_cache_says_so() -> None:
    ops = gpu.GpuOps(torch.device("cpu"), ModuleType("no extension"))
    check_kv_dtype(EngineConfig(kv_dtype="bf16"), ops)
    check_kv_dtype(EngineConfig(kv_dtype="fp8"), ops)
    for kept, dtype in (("int8", "auto"), ("fp32", "auto"), ("fp8", "fp32")):
        with pytest.raises(JobError, match=rf"kv_dtype={kept} with engine.dtype={dtype} .* engine.kv_dtype=auto"):
            check_kv_dtype(EngineConfig(kv_dtype=kept, dtype=dtype), ops)
        check_kv_dtype(EngineConfig(kv_dtype=kept, dtype=dtype), ReferenceOps())


@pytest.mark.model
@pytest.mark.feature("models", "engine.kv_dtype=int8 and fp8 within a bound of the float32 cache, in half the memory")
def test_a_real_model_with_a_cache_of_8_bits(smollm_gguf: Path) -> None:
    """The README has what 64 prompts give; the bounds here are wider."""
    found: dict[str, np.ndarray] = {}
    for kept in ("fp32", "int8", "fp8"):
        llm = LLM(str(smollm_gguf), device="cpu", dtype="fp32", kv_dtype=kept, threads=2, num_pages=64, max_slots=8)
        if not found:
            prompts = ["The capital of France is", "Water boils at", "Once upon a time", "def fibonacci(n):"]
            prompts = token_ids(prompts, llm._engine.tokenizer)
            added = [c.samples[0].token_ids for c in llm.generate(prompts, SamplingParams(max_tokens=24))]
        found[kept] = np.concatenate([c.samples[0].logprobs.chosen for c in llm.score(prompts, added)])
        llm.close()
    for kept, bound in (("int8", 0.06), ("fp8", 0.2)):
        off = found[kept] - found["fp32"]
        assert abs(off.mean()) < bound / 2
        assert 0 < np.abs(off).mean() < bound
