"""The engine one step ahead of its runner gives the completions that it gives step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from engine.tiny_engine import VOCAB, make_decoder, make_engine, random_prompts, run

from batchinfer._engine import Step
from batchinfer.engine.runner import HostRunner, StepOutput, grouped_rows
from batchinfer.engine.slots import Rows
from batchinfer.engine.step_buffer import StepBuffer
from batchinfer.engine.step_shape import StepShape
from batchinfer.models.decoder import Decoder, ScoreInput
from batchinfer.ops import SampleOutput
from batchinfer.types import Completion, Request, SamplingParams

empty_bytes = partial(torch.empty, dtype=torch.uint8)


class LaggingRunner(HostRunner):
    """What a device does, on the host: it knows the last token of each slot and a page table of its own, gets a step's
    arrays through a StepBuffer, and shows its tokens only when they are asked for."""

    ahead = 1

    def __init__(self, decoder: Decoder, page_size: int, max_slots: int):
        super().__init__(decoder, page_size, max_slots)
        sizes = decoder.max_step_tokens, max_slots, decoder.max_samples
        self._buffers = [StepBuffer(*sizes, empty_bytes) for _ in range(2)]
        self._last_token = np.full(max_slots + 1, -7, np.int32)
        self._table = torch.full((max_slots, -(-decoder.max_positions // page_size)), -7, dtype=torch.int32)
        self._waiting: Callable[[], None] | None = None
        self.most_ahead = self.waited = 0

    def start(self, step: Step, rows: Rows) -> None:
        buffer = self._buffers[step.index % 2]
        buffer.data.fill_(0xEE)
        shape = StepShape(step.num_tokens, step.num_samples, copies=len(step.copy_source))
        buffer.fill(step, self.slots, shape)
        for slot, column, page in step.page_updates:
            self._table[slot, column] = page
        ids, slots = buffer.arrays["token_ids"].numpy(), buffer.arrays["slot"].numpy()
        for i in np.flatnonzero(step.token_ids < 0):
            ids[i] = self._last_token[slots[i]]
        given = buffer.step_input(shape, self._table)
        a, count = given.attention, step.num_seqs  # the CPU's attention takes no empty sequences
        attention = replace(a, q_start=a.q_start[: count + 1], kv_len=a.kv_len[:count], slot=a.slot[:count])
        adapters = grouped_rows(rows)
        if self._decoder.pooling:
            states = self._decoder.pool(replace(given, attention=attention, adapters=adapters), self._cache)
            self._done.append(StepOutput(SampleOutput(torch.zeros(step.num_samples, dtype=torch.int32)), states=states))
            return
        scored = rows.scored()
        score = ScoreInput(torch.from_numpy(scored[0]), torch.from_numpy(scored[1]), scored[2]) if scored else None
        logits, scores = self._decoder.forward(
            replace(given, attention=attention, score=score, adapters=adapters), self._cache
        )

        def sample() -> None:
            out = SampleOutput(torch.zeros(0, dtype=torch.int32))
            if step.num_samples:
                extras = self.slots.extras(step.sample_slot, step.sample_count, rows)
                out = self._decoder.ops.sample(logits, buffer.sample_input(step.num_samples, **extras))
                self._last_token[step.sample_slot] = out.tokens.numpy()
            self._done.append(StepOutput(out, scores))

        self.most_ahead = max(self.most_ahead, len(self._done) + 1)
        if self._done and self.slots.need_tokens(step.sample_slot):
            self._waiting = sample
        else:
            sample()

    def sample(self) -> None:
        if self._waiting is not None:
            assert not self._done, "the tokens before are taken first"
            self._waiting()
            self._waiting = None
            self.waited += 1


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder()


PLAIN = SamplingParams(max_tokens=16, ignore_eos=True)
CASES = {
    "greedy": PLAIN,
    "end of text": replace(PLAIN, ignore_eos=False),
    "stop ids": replace(PLAIN, stop_token_ids=tuple(range(5, VOCAB, 6)), min_tokens=3),
    "stop strings": replace(PLAIN, stop=("A", "b", "C", "d", "xy"), min_tokens=2),
    "samples": replace(PLAIN, n=3, temperature=1.0, top_p=0.9),
    "stopped samples": replace(PLAIN, n=3, temperature=1.0, stop=("E", "f"), stop_token_ids=(9, 19, 29)),
    "logprobs": replace(PLAIN, logprobs=3, temperature=0.7, stop=("E", "f", "G")),
    "penalties": replace(PLAIN, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5),
    "bad words": replace(PLAIN, bad_words=("A", "BC", "D"), ignore_eos=False),
    "one token": replace(PLAIN, max_tokens=1),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_pages": 24, "max_slots": 6, "max_step_tokens": 7, "expected_share": 0.01},  # preempts
    {"max_slots": 1},
    {"prefix_cache": False},
]


def plain(completions: dict[int, Completion]) -> dict[int, list[tuple]]:
    return {
        id: [
            (s.token_ids.tolist(), s.text, s.finish_reason, s.logprobs and s.logprobs.top_ids.tolist())
            for s in completion.samples
        ]
        for id, completion in completions.items()
    }


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.feature("engine", "the host works on one step while the device computes the next, with the same results")
def test_a_step_ahead_changes_no_completion(decoder: Decoder, case: str, options: dict[str, Any]) -> None:
    requests = [Request(i, p, CASES[case], seed=i) for i, p in enumerate(random_prompts(12))]
    step_by_step, ahead = make_engine(decoder, **options), make_engine(decoder, make_runner=LaggingRunner, **options)
    want = plain(run(step_by_step, requests))
    assert plain(run(ahead, requests)) == want
    assert ahead._runner.most_ahead == 2
    assert (ahead._runner.waited > 0) == (case in ("penalties", "bad words"))
    while ahead._scheduler.num_steps_ahead:
        assert ahead.step() == []
    generated = sum(len(tokens) for samples in want.values() for tokens, *_ in samples)
    assert ahead.stats().output_tokens == step_by_step.stats().output_tokens == generated
    assert ahead.stats().pages_used == 0
    ahead._scheduler.check_integrity()


def test_preemption_happens_in_these_tests(decoder: Decoder) -> None:
    engine = make_engine(decoder, make_runner=LaggingRunner, **OPTIONS[1])
    run(engine, [Request(i, p, PLAIN) for i, p in enumerate(random_prompts(12))])
    assert engine.stats().preemptions > 0


def test_penalised_rows_come_and_go_among_others(decoder: Decoder) -> None:
    kinds = [PLAIN, CASES["penalties"], CASES["stop strings"]]
    requests = [
        Request(i, p, replace(kinds[i % 3], max_tokens=5 + i), seed=i) for i, p in enumerate(random_prompts(15))
    ]
    want = plain(run(make_engine(decoder), requests))
    engine = make_engine(decoder, make_runner=LaggingRunner)
    got: dict[int, Completion] = {}
    for request in requests:  # a new one in every second step
        engine.add(request)
        for _ in range(2):
            got |= {completion.id: completion for completion in engine.step()}
    assert plain(got | run(engine, [])) == want


def test_a_request_abandoned_with_a_step_under_way_keeps_what_is_known(decoder: Decoder) -> None:
    requests = [Request(i, p, replace(PLAIN, n=2, temperature=1.0), seed=i) for i, p in enumerate(random_prompts(4))]
    want = plain(run(make_engine(decoder), requests))
    engine = make_engine(decoder, make_runner=LaggingRunner)
    for request in requests:
        engine.add(request)
    done = {completion.id: completion for _ in range(9) for completion in engine.step()}
    assert engine._in_flight
    dropped = engine.abandon(2)
    rest = done | run(engine, [])
    while engine._scheduler.num_steps_ahead:
        engine.step()
    assert plain(rest) == {i: samples for i, samples in want.items() if i != 2}
    for sample, (tokens, *_) in zip(dropped.samples, want[2], strict=True):
        assert sample.token_ids.tolist() == tokens[: len(sample.token_ids)]
        assert len(sample.token_ids) >= 7
    kept = sum(len(s.token_ids) for c in [*rest.values(), dropped] for s in c.samples)
    assert engine.stats().output_tokens == kept


def test_an_engine_with_a_step_under_way_takes_new_requests(decoder: Decoder) -> None:
    """The last token of a request leaves a superfluous step behind where only its value ends the request."""
    engine = make_engine(decoder, make_runner=LaggingRunner)
    params = replace(PLAIN, stop_token_ids=tuple(range(VOCAB)))
    prompts = random_prompts(4)
    for i, prompt in enumerate(prompts):
        done = run(engine, [Request(i, prompt, params)])
        assert done[i].samples[0].finish_reason == "stop"
        assert len(done[i].samples[0].token_ids) == 1
    assert engine.stats().output_tokens == len(prompts)
    engine.close()
