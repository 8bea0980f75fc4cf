"""Greedy texts of random models of every architecture: token by token those of transformers in float32."""

from __future__ import annotations

import zlib
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from engine.tiny_engine import LetterTokenizer
from hypothesis import given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from models.drawn_models import FAMILIES, POSITIONS, VOCAB, config_of, vary

from batchinfer.config import EngineConfig, ModelConfig
from batchinfer.engine.loading import load_engine
from batchinfer.feed import steps
from batchinfer.models.architectures import ARCHITECTURES
from batchinfer.types import Request, SamplingParams

NEW_TOKENS = 16


def prompts(seed: int) -> list[np.ndarray]:
    """Half of them begin alike, longer than some windows and than a step of the engine."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(2, VOCAB, 37)
    own = [rng.integers(2, VOCAB, rng.integers(2, 30)) for _ in range(8)]
    return [(np.concatenate([shared, text]) if i % 2 else text).astype(np.int32) for i, text in enumerate(own)]


def greedy(folder: Path, texts: list[np.ndarray]) -> list[list[int]]:
    """What our engine says, with prefix cache, chunked prefill and more texts than slots."""
    options = {"dtype": "fp32", "threads": 2, "page_size": 4, "num_pages": 100, "max_slots": 3, "max_step_tokens": 20}
    engine = load_engine(
        ModelConfig(path=str(folder)),
        EngineConfig(device="cpu", max_model_len=POSITIONS, **options),
        tokenizer=LetterTokenizer(),  # type: ignore[arg-type]
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    requests = [Request(i, text, sampling, seed=0) for i, text in enumerate(texts)]
    done = {completion.id: completion for step in steps(engine, requests) for completion in step}
    assert engine.stats().cached_prompt_tokens > 0
    engine.close()
    return [done[i].samples[0].token_ids.tolist() for i in range(len(texts))]


DRAWN = [
    pytest.param(name, rope, marks=pytest.mark.parity("greedy tokens", name))
    for name, family in FAMILIES.items()
    for rope in family.ropes or ("",)
]


@pytest.mark.feature("models", "each architecture, random configs: greedy tokens of transformers in float32")
@pytest.mark.parametrize(("architecture", "rope"), DRAWN)
def test_greedy_tokens_are_those_of_transformers(architecture: str, rope: str, tmp_path: Path) -> None:
    @settings(max_examples=FAMILIES[architecture].configs_of_a_rope_type, database=None)
    @hypothesis_seed(zlib.crc32(f"{architecture} {rope}".encode()))
    @given(st.randoms(use_true_random=False), st.integers(0, 1000))
    def check(random: Random, seed: int) -> None:
        compare(config_of(architecture, rope, random), seed, tmp_path)

    check()


def compare(config: Any, seed: int, folder: Path) -> None:
    """Transformers reads the whole texts at once: where each token is its most likely one, greedy decoding says it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    vary(model, large=("embed", "wte"))
    model.save_pretrained(folder)
    texts = prompts(seed)
    answers = greedy(folder, texts)
    whole = [np.concatenate([text, answer]) for text, answer in zip(texts, answers, strict=True)]
    ids = torch.zeros(len(whole), max(map(len, whole)), dtype=torch.long)
    for row, text in zip(ids, whole, strict=True):
        row[: len(text)] = torch.from_numpy(text)
    with torch.inference_mode():
        likely = model(ids, attention_mask=torch.ones_like(ids)).logits.argmax(2)
    for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        assert answer == likely[i, len(text) - 1 : len(text) + len(answer) - 1].tolist(), model.config
    assert len({tuple(answer) for answer in answers}) > 1


def test_every_architecture_is_drawn() -> None:
    assert set(FAMILIES) == set(ARCHITECTURES)
