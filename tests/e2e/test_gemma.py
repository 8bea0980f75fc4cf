"""Gemma 3 270M (`make real-models` fetches it) against transformers in float32: tokenizer, greedy texts, scores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from batchinfer import LLM, SamplingParams

GEMMA = Path(os.environ.get("BATCHINFER_TEST_GEMMA", ""))
NEW_TOKENS = 64

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not GEMMA.is_file(), reason="set BATCHINFER_TEST_GEMMA, or run `make real-models`"),
]


@pytest.fixture(scope="module")
def reference() -> Any:
    """The model as transformers dequantises it."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        GEMMA.parent, gguf_file=GEMMA.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()


@pytest.fixture(scope="module")
def texts(prompts_path: Path) -> list[str]:
    return pq.read_table(prompts_path, columns=["prompt"])["prompt"].to_pylist()


@pytest.fixture(scope="module")
def prompts(texts: list[str]) -> list[list[int]]:
    """Token ids of the 64 prompts, by transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(GEMMA.parent, gguf_file=GEMMA.name)(texts)["input_ids"]


@pytest.fixture(scope="module")
def llm() -> Any:
    """A pool of 200 pages and steps of 256 tokens: prompts are cut, and sequences preempted."""
    pool = {"num_pages": 200, "expected_share": 0.05}
    engine = LLM(str(GEMMA), dtype="fp32", max_model_len=512, max_slots=24, max_step_tokens=256, **pool)
    yield engine
    engine.close()


def last_logits(model: Any, ids: list[int], count: int) -> Any:
    """Logits behind the last ``count`` tokens of a text, one row each."""
    import torch

    with torch.inference_mode():
        return model(torch.tensor([ids]), logits_to_keep=count).logits[0]


@pytest.mark.feature("engine", "a second real model, Gemma 3 270M: greedy tokens and log-probabilities of transformers")
def test_greedy_tokens_are_those_of_transformers(
    llm: LLM, texts: list[str], prompts: list[list[int]], reference: Any
) -> None:
    """Where each token is transformers' most likely one behind those before it, its greedy decoding says the same."""
    done = llm.generate(texts, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
    stats = llm.stats()
    assert stats.preemptions > 0
    for ids, completion in zip(prompts, done, strict=True):
        answer = completion.samples[0].token_ids.tolist()
        assert completion.prompt_tokens == len(ids)
        likely = last_logits(reference, ids + answer, NEW_TOKENS + 1).argmax(1)[:-1]
        assert answer == likely.tolist()


@pytest.mark.feature("engine", "a second real model, Gemma 3 270M: greedy tokens and log-probabilities of transformers")
def test_scores_are_those_of_transformers(llm: LLM, prompts: list[list[int]], reference: Any) -> None:
    """Within 1e-4; the second half of a text behind its first."""
    chosen = prompts[:16]
    starts = [len(ids) // 2 for ids in chosen]
    pairs = list(zip(chosen, starts, strict=True))
    done = llm.score([ids[:start] for ids, start in pairs], [ids[start:] for ids, start in pairs])
    for (ids, start), completion in zip(pairs, done, strict=True):
        expected = last_logits(reference, ids, len(ids) - start + 1)[:-1].double().log_softmax(1).numpy()
        theirs = np.take_along_axis(expected, np.array(ids[start:])[:, None], 1)[:, 0]
        logprobs = completion.samples[0].logprobs
        assert logprobs is not None
        np.testing.assert_allclose(logprobs.chosen, theirs, atol=1e-4)
