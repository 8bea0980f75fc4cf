"""The whole engine against transformers in float32: the same tokens, however the work is cut and shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.model, pytest.mark.slow]

NEW_TOKENS = 64


@pytest.fixture(scope="module")
def prompts(smollm_dir: Path, prompts_path: Path) -> list[list[int]]:
    """Token ids of the 64 prompts, rendered by transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm_dir)
    rows = pq.read_table(prompts_path, columns=["messages"])["messages"].to_pylist()
    render = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return [tokenizer.apply_chat_template(row, **render)["input_ids"] for row in rows]


@pytest.fixture(scope="module")
def expected(smollm_dir: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates greedily in float32, each prompt without padding beside prompts of its length."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm_dir, dtype=torch.float32).eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), 16):
        group = order[start : start + 16]
        width = max(len(prompts[i]) for i in group)
        ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in group])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in group])
        with torch.inference_mode():
            new = model.generate(
                ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
            )[:, width:]
        for i, row in zip(group, new.tolist(), strict=True):
            out[i] = row
    return out


def generate(model: Path, prompts: list[list[int]], **options: Any) -> tuple[list[np.ndarray], Any]:
    from batchinfer import LLM, SamplingParams

    llm = LLM(str(model), max_model_len=1024, **options)
    done = llm.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
    stats = llm.stats()
    llm.close()
    return [c.samples[0].token_ids for c in done], stats


@pytest.fixture(scope="module")
def whole(smollm_dir: Path, prompts: list[list[int]]) -> list[np.ndarray]:
    """Our tokens in float32 with nothing in the way: room for everything."""
    tokens, stats = generate(smollm_dir, prompts, dtype="fp32")
    assert stats.preemptions == 0
    return tokens


@pytest.mark.feature("engine", "the real model's greedy tokens are those of transformers in float32")
def test_greedy_tokens_are_those_of_transformers(whole: list[np.ndarray], expected: list[list[int]]) -> None:
    different = [i for i, (ours, theirs) in enumerate(zip(whole, expected, strict=True)) if ours.tolist() != theirs]
    assert different == []


@pytest.mark.feature("engine", "the real model's greedy tokens are those of transformers in float32")
def test_chunked_prefill_prefix_cache_and_preemption_change_nothing(
    smollm_dir: Path, prompts: list[list[int]], whole: list[np.ndarray]
) -> None:
    """A pool of 60 pages holds about four of the 64 sequences, and no prompt's prefill fits into one step."""
    tokens, stats = generate(
        smollm_dir,
        prompts,
        dtype="fp32",
        num_pages=60,
        max_slots=16,
        max_step_tokens=48,
        page_size=8,
        expected_share=0.05,
    )
    assert stats.preemptions > 0
    assert stats.cached_prompt_tokens > 0
    assert [t.tolist() for t in tokens] == [t.tolist() for t in whole]


def test_tokens_do_not_depend_on_the_batch_in_bf16(smollm_dir: Path, prompts: list[list[int]]) -> None:
    wide, _ = generate(smollm_dir, prompts[:16])
    narrow, _ = generate(smollm_dir, prompts[:16], max_slots=3, max_step_tokens=100, prefix_cache=False, threads=1)
    assert [t.tolist() for t in narrow] == [t.tolist() for t in wide]


@pytest.mark.feature("engine", "the real model's log-probabilities of given texts are those of transformers in float32")
def test_scores_are_those_of_transformers(smollm_dir: Path, prompts: list[list[int]]) -> None:
    """Within 1e-4 in float32, and the same tokens count as greedy; the LM head works in slices of 8 rows."""
    import torch
    from transformers import AutoModelForCausalLM

    from batchinfer import LLM

    model = AutoModelForCausalLM.from_pretrained(smollm_dir, dtype=torch.float32).eval()
    chosen = prompts[:12]
    starts = [1 if i % 3 == 0 else len(ids) // 2 for i, ids in enumerate(chosen)]
    llm = LLM(str(smollm_dir), max_model_len=1024, dtype="fp32", max_step_tokens=64, max_slots=8)
    done = llm.score(
        [i[:s] for i, s in zip(chosen, starts, strict=True)], [i[s:] for i, s in zip(chosen, starts, strict=True)]
    )
    llm.close()
    for ids, start, completion in zip(chosen, starts, done, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].double().log_softmax(1)[start - 1 : -1]
        sample = completion.samples[0]
        assert sample.logprobs is not None
        tokens = torch.tensor(ids[start:])
        theirs = expected.gather(1, tokens[:, None])[:, 0].numpy()
        np.testing.assert_allclose(sample.logprobs.chosen, theirs, atol=1e-4)
        assert abs(sample.logprobs.chosen.sum(dtype=np.float64) - theirs.sum()) < 1e-4 * max(1.0, abs(theirs.sum()))
        assert sample.logprobs.top_ids[:, 0].tolist() == expected.argmax(1).tolist()


@pytest.mark.feature("tasks", "embed: the real model's vectors are those of transformers in float32")
def test_vectors_are_those_of_transformers(smollm_dir: Path, prompts: list[list[int]]) -> None:
    """Prompts that are cut into several steps; within 1e-4 of a vector of length 1."""
    import torch
    from transformers import AutoModel

    from batchinfer import LLM
    from batchinfer.config import EmbedConfig

    model, chosen = AutoModel.from_pretrained(smollm_dir, dtype=torch.float32).eval(), prompts[:12]
    for pooling in ("last", "mean"):
        options = {"dtype": "fp32", "max_model_len": 1024, "max_step_tokens": 64, "max_slots": 8}
        llm = LLM(str(smollm_dir), task="embed", embed=EmbedConfig(pooling=pooling), **options)
        done = llm.vectors(chosen)
        llm.close()
        for ids, completion in zip(chosen, done, strict=True):
            with torch.inference_mode():
                states = model(torch.tensor([ids])).last_hidden_state[0].double()
            pooled = states[-1] if pooling == "last" else states.mean(0)
            expected = torch.nn.functional.normalize(pooled, dim=0).numpy()
            np.testing.assert_allclose(completion.samples[0].vector, expected, atol=1e-4)
