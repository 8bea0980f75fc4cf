"""The decoder against transformers: chunked prefill and decode of two sequences over shuffled pages."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from models.tiny_models import BF16, TINY, TinyModel, assert_relative, parity_cases

from batchinfer.models.decoder import Decoder, KVCache, StepInput
from batchinfer.models.files import ModelError
from batchinfer.models.packing import pack
from batchinfer.models.spec import load_spec
from batchinfer.models.weights import load_weights
from batchinfer.ops import AttentionInput, Ops, gpu
from batchinfer.ops.reference import ReferenceOps

PAGE_SIZE = 4
SLOTS = (2, 0)  # of the two sequences; slot 1 stays empty
# Per step: (sequence, first token, one past the last). Decodes come first; prefills are cut anywhere.
STEPS = [
    [(0, 0, 19)],
    [(0, 19, 37), (1, 0, 3)],
    [(0, 37, 38), (1, 3, 41)],
    *[[(0, 38 + i, 39 + i), (1, 41 + i, 42 + i)] for i in range(4)],
    [(0, 42, 43)],
    [(0, 43, 45)],
]


@pytest.fixture(params=["reference", "native"])
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "reference":
        return ReferenceOps()
    pytest.importorskip("batchinfer._ops", reason="the compiled ops are not built")
    from batchinfer.ops import load

    return load("cpu", 2)


def run_steps(decoder: Decoder, model: TinyModel) -> tuple[torch.Tensor, torch.Tensor]:
    """(ours, theirs): logits [rows, V] of the last token of every piece in STEPS."""
    length = model.ids.shape[1]
    pages = -(-length // PAGE_SIZE)
    order = torch.randperm(2 * pages + 3, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    table = torch.full((3, pages), -1, dtype=torch.int32)
    table[SLOTS[0]], table[SLOTS[1]] = order[:pages], order[pages : 2 * pages]
    cache = decoder.new_cache(len(order), PAGE_SIZE)
    ours, theirs = [], []
    for pieces in STEPS:
        positions = [torch.arange(first, last) for _, first, last in pieces]
        slots = torch.tensor([SLOTS[i] for i, _, _ in pieces], dtype=torch.int32)
        index = [
            table[slot, p // PAGE_SIZE].long() * PAGE_SIZE + p % PAGE_SIZE
            for slot, p in zip(slots, positions, strict=True)
        ]
        ends = torch.tensor([0, *(last - first for _, first, last in pieces)]).cumsum(0).to(torch.int32)
        step = StepInput(
            token_ids=torch.cat([model.ids[i, first:last] for i, first, last in pieces]).to(torch.int32),
            positions=torch.cat(positions).to(torch.int32),
            kv_index=torch.cat(index),
            attention=AttentionInput(
                q_start=ends,
                kv_len=torch.tensor([last for _, _, last in pieces], dtype=torch.int32),
                slot=slots,
                page_table=table,
            ),
            sample_row=ends[1:] - 1,
        )
        ours.append(decoder.forward(step, cache)[0].clone())
        theirs.append(torch.stack([model.logits[i, last - 1] for i, _, last in pieces]))
    return torch.cat(ours), torch.cat(theirs)


def make(model: TinyModel, ops: Ops, dtype: torch.dtype) -> Decoder:
    spec = load_spec(str(model.folder))
    length = spec.resolve_length(model.ids.shape[1])
    weights = load_weights(str(model.folder), spec, dtype)
    packed = pack(spec, weights, ops)
    return Decoder(spec, packed, ops, dtype, max_positions=length, max_step_tokens=64, max_samples=4)


@pytest.mark.feature("models", "each architecture gives transformers' logits in float32")
@pytest.mark.parametrize("name", parity_cases("logits", TINY))
@pytest.mark.hardware("logits of every architecture")
def test_float32_is_that_of_transformers(name: str, tiny: Callable[[str], TinyModel], ops: Ops) -> None:
    model = tiny(name)
    ours, theirs = run_steps(make(model, ops, torch.float32), model)
    assert_relative(ours, theirs, 1e-4)


@pytest.mark.feature("models", "bf16 logits within 3e-2 of float32")
@pytest.mark.parametrize("name", parity_cases("logits in bfloat16", BF16))
def test_bfloat16_is_near_float32(name: str, tiny: Callable[[str], TinyModel], ops: Ops) -> None:
    model = tiny(name)
    ours, theirs = run_steps(make(model, ops, torch.bfloat16), model)
    assert (ours - theirs).norm() < 3e-2 * theirs.norm()
    assert (ours - theirs).norm() > 1e-5 * theirs.norm()  # it really ran in bfloat16


def test_float64_ops_leave_only_the_rounding_of_activations(tiny: Callable[[str], TinyModel]) -> None:
    model = tiny("qwen3")
    ours, theirs = run_steps(make(model, ReferenceOps(torch.float64), torch.float32), model)
    assert_relative(ours, theirs, 1e-5)


def test_a_backend_without_an_op_of_the_model_says_so(
    tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    ops = gpu.GpuOps(torch.device("cpu"), ModuleType("no extension"))
    for name, op in (("olmo2", "norm of all heads"), ("mixtral", "mix_experts")):
        with pytest.raises(ModelError, match=rf"{op}, which GpuOps has only with Triton: pip install triton, or set"):
            make(tiny(name), ops, torch.float32)


def test_a_step_without_samples_gives_no_logits(tiny: Callable[[str], TinyModel]) -> None:
    model = tiny("llama")
    decoder = make(model, ReferenceOps(), torch.float32)
    table = torch.zeros(1, 1, dtype=torch.int32)
    one = torch.tensor([0, 2], dtype=torch.int32)
    step = StepInput(
        token_ids=model.ids[0, :2].int(),
        positions=torch.arange(2, dtype=torch.int32),
        kv_index=torch.arange(2),
        attention=AttentionInput(q_start=one, kv_len=one[1:], slot=one[:1], page_table=table),
        sample_row=torch.empty(0, dtype=torch.int32),
    )
    cache = decoder.new_cache(1, PAGE_SIZE)
    assert decoder.forward(step, cache)[0].shape == (0, 97)
    assert cache.k[1][0, :, :2].abs().min() > 0
    assert cache.k[1][0, :, 2:].abs().max() == 0


@pytest.mark.parametrize(("dtype", "item"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_cache_takes_the_memory_it_says(tiny: Callable[[str], TinyModel], dtype: torch.dtype, item: int) -> None:
    model = tiny("mistral-wide-heads")
    decoder = make(model, ReferenceOps(), dtype)
    cache = decoder.new_cache(5, PAGE_SIZE)
    assert cache.k[0].shape == (5, 2, PAGE_SIZE, 32)
    total = sum(tensor.nbytes for tensor in (*cache.k, *cache.v))
    assert total == 5 * KVCache.bytes_per_page(decoder.spec, PAGE_SIZE, dtype) == 5 * 2 * 2 * 2 * PAGE_SIZE * 32 * item


@pytest.mark.model
def test_real_model_from_folder_and_gguf(smollm_dir: Any, smollm_gguf: Any, ops: Ops) -> None:
    """SmolLM2-135M: logits of transformers in float32, and the same bits from both containers."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(3, 49152, (2, 45), generator=torch.Generator().manual_seed(0))
    reference = AutoModelForCausalLM.from_pretrained(smollm_dir, dtype=torch.float32).eval()
    with torch.inference_mode():
        model = TinyModel(smollm_dir, ids, reference(ids).logits)
    ours, theirs = run_steps(make(model, ops, torch.float32), model)
    assert_relative(ours, theirs, 1e-4)
    low, _ = run_steps(make(model, ops, torch.bfloat16), model)
    assert (low - ours).norm() < 2e-2 * ours.norm()
    folder, gguf = (dict(load_weights(str(p), load_spec(str(p)), torch.bfloat16)) for p in (smollm_dir, smollm_gguf))
    assert folder.keys() == gguf.keys()
    assert all(torch.equal(folder[name], gguf[name]) for name in folder)
