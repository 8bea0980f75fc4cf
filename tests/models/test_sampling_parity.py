"""Biases, bad words and penalties against transformers' logits processors, in float32 on a random model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.tiny_engine import LetterTokenizer
from models.drawn_models import VOCAB

from batchinfer.config import EngineConfig, ModelConfig
from batchinfer.engine.loading import load_engine
from batchinfer.feed import steps
from batchinfer.types import Completion, Request, SamplingParams

FILLING = VOCAB
"""Not a token: transformers writes it behind those that ended."""

PROMPTS = [np.random.default_rng(i).integers(2, VOCAB, 5 + 3 * i).astype(np.int32) for i in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).eval()
    for name, weight in made.named_parameters():
        weight.data.normal_(float(name.endswith("norm.weight")), 0.6)
    folder = tmp_path_factory.mktemp("model")
    made.save_pretrained(folder)
    return made, folder


def ours(folder: Path, params: SamplingParams, lookup: int = 0) -> list[list[list[int]]]:
    """The tokens of every sample of every prompt."""
    engine = load_engine(
        ModelConfig(path=str(folder)),
        EngineConfig(device="cpu", dtype="fp32", threads=1, num_pages=40, max_slots=3, lookup=lookup),
        tokenizer=LetterTokenizer(),  # type: ignore[arg-type]
    )
    requests = [Request(i, prompt, params) for i, prompt in enumerate(PROMPTS)]
    done: dict[int, Completion] = {c.id: c for step in steps(engine, requests) for c in step}
    engine.close()
    return [[s.token_ids.tolist() for s in done[i].samples] for i in range(len(PROMPTS))]


def theirs(model: Any, **options: Any) -> list[list[list[int]]]:
    """What ``generate`` gives for each prompt alone, without the filling behind an end."""
    answers = []
    for prompt in PROMPTS:
        ids = torch.from_numpy(prompt).long()[None]
        mask = torch.ones_like(ids)
        given = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": -1, "pad_token_id": FILLING} | options
        rows = model.generate(ids, attention_mask=mask, **given)[:, len(prompt) :].tolist()
        answers.append([[token for token in row if token != FILLING] for row in rows])
    return answers


@pytest.mark.feature("sampling", "logit_bias, bad_words, repetition_penalty: the tokens of transformers in float32")
@pytest.mark.parametrize("lookup", [0, 4])
def test_tokens_are_those_of_transformers(model: tuple[Any, Path], lookup: int) -> None:
    net, folder = model
    plain = theirs(net)
    assert ours(folder, SamplingParams(max_tokens=20, ignore_eos=True), lookup) == plain
    bias = {plain[0][0][0]: -4.0, plain[1][0][0]: 3.0, 50: 2.5}
    pairs = {pair for (answer,) in plain for pair in pairwise(answer)}
    # What ends a prompt does not begin a bad word: transformers counts it in, and a text of the sample alone does not.
    bad = sorted(pair for pair in pairs if pair[0] not in {int(prompt[-1]) for prompt in PROMPTS})[:6]
    words = tuple("".join(chr(33 + token) for token in pair) for pair in bad)
    params = SamplingParams(max_tokens=20, ignore_eos=True, logit_bias=bias, bad_words=words, repetition_penalty=1.3)
    want = theirs(
        net,
        sequence_bias=[[[token], value] for token, value in bias.items()],
        bad_words_ids=[list(pair) for pair in bad],
        repetition_penalty=1.3,
    )
    assert want != plain
    assert ours(folder, params, lookup) == want


@pytest.mark.feature("sampling", "beam_width: the beam search of transformers, token by token in float32")
@pytest.mark.parametrize(
    ("width", "stops", "length_penalty"),
    [(2, (), 1.0), (8, (5,), 0.0), (3, (4, 5, 6, 7, 8), 1.0), (9, (4, 5, 6, 7, 8), 1.0), (5, (5, 6, 7), -2.0)],
)
def test_beam_search(model: tuple[Any, Path], width: int, stops: tuple[int, ...], length_penalty: float) -> None:
    net, folder = model
    params = SamplingParams(
        max_tokens=14, beam_width=width, n=width, stop_token_ids=stops, length_penalty=length_penalty
    )
    want = theirs(
        net,
        max_new_tokens=14,
        num_beams=width,
        num_return_sequences=width,
        eos_token_id=[1, *stops],
        length_penalty=length_penalty,
    )
    assert ours(folder, params) == want
    lengths = {len(text) for texts in want for text in texts}
    assert len(lengths) > 1 or len(stops) < 3  # ended by a token, some of them
