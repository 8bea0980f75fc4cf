"""Drafts by prompt lookup: the same completions as without, whatever the steps, and fewer of these."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine.tiny_engine import VOCAB, make_decoder, make_engine, random_prompts, run
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.models.decoder import Decoder
from batchinfer.types import Completion, Request, SamplingParams

PLAIN = SamplingParams(max_tokens=24, ignore_eos=True)
TIGHT = {"num_pages": 30, "max_slots": 6, "max_step_tokens": 9, "expected_share": 0.01}
NARROW = tuple(range(2, 6))
"""With few tokens to choose from a random model repeats itself, and drafts are often right."""


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder()


def facts(completion: Completion) -> list[Any]:
    """All that a completion holds, as plain values."""
    logprobs = [s.logprobs and [a.tolist() for a in vars_of(s.logprobs)] for s in completion.samples]
    samples = [(s.token_ids.tolist(), s.text, s.finish_reason) for s in completion.samples]
    return [completion.error, samples, logprobs, completion.prompt_logprobs and vars_of(completion.prompt_logprobs)]


def vars_of(logprobs: Any) -> tuple[np.ndarray, ...]:
    return logprobs.chosen, logprobs.top_ids, logprobs.top


def requests(params: SamplingParams, count: int = 10) -> list[Request]:
    """Prompts that say things twice, so that there is something to look up."""
    prompts = [np.concatenate([prompt, prompt])[:60] for prompt in random_prompts(count)]
    return [Request(i, prompt, params, seed=50 + i) for i, prompt in enumerate(prompts)]


CASES = {
    "greedy": PLAIN,
    "seeded": replace(PLAIN, temperature=0.8, top_p=0.9),
    "narrow": replace(PLAIN, temperature=1.0, allowed_token_ids=NARROW),
    "samples": replace(PLAIN, temperature=0.7, n=3, allowed_token_ids=NARROW),
    "best": replace(PLAIN, temperature=0.7, n=2, best_of=4, allowed_token_ids=NARROW),
    "logprobs": replace(PLAIN, logprobs=3, allowed_token_ids=NARROW),
    "penalties": replace(PLAIN, repetition_penalty=1.1, frequency_penalty=0.1, allowed_token_ids=NARROW),
    "stop string": replace(PLAIN, stop=("##", "$%$"), allowed_token_ids=NARROW, temperature=1.0),
    "stop tokens": replace(PLAIN, stop_token_ids=(4,), min_tokens=5, allowed_token_ids=NARROW, temperature=1.0),
    "bad words": replace(PLAIN, bad_words=("##", "$"), allowed_token_ids=NARROW, temperature=1.0),
    "biased": replace(PLAIN, logit_bias={3: 5.0, 5: 4.0}),
    "short": replace(PLAIN, max_tokens=2, allowed_token_ids=NARROW),
    "regex": SamplingParams(max_tokens=24, regex="[#$]{3,20}"),
}


@pytest.mark.feature("engine", "engine.lookup: drafts by prompt lookup, the same tokens as without")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, TIGHT], ids=["", "tight"])
@pytest.mark.hardware("drafts by prompt lookup")
def test_completions_are_those_without_drafts(decoder: Decoder, case: str, options: dict[str, Any]) -> None:
    asked = requests(CASES[case])
    plain, drafting = make_engine(decoder, **options), make_engine(decoder, lookup=5, **options)
    want, got = run(plain, asked), run(drafting, asked)
    for request in asked:
        assert facts(got[request.id]) == facts(want[request.id])
    stats = drafting.stats()
    assert stats.output_tokens == plain.stats().output_tokens
    if case == "regex":
        assert stats.drafted_tokens == 0
    elif case not in ("short", "seeded", "stop string"):
        assert 0 < stats.accepted_tokens <= stats.drafted_tokens
    if options is TIGHT and case == "samples":
        assert stats.preemptions > 0


def test_right_drafts_save_steps(decoder: Decoder) -> None:
    """One sequence: its steps are its tokens, less the draft tokens that were right."""
    asked = requests(replace(PLAIN, max_tokens=60, allowed_token_ids=(3, 4)), count=1)
    engine = make_engine(decoder, lookup=8)
    run(engine, asked)
    stats = engine.stats()
    assert stats.decode.steps + stats.prefill.steps == 60 - stats.accepted_tokens
    assert stats.accepted_tokens > 30


@settings(max_examples=25)
@given(
    lookup=st.integers(1, 12),
    pages=st.integers(24, 80),
    slots=st.integers(1, 8),
    more=st.integers(0, 30),
    page_size=st.sampled_from([1, 4, 16]),
    tokens=st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=4, unique=True),
    params=st.sampled_from([CASES["narrow"], CASES["samples"], CASES["stop string"], CASES["penalties"]]),
)
def test_any_engine_any_settings(
    lookup: int, pages: int, slots: int, more: int, page_size: int, tokens: list[int], params: SamplingParams
) -> None:
    decoder = _shared_decoder()
    asked = requests(replace(params, allowed_token_ids=tuple(tokens)), count=4)
    shape = {
        "num_pages": max(pages, 128 // page_size),
        "page_size": page_size,
        "max_slots": slots,
        "max_step_tokens": slots + more,
        "expected_share": 0.05,
    }
    want, got = run(make_engine(decoder), asked), run(make_engine(decoder, lookup=lookup, **shape), asked)
    assert [facts(got[r.id]) for r in asked] == [facts(want[r.id]) for r in asked]


_DECODERS: list[Decoder] = []


def _shared_decoder() -> Decoder:
    if not _DECODERS:
        _DECODERS.append(make_decoder())
    return _DECODERS[0]


def test_interrupted_in_the_middle_and_resumed(decoder: Decoder) -> None:
    asked = requests(CASES["samples"], count=4)
    want = run(make_engine(decoder), asked)
    engine = make_engine(decoder, lookup=5)
    for request in asked:
        engine.add(request)
    done = {completion.id: completion for _ in range(6) for completion in engine.step()}
    begun = {state.id: state.samples for state in engine.unfinished()}
    again = [replace(r, so_far=begun.get(r.id, ())) for r in asked if r.id not in done]
    done |= run(make_engine(decoder, lookup=3), again)
    assert [facts(done[r.id]) for r in asked] == [facts(want[r.id]) for r in asked]
