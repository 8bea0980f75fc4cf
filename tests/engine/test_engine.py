"""The engine on a tiny random model, against a loop that recomputes the whole sequence for every token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine.tiny_engine import VOCAB, LetterTokenizer, make_decoder, make_engine, random_prompts, run

from batchinfer.feed import steps
from batchinfer.models.decoder import Decoder, StepInput
from batchinfer.ops import AttentionInput
from batchinfer.types import ErrorCode, Request, Sample, SamplingParams


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder()


def all_logits(decoder: Decoder, tokens: list[int]) -> np.ndarray:
    """Logits float32 [len(tokens), V] of one forward pass over the whole sequence, on one large page."""
    count = len(tokens)
    index = torch.arange(count, dtype=torch.int32)
    attention = AttentionInput(
        q_start=torch.tensor([0, count], dtype=torch.int32),
        kv_len=torch.tensor([count], dtype=torch.int32),
        slot=torch.tensor([0], dtype=torch.int32),
        page_table=torch.tensor([[0]], dtype=torch.int32),
    )
    rows = []
    for start in range(0, count, 32):  # the decoder samples from 32 rows at most
        step = StepInput(
            torch.tensor(tokens, dtype=torch.int32), index, index.long(), attention, index[start : start + 32]
        )
        rows.append(decoder.forward(step, decoder.new_cache(1, 128))[0].numpy().copy())
    return np.concatenate(rows)


def best_next(decoder: Decoder, prompt: list[int], generated: list[int]) -> list[int]:
    """The most likely token at the place of each generated one, given all tokens before it."""
    logits = all_logits(decoder, prompt + generated)
    return logits[len(prompt) - 1 : -1].argmax(axis=1).tolist()


def greedy(decoder: Decoder, prompt: np.ndarray) -> list[int]:
    """Twelve tokens, each from a pass over the whole sequence."""
    tokens = prompt.tolist()
    for _ in range(12):
        tokens.append(int(all_logits(decoder, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


PLAIN = SamplingParams(max_tokens=12, ignore_eos=True)
CAREFUL = replace(PLAIN, temperature=1.0, presence_penalty=0.5, repetition_penalty=1.2, logprobs=2, min_tokens=3)
TIGHT = {"num_pages": 24, "max_slots": 6, "max_step_tokens": 7, "expected_share": 0.01}


@pytest.mark.feature("engine", "paged attention over pages, chunks and preemptions: tokens of full recomputation")
@pytest.mark.parametrize("options", [{}, {"prefix_cache": False}, TIGHT, {"max_slots": 1}], ids=str)
@pytest.mark.hardware("continuous batching, greedy and sampled tokens")
@pytest.mark.hardware("prompts in pieces, prefix cache")
def test_greedy_tokens_are_those_of_full_recomputation(decoder: Decoder, options: dict[str, Any]) -> None:
    prompts = random_prompts(12)
    engine = make_engine(decoder, **options)
    done = run(engine, [Request(i, prompt, PLAIN) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        tokens = done[i].samples[0].token_ids.tolist()
        assert len(tokens) == 12
        assert tokens == best_next(decoder, prompt.tolist(), tokens)
        assert done[i].samples[0].finish_reason == "length"
        assert done[i].prompt_tokens == len(prompt)
    assert options is not TIGHT or engine.stats().preemptions > 0


@pytest.mark.feature("sampling", "seeds: a row's draws depend on nothing but its seed; n samples per row")
@pytest.mark.hardware("continuous batching, greedy and sampled tokens")
def test_samples_depend_on_their_seed_alone(decoder: Decoder) -> None:
    params = replace(PLAIN, temperature=1.0, n=3, top_p=0.95)
    prompts = random_prompts(6)
    requests = [Request(i, prompt, params, seed=100 + i) for i, prompt in enumerate(prompts)]
    together = run(make_engine(decoder, **TIGHT), requests)
    for request in requests:
        alone = run(make_engine(decoder), [request])[request.id]
        texts = [sample.text for sample in alone.samples]
        assert texts == [sample.text for sample in together[request.id].samples]
        assert len(set(texts)) == 3
    other = run(make_engine(decoder), [replace(requests[0], seed=7)])[0]
    assert other.samples[0].text != together[0].samples[0].text


@pytest.mark.feature("sampling", "stop tokens, max_tokens, min_tokens, ignore_eos")
def test_end_of_sequence_stop_tokens_and_min_tokens(decoder: Decoder) -> None:
    prompt = random_prompts(1)[0]
    free = greedy(decoder, prompt)
    stop = free[5]
    first = free.index(stop)

    def sample(**changes: Any) -> Any:
        return run(make_engine(decoder), [Request(0, prompt, replace(PLAIN, **changes))])[0].samples[0]

    got = sample(stop_token_ids=(stop,))
    assert got.token_ids.tolist() == free[: first + 1]
    assert got.finish_reason == "stop"
    assert got.text == LetterTokenizer().decode_batch([np.array(free[:first])])[0]
    held = sample(stop_token_ids=(stop,), min_tokens=first + 1)
    assert held.token_ids.tolist()[:first] == free[:first]
    assert stop not in held.token_ids.tolist()[: first + 1]


@pytest.mark.feature("sampling", "stop strings")
@pytest.mark.parametrize("ends_with_length", [False, True])
def test_a_stop_string_ends_and_cuts_the_text(decoder: Decoder, ends_with_length: bool) -> None:
    prompt = random_prompts(1)[0]
    free = greedy(decoder, prompt)
    text = LetterTokenizer().decode_batch([np.array(free)])[0]
    stop = text[4:7]
    end = text.find(stop)
    params = replace(PLAIN, stop=("never", stop), max_tokens=end + 3 if ends_with_length else 12)
    got = run(make_engine(decoder), [Request(0, prompt, params)])[0].samples[0]
    assert got.finish_reason == "stop"
    assert got.text == text[:end]
    assert got.token_ids.tolist() == free[: end + 3]


@pytest.mark.feature("sampling", "log-probabilities of chosen and top-k tokens")
def test_logprobs_are_the_log_softmax_of_the_logits(decoder: Decoder) -> None:
    prompts = random_prompts(4)
    wanted = [None, 0, 3, 5]
    requests = [Request(i, p, replace(PLAIN, logprobs=k)) for i, (p, k) in enumerate(zip(prompts, wanted, strict=True))]
    done = run(make_engine(decoder, **TIGHT), requests)
    assert done[0].samples[0].logprobs is None
    for i, k in enumerate(wanted[1:], 1):
        sample = done[i].samples[0]
        full = all_logits(decoder, prompts[i].tolist() + sample.token_ids.tolist())[len(prompts[i]) - 1 : -1]
        truth = torch.log_softmax(torch.from_numpy(full).double(), -1).numpy()
        assert sample.logprobs is not None
        assert sample.logprobs.top.shape == sample.logprobs.top_ids.shape == (12, k)
        np.testing.assert_allclose(sample.logprobs.chosen, truth[np.arange(12), sample.token_ids], atol=1e-4)
        np.testing.assert_allclose(sample.logprobs.top, -np.sort(-truth, axis=1)[:, :k], atol=1e-4)


def test_a_presence_penalty_forbids_repetition(decoder: Decoder) -> None:
    prompt = random_prompts(1)[0]
    params = replace(PLAIN, max_tokens=30, presence_penalty=100.0)
    tokens = run(make_engine(decoder), [Request(0, prompt, params)])[0].samples[0].token_ids.tolist()
    assert len(set(tokens)) == 30


@pytest.mark.feature("engine", "an interrupted sample goes on in another engine and ends with the same tokens")
@pytest.mark.parametrize("steps", [9, 14, 30])
def test_interrupted_requests_go_on_in_another_engine(decoder: Decoder, steps: int) -> None:
    """Sampled with penalties, logprobs, a stop string and several samples: all that depends on the tokens before."""
    params = replace(CAREFUL, stop=("zz", "!"), n=2)
    requests = [Request(i, prompt, params, seed=100 + i) for i, prompt in enumerate(random_prompts(6))]
    whole = run(make_engine(decoder), requests)
    first = make_engine(decoder, **TIGHT)
    for request in requests:
        first.add(request)
    done = {c.id: c for _ in range(steps) for c in first.step()}
    begun = {c.id: c for c in first.unfinished()}
    assert begun
    assert not set(done) & set(begun)
    assert not any(c.finished for c in begun.values())
    rest = [replace(r, so_far=begun[r.id].samples) if r.id in begun else r for r in requests if r.id not in done]
    done |= run(make_engine(decoder), rest)
    for request in requests:
        assert done[request.id].prompt_tokens == len(request.prompt)
        for got, expected in zip(done[request.id].samples, whole[request.id].samples, strict=True):
            assert got.token_ids.tolist() == expected.token_ids.tolist()
            assert (got.text, got.finish_reason) == (expected.text, expected.finish_reason)
            assert got.logprobs is not None
            assert expected.logprobs is not None
            np.testing.assert_allclose(got.logprobs.chosen, expected.logprobs.chosen, atol=1e-5)
            assert got.logprobs.top.shape == expected.logprobs.top.shape


def test_an_abandoned_request_gives_what_there_is_and_leaves_nothing(decoder: Decoder) -> None:
    prompts = random_prompts(3)
    requests = [Request(i, prompt, replace(PLAIN, n=2, logprobs=1)) for i, prompt in enumerate(prompts)]
    whole = run(make_engine(decoder), requests)
    engine = make_engine(decoder)
    for request in requests:
        engine.add(request)
    for _ in range(5):
        engine.step()
    state = engine.abandon(1)
    assert not state.finished
    for sample, full in zip(state.samples, whole[1].samples, strict=True):
        count = len(sample.token_ids)
        assert 0 < count < 12
        assert sample.token_ids.tolist() == full.token_ids[:count].tolist()
        assert full.text.startswith(sample.text)
        assert sample.logprobs is not None
        assert len(sample.logprobs.chosen) == count
    with pytest.raises(KeyError):
        engine.abandon(1)
    rest = run(engine, [])
    assert set(rest) == {0, 2}
    assert engine.num_open == engine.stats().pages_used == 0


@pytest.mark.parametrize("samples", [1, 3])
def test_samples_that_are_not_those_of_an_interrupted_request_are_refused(decoder: Decoder, samples: int) -> None:
    whole = Sample(np.arange(12, dtype=np.int32), "", "")  # has all of its tokens and yet no reason
    so_far = (whole, *[Sample(np.zeros(0, np.int32), "", "")] * (samples - 1))
    request = Request(0, random_prompts(1)[0], PLAIN, so_far=so_far)
    error = run(make_engine(decoder), [request])[0].error
    assert error is not None
    assert error.code == ErrorCode.BAD_SAMPLING
    assert "so_far" in error.message


def test_requests_that_cannot_run_come_back_with_their_reason(decoder: Decoder) -> None:
    good = random_prompts(1)[0]
    bad = {
        1: (np.zeros(0, np.int32), PLAIN, ErrorCode.EMPTY_PROMPT),
        2: (np.full(128, 5, np.int32), PLAIN, ErrorCode.PROMPT_TOO_LONG),
        3: (np.array([5, VOCAB], np.int32), PLAIN, ErrorCode.BAD_TOKEN_IDS),
        4: (np.array([-1], np.int32), PLAIN, ErrorCode.BAD_TOKEN_IDS),
        5: (good, replace(PLAIN, temperature=float("nan")), ErrorCode.BAD_SAMPLING),
        6: (np.full(90, 5, np.int32), PLAIN, ErrorCode.KV_CAPACITY),
    }
    requests = [Request(i, prompt, params) for i, (prompt, params, _) in bad.items()] + [Request(0, good, PLAIN)]
    engine = make_engine(decoder, num_pages=20)
    done = run(engine, requests)
    for i, (_, _, code) in bad.items():
        error = done[i].error
        assert error is not None
        assert error.code == code
        assert error.message
        assert done[i].samples == ()
    assert done[0].samples[0].token_ids.tolist() == greedy(decoder, good)
    assert engine.num_open == 0
    assert engine.step() == []


def test_counters(decoder: Decoder) -> None:
    prompts = random_prompts(8)
    engine = make_engine(decoder)
    assert engine.wants_more
    for i in range(40):
        engine.add(Request(i, prompts[i % 8], PLAIN))
    assert not engine.wants_more
    done = run(engine, [])
    stats = engine.stats()
    assert len(done) == 40
    assert stats.prompt_tokens == sum(len(prompts[i % 8]) for i in range(40))
    assert stats.output_tokens == 40 * 12
    assert 0 < stats.cached_prompt_tokens < stats.prompt_tokens
    assert stats.running == stats.waiting == stats.pages_used == 0
    assert set(stats.step_seconds) == {"schedule", "forward", "sample", "output"}


@pytest.mark.feature("engine", "rows in hand are ordered by common beginning, and longest first at the end of a job")
def test_the_order_of_requests_changes_no_token(decoder: Decoder) -> None:
    rng = np.random.default_rng(3)
    begins = rng.integers(2, VOCAB, (8, 20))
    requests = [
        Request(
            i,
            np.concatenate([begins[i % 8], rng.integers(2, VOCAB, 1 + i % 5)]).astype(np.int32),
            replace(PLAIN, max_tokens=3 + i % 7, temperature=1.0),
            seed=i,
        )
        for i in range(32)
    ]
    got = {}
    for reorder in (False, True):
        engine = make_engine(decoder, num_pages=20, max_slots=4, max_step_tokens=30)
        done = [completion for step in steps(engine, requests, reorder) for completion in step]
        got[reorder] = {c.id: [s.token_ids.tolist() for s in c.samples] for c in done}, [c.id for c in done]
        got[reorder] += (engine.stats().cached_prompt_tokens,)
    assert got[True][0] == got[False][0]
    assert got[True][1] != got[False][1]
    assert got[True][2] > got[False][2]


def test_an_expected_length_is_what_is_left(decoder: Decoder) -> None:
    engine = make_engine(decoder, expected_share=0.5)
    prompt = np.arange(2, 12, dtype=np.int32)
    begun = (Sample(np.zeros(7, np.int32), "", ""), Sample(np.zeros(40, np.int32), "", "stop"))
    assert engine.expected_tokens(Request(0, prompt, SamplingParams(max_tokens=60))) == 30
    assert engine.expected_tokens(Request(0, prompt, SamplingParams(max_tokens=60, n=2), so_far=begun)) == 23
    assert engine.expected_tokens(Request(0, prompt, SamplingParams(max_tokens=10_000))) == 118  # positions left
    assert engine.expected_tokens(Request(0, prompt, SamplingParams(), scored_from=5)) == 1


@pytest.mark.feature("engine", "samples of a prompt: the tokens of the page that each goes on in are computed once")
def test_samples_take_over_what_one_of_them_computes(decoder: Decoder) -> None:
    """To the bit, and for the rest of their lives: with the cache off each computes its whole prompt."""
    params = SamplingParams(max_tokens=20, temperature=1.0, n=4, logprobs=2, ignore_eos=True)
    requests = [Request(i, p, params, seed=i) for i, p in enumerate(random_prompts(6))]
    sharing, alone = (make_engine(decoder, page_size=16, prefix_cache=cache) for cache in (True, False))
    got, want = run(sharing, requests), run(alone, requests)
    for request in requests:
        for one, other in zip(got[request.id].samples, want[request.id].samples, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            assert (one.logprobs.chosen == other.logprobs.chosen).all()
    assert sharing.stats().prefill.tokens < 0.5 * alone.stats().prefill.tokens
