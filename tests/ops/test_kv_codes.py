"""int8 KV caches: what is written to them, what a bad key does, and who has none."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from ops.test_attention import ISAS, attend, make_case, native
from ops.test_elementwise import rope_cases

from batchinfer.arguments import token_ids
from batchinfer.config import EngineConfig
from batchinfer.engine.kv_dtype import check_kv_dtype
from batchinfer.llm import LLM
from batchinfer.ops import gpu
from batchinfer.ops.quantized import decode_kv, encode_kv
from batchinfer.ops.reference import ReferenceOps
from batchinfer.types import JobError, SamplingParams

isas = pytest.mark.parametrize("isa", ISAS)


def test_a_head_is_off_by_half_a_step_at_most() -> None:
    heads = (
        torch.randn(50, 3, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 50)[:, None, None]
    )
    heads[0, 0] = 0.0
    rows = encode_kv(heads)
    assert rows.shape == (50, 3, 28)
    error = (decode_kv(rows, torch.float64) - heads.double()).abs()
    assert (error <= 0.501 * heads.abs().amax(dim=2, keepdim=True) / 127).all()


@pytest.mark.feature("CPU kernels", "KV cache of 8-bit codes with a scale for each head of a token")
@isas
@settings(max_examples=15, deadline=None)
@given(case=rope_cases())
@pytest.mark.hardware("KV cache in 8 bits")
def test_what_is_written_is_the_float32_cache_as_codes(isa: str, case: dict) -> None:
    """The same bits, and nothing beside the step's tokens."""
    whole = case | {name: torch.zeros(case[name].shape) for name in ("k_cache", "v_cache", "q_out")}
    codes = case | {name: encode_kv(whole[name]) for name in ("k_cache", "v_cache")}
    codes["q_out"] = torch.zeros(whole["q_out"].shape)
    native(isa).rope_and_cache(**whole)
    native(isa).rope_and_cache(**codes)
    assert torch.equal(codes["q_out"], whole["q_out"])
    for name in ("k_cache", "v_cache"):
        assert torch.equal(codes[name], encode_kv(whole[name]))


@isas
def test_a_bad_key_does_not_reach_other_sequences(isa: str) -> None:
    case = make_case([(1, 90), (20, 20), (1, 130)], dtype=torch.int8)
    clean, _ = attend(native(isa), case)
    page = case.inputs.page_table[case.inputs.slot[0], 2]
    keys = decode_kv(case.k_cache[page], torch.float32)
    keys[1, 3, 5] = torch.inf
    case.k_cache[page] = encode_kv(keys)
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
    for kept in ("int8", "fp32"):
        with pytest.raises(JobError, match=rf"engine.kv_dtype={kept} with engine.dtype=auto .* engine.kv_dtype=auto"):
            check_kv_dtype(EngineConfig(kv_dtype=kept), ops)
        check_kv_dtype(EngineConfig(kv_dtype=kept), ReferenceOps())


@pytest.mark.model
@pytest.mark.feature("models", "engine.kv_dtype=int8 within a bound of the float32 cache, in half the memory of bf16")
def test_a_real_model_with_an_int8_cache(smollm_gguf: Path) -> None:
    """The README has what 64 prompts give; the bounds here are wider."""
    found: dict[str, np.ndarray] = {}
    for kept in ("fp32", "int8"):
        llm = LLM(str(smollm_gguf), device="cpu", dtype="fp32", kv_dtype=kept, threads=2, num_pages=64, max_slots=8)
        if not found:
            prompts = ["The capital of France is", "Water boils at", "Once upon a time", "def fibonacci(n):"]
            prompts = token_ids(prompts, llm._engine.tokenizer)
            added = [c.samples[0].token_ids for c in llm.generate(prompts, SamplingParams(max_tokens=24))]
        found[kept] = np.concatenate([c.samples[0].logprobs.chosen for c in llm.score(prompts, added)])
        llm.close()
    off = found["int8"] - found["fp32"]
    assert abs(off.mean()) < 0.03
    assert 0 < np.abs(off).mean() < 0.06
