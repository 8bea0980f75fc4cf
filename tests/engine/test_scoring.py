"""Log-probabilities of given texts: those of a forward pass over the whole, however the steps cut it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.test_ahead import LaggingRunner
from engine.tiny_engine import make_decoder, make_engine, random_prompts, run
from torch.utils._python_dispatch import TorchDispatchMode

from batchinfer.config import EngineConfig, ModelConfig
from batchinfer.engine.loading import load_engine
from batchinfer.engine.no_text import NoText
from batchinfer.models.decoder import StepInput
from batchinfer.ops import AttentionInput
from batchinfer.types import Completion, ErrorCode, Request, SamplingParams

GENERATE = SamplingParams(max_tokens=12, temperature=1.0)


def truth(ids: np.ndarray) -> torch.Tensor:
    """log-softmax of the logits after every token, float64 [tokens, V]: one step, every row sampled."""
    decoder = make_decoder()
    count = len(ids)
    place = torch.arange(count, dtype=torch.int32)
    one = torch.tensor([0, count], dtype=torch.int32)
    attention = AttentionInput(one, one[1:], one[:1], torch.zeros(1, 1, dtype=torch.int32))
    rows = []
    for sampled in place.split(32):
        step = StepInput(torch.from_numpy(ids), place, place.long(), attention, sampled)
        rows.append(decoder.forward(step, decoder.new_cache(1, 128))[0].double().clone())
    return torch.cat(rows).log_softmax(1)


def requests() -> list[Request]:
    """Scored from the second token, from the middle, and the last token alone; between them some that generate."""
    asked = []
    for i, prompt in enumerate(random_prompts(18)):
        prompt = np.concatenate([prompt, prompt[:2]])
        start = (1, len(prompt) // 2, len(prompt) - 1)[i % 3]
        asked.append(Request(i, prompt, GENERATE, seed=i, scored_from=None if i % 5 == 0 else start))
    return asked


@pytest.mark.feature("engine", "log-probabilities of given texts, with prefix cache, chunked prefill and preemption")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix_cache": False},
        {"max_step_tokens": 7, "max_slots": 3},
        {"num_pages": 26, "expected_share": 0.05},
        {"make_runner": LaggingRunner},
    ],
    ids=str,
)
@pytest.mark.hardware("task=score")
def test_scores_are_those_of_the_whole_text(options: dict) -> None:
    asked = requests()
    engine = make_engine(make_decoder(), **options)
    done = run(engine, asked)
    for request in asked:
        completion = done[request.id]
        (sample,) = completion.samples
        if request.scored_from is None:
            assert sample.finish_reason in ("stop", "length")
            continue
        start = request.scored_from
        assert (sample.finish_reason, completion.prompt_tokens) == ("scored", start)
        assert sample.token_ids.tolist() == request.prompt[start:].tolist()
        expected = truth(request.prompt)[start - 1 : -1]
        chosen = expected.gather(1, torch.from_numpy(sample.token_ids).long()[:, None])[:, 0]
        assert sample.logprobs is not None
        np.testing.assert_allclose(sample.logprobs.chosen, chosen.numpy(), atol=1e-5)
        np.testing.assert_allclose(sample.logprobs.top[:, 0], expected.max(1).values.numpy(), atol=1e-5)
        assert sample.logprobs.top_ids[:, 0].tolist() == expected.argmax(1).tolist()
    assert engine.stats().output_tokens == sum(
        len(done[r.id].samples[0].token_ids) for r in asked if r.scored_from is None
    )


def test_the_cache_gives_what_need_not_be_scored() -> None:
    """Many continuations of one prompt: the prompt is computed once."""
    prompt = random_prompts(1)[0].repeat(3)[:40]
    asked = [Request(i, np.append(prompt, [i, i + 1]).astype(np.int32), GENERATE, scored_from=40) for i in range(2, 12)]
    engine = make_engine(make_decoder(), max_slots=1)
    run(engine, asked)
    assert engine.stats().cached_prompt_tokens == 9 * 36  # whole pages of 4 before position 39


def test_neighbours_do_not_notice() -> None:
    asked = requests()

    def texts(done: dict[int, Completion]) -> dict[int, list[int]]:
        return {i: c.samples[0].token_ids.tolist() for i, c in done.items() if asked[i].scored_from is None}

    alone = run(make_engine(make_decoder()), [r for r in asked if r.scored_from is None])
    assert texts(alone) == texts(run(make_engine(make_decoder()), asked))


@pytest.mark.parametrize("start", [0, -1, 5, 9])
def test_where_scores_cannot_begin(start: int) -> None:
    good = Request(0, np.arange(5, 10, dtype=np.int32), GENERATE, scored_from=1)
    bad = replace(good, id=1, scored_from=start)
    done = run(make_engine(make_decoder()), [good, bad])
    assert done[0].error is None
    assert done[1].error is not None
    assert done[1].error.code is ErrorCode.EMPTY_PROMPT


def test_what_is_interrupted_begins_anew() -> None:
    engine = make_engine(make_decoder(), max_step_tokens=8)
    request = Request(0, np.arange(2, 40, dtype=np.int32), GENERATE, scored_from=3)
    engine.add(request)
    engine.step()
    assert engine.unfinished() == []
    assert engine.abandon(0).samples[0].token_ids.tolist() == []


class Largest(TorchDispatchMode):
    """Remembers how large the largest tensor is that torch makes or looks at within it."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else (out,)
        self.elements = max(self.elements, *(t.numel() for t in made if isinstance(t, torch.Tensor)), 0)
        return out


@pytest.mark.feature("engine", "scores take no memory for [tokens, vocabulary]: the LM head works slice by slice")
def test_memory_does_not_grow_with_length_times_vocabulary(tmp_path: Path) -> None:
    """A text of 500 tokens in one step and a vocabulary of 20,000: their product is 10 million, a slice has 8 rows."""
    vocab, slots = 20_000, 8
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = EngineConfig(
        device="cpu", dtype="fp32", threads=1, max_slots=slots, max_step_tokens=512, num_pages=40, max_model_len=512
    )
    engine = load_engine(ModelConfig(str(tmp_path), dummy_weights=True), settings, tokenizer=NoText())  # type: ignore
    text = np.random.default_rng(0).integers(0, vocab, 500).astype(np.int32)
    with Largest() as largest:
        done = run(engine, [Request(0, text, GENERATE, scored_from=1)])
    assert done[0].samples[0].logprobs is not None
    assert len(done[0].samples[0].logprobs.chosen) == 499
    assert engine.stats().steps == 1
    assert largest.elements == slots * vocab
