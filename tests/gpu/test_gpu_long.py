"""Contexts of 100,000 tokens in the engine, in pieces and with a prefix from the cache, against those on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.tiny_engine import LetterTokenizer, run

from batchinfer.config import EngineConfig, ModelConfig
from batchinfer.engine.loading import load_engine
from batchinfer.types import Completion, EngineStats, Request, SamplingParams

VOCAB, LENGTH, SHARED, SCORED, STEP = 512, 100_000, 90_000, 64, 8192


class Letters(LetterTokenizer):
    vocab_size = VOCAB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with frequencies stretched 16 times, and weights so large that of 100,000 positions some 20 count."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    config = LlamaConfig(
        **sizes,
        intermediate_size=256,
        num_hidden_layers=2,
        vocab_size=VOCAB,
        max_position_embeddings=131_072,
        rope_theta=10_000.0,
        rope_scaling={"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8192},
        initializer_range=0.15,
    )
    to = tmp_path_factory.mktemp("long")
    LlamaForCausalLM(config).save_pretrained(to)
    return to


def requests() -> list[Request]:
    """Two texts with the same first SHARED tokens: the rest of the second is what its pages are computed for. Of both
    the last tokens are scored, and the first goes on."""
    random = np.random.default_rng(11)
    shared = random.integers(2, VOCAB, SHARED)
    texts = [np.concatenate([shared, random.integers(2, VOCAB, n)]).astype(np.int32) for n in (LENGTH - SHARED, 2000)]
    greedy = SamplingParams(max_tokens=16, ignore_eos=True)
    return [
        Request(0, texts[0], greedy),
        *(Request(1 + i, text, SamplingParams(), scored_from=len(text) - SCORED) for i, text in enumerate(texts)),
    ]


def completions(folder: Path, device: str, dtype: str) -> tuple[dict[int, Completion], EngineStats]:
    options: dict[str, Any] = {"max_slots": 4, "max_step_tokens": STEP, "num_pages": LENGTH // 4}
    given = EngineConfig(device=device, dtype=dtype, max_model_len=LENGTH + 1000, **options)
    engine = load_engine(ModelConfig(str(folder)), given, tokenizer=Letters())  # type: ignore[arg-type]
    done: dict[int, Completion] = {}
    for request in requests():  # one by one: the later ones find the first one's pages
        done |= run(engine, [request])
    stats = engine.stats()
    engine.close()
    return done, stats


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[int, Completion]:
    return completions(folder, "cpu", "fp32")[0]


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-3), ("bf16", 0.1)])
@pytest.mark.feature("engine", "CUDA: texts of 100,000 tokens, in pieces and from the prefix cache, are the CPU's")
@pytest.mark.hardware("prompts in pieces, prefix cache")
def test_long_texts(real_gpu, folder: Path, truth: dict[int, Completion], dtype: str, bound: float) -> None:
    """``bound``: of the mean distance of log-probabilities. Without the first half of their text they move by 1.2, and
    the CPU's in bfloat16 are 0.04 from those in float32."""
    got, stats = completions(folder, "cuda", dtype)
    assert stats.cached_prompt_tokens >= 2 * SHARED
    assert stats.prefill.steps > (LENGTH + 2000) / STEP
    for i in (1, 2):
        want, mine = truth[i].samples[0].logprobs.chosen, got[i].samples[0].logprobs.chosen
        assert len(want) == len(mine) == SCORED
        assert np.abs(mine - want).mean() < bound  # false for NaN
    if dtype == "fp32":
        assert got[0].samples[0].token_ids.tolist() == truth[0].samples[0].token_ids.tolist()
