"""Texts as vectors: those of a forward pass over the whole, however the steps cut it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine.test_ahead import LaggingRunner
from engine.tiny_engine import make_decoder, make_engine, random_prompts, run
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from batchinfer.engine.pooled import finish, trimmed
from batchinfer.models.decoder import StepInput
from batchinfer.ops import AttentionInput
from batchinfer.types import Pooling, PoolSpec, Request, SamplingParams

WIDTH = 32
ANY = SamplingParams(max_tokens=9, n=2)  # of no account


def states(ids: np.ndarray) -> np.ndarray:
    """Final hidden states of every token, float32 [tokens, WIDTH]: one step, the first token of each one-token sequence
    asked for ("cls"), which all attend to one cache."""
    decoder, count = make_decoder("last"), len(ids)
    place = torch.arange(count, dtype=torch.int32)
    one = torch.tensor([0, count], dtype=torch.int32)
    attention = AttentionInput(one, one[1:], one[:1], torch.zeros(1, 1, dtype=torch.int32))
    rows = []
    for asked in place.split(32):
        step = StepInput(torch.from_numpy(ids), place, place.long(), attention, asked)
        rows.append(decoder.pool(step, decoder.new_cache(1, 128)))
    return torch.cat(rows).numpy()


def vectors(pooling: Pooling, prompts: list[np.ndarray], **options: object) -> list[np.ndarray]:
    engine = make_engine(make_decoder(pooling), pool=PoolSpec(pooling, WIDTH), **options)
    done = run(engine, [Request(i, prompt, ANY) for i, prompt in enumerate(prompts)])
    assert (engine.stats().output_tokens, engine.stats().prefill.samples) == (0, 0)
    samples = [done[i].samples for i in range(len(prompts))]
    assert all(len(given) == 1 and given[0].finish_reason == "pooled" for given in samples)
    return [given[0].vector for given in samples]


CUTS = [
    {},
    {"prefix_cache": False, "lookup": 4},
    {"max_step_tokens": 7, "max_slots": 3},
    {"num_pages": 14, "max_step_tokens": 9, "max_slots": 5, "expected_share": 0.05},
    {"make_runner": LaggingRunner},
    {"make_runner": LaggingRunner, "max_step_tokens": 7, "max_slots": 3},
]


@pytest.mark.feature("engine", "vectors of texts (last, mean, cls), with prefix cache and chunked prefill")
@pytest.mark.parametrize("options", CUTS, ids=str)
@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.hardware("task=embed, classify")
def test_vectors_are_those_of_the_whole_text(pooling: Pooling, options: dict) -> None:
    prompts = random_prompts(18)
    for prompt, vector in zip(prompts, vectors(pooling, prompts, **options), strict=True):
        all_states = states(prompt)
        expected = {"last": all_states[-1], "cls": all_states[0], "mean": all_states.mean(0, dtype=np.float64)}[pooling]
        np.testing.assert_allclose(vector, expected, rtol=1e-5, atol=1e-5)


def test_where_a_text_is_cut_does_not_matter() -> None:
    """To the last bit: the CPU's ops do not depend on the batch, and the sums are exact enough."""
    prompts = random_prompts(18)
    whole = vectors("mean", prompts)
    for options in CUTS[1:4]:
        assert all((a == b).all() for a, b in zip(whole, vectors("mean", prompts, **options), strict=True))


def test_the_cache_serves_what_looks_at_the_last_token_alone() -> None:
    prompt = random_prompts(1)[0].repeat(3)[:40]
    prompts = [np.append(prompt, [i, i + 1]).astype(np.int32) for i in range(2, 12)]
    for pooling, cached in (("last", 9 * 40), ("mean", 0)):
        engine = make_engine(make_decoder(pooling), pool=PoolSpec(pooling, WIDTH), max_slots=1)
        run(engine, [Request(i, ids, ANY) for i, ids in enumerate(prompts)])
        assert engine.stats().cached_prompt_tokens == cached


def test_one_that_is_dropped_leaves_the_others_alone() -> None:
    prompts = random_prompts(6)
    options = {"max_step_tokens": 8, "make_runner": LaggingRunner}
    engine = make_engine(make_decoder("mean"), pool=PoolSpec("mean", WIDTH), **options)
    for i, prompt in enumerate(prompts):
        engine.add(Request(i, prompt, ANY))
    done = {c.id: c for _ in range(2) for c in engine.step()}
    dropped = next(i for i in range(6) if i not in done)
    assert engine.abandon(dropped).samples[0].vector is None
    while engine.num_open:
        done |= {c.id: c for c in engine.step()}
    expected = vectors("mean", prompts)
    assert sorted(done) == [i for i in range(6) if i != dropped]
    assert all((done[i].samples[0].vector == expected[i]).all() for i in done)


VALUES = arrays(np.float64, 7, elements=st.floats(-1e6, 1e6))


@given(values=VALUES, width=st.integers(1, 7))
def test_a_vector_is_cut_and_then_brought_to_length_one(values: np.ndarray, width: int) -> None:
    cut = torch.from_numpy(values[:width].copy())
    expected = torch.nn.functional.normalize(cut, dim=0).numpy()
    got = finish(values, PoolSpec("last", width, activation="normalise"))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-12)


@given(values=VALUES)
def test_probabilities_are_those_of_torch(values: np.ndarray) -> None:
    for name, function in (("softmax", lambda v: v.softmax(0)), ("sigmoid", torch.sigmoid), ("", lambda v: v)):
        got = finish(values, PoolSpec("last", 7, "classes", activation=name))
        np.testing.assert_allclose(got, function(torch.from_numpy(values)).numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("prompt", "pad", "kept"),
    [([1, 2, 0, 0], 0, [1, 2]), ([0, 1, 0, 2], 0, [0, 1, 0, 2]), ([0, 0], 0, [0]), ([1, 0], None, [1, 0]), ([], 0, [])],
)
def test_padding_at_the_end_does_not_count(prompt: list[int], pad: int | None, kept: list[int]) -> None:
    pool = PoolSpec("last", 1, "classes", pad_id=pad)
    assert trimmed(np.array(prompt, np.int32), pool).tolist() == kept
