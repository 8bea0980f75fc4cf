"""The engine: requests in, completions out, one step at a time, and one step ahead of a device that allows it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np

from batchinfer._engine import Scheduler, Step
from batchinfer.engine.bad_words import token_sequences
from batchinfer.engine.beams import Beams
from batchinfer.engine.constrain import CACHED, Constraint, Constraints
from batchinfer.engine.lengths import LengthPredictor
from batchinfer.engine.open_work import (
    OpenRequest,
    Sequence,
    StepRows,
    accepted,
    best_samples,
    no_scores,
    places_scored,
    record_scores,
    stack,
    unstack,
)
from batchinfer.engine.pooled import Layers, cache_rules, pooled_sample, record_states, trimmed
from batchinfer.engine.refusal import refusal
from batchinfer.engine.roofline import Costs
from batchinfer.engine.runner import Runner
from batchinfer.engine.seeds import sample_seed
from batchinfer.engine.step_clock import StepClock
from batchinfer.engine.texts import Ending, Text, Texts
from batchinfer.engine.trace import Trace
from batchinfer.models.tokenizer import Tokenizer
from batchinfer.ops import SampleOutput
from batchinfer.types import Completion, EngineStats, ErrorCode, PoolSpec, Request, RowError, Sample, SamplingParams

LENGTHS_EVERY = 32
"""Steps between two looks at how long the running sequences are by now: 0.1 ms for 256 of them."""

PORTION, PORTION_TOKENS = 256, 32768
"""Requests that go in between two steps, and tokens of their prompts, before those that are missing wait for the next
step: a request of 2,144 tokens takes the host 50 us, so that a portion is ready before a step of such tokens ends (30
ms), and 1,500 at once would let a device wait for 75 ms."""

SCORING = SamplingParams(max_tokens=1, ignore_eos=True)
"""Of a request of which nothing is wanted but scores: it leaves with the step that ends its prompt."""


@dataclass(frozen=True)
class Ended:
    """Why a sequence ended: reason as in Sample.finish_reason; ``by_string``: its newest token completed a stop
    string."""

    tokens: np.ndarray
    reason: str
    by_string: bool = False


class Engine:
    """Continuous batching over one scheduler and one runner. Not thread-safe: one thread adds and steps."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        tokenizer: Tokenizer,
        lengths: LengthPredictor,
        *,
        max_seq_len: int,
        max_slots: int,
        num_pages: int,
        page_size: int,
        vocab_size: int,
        weight_bytes: int = 0,
        trace: Trace | None = None,
        costs: Costs | None = None,
        pool: PoolSpec | None = None,
        dense: Layers = (),
        adapters: int = 0,
        flat_steps: bool = True,
        threads: int = 1,
    ):
        self._pool, self._dense = pool, dense
        self._adapters = adapters
        self.vocab_size = vocab_size
        self.flat_steps = flat_steps
        self._lengths = lengths
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.max_slots = max_slots
        self.kv_tokens = num_pages * page_size
        self._scheduler = scheduler
        self._runner = runner
        self._ahead = min(runner.ahead, scheduler.max_steps_ahead - 1)
        self._sequences: dict[int, Sequence] = {}
        self._constraints = Constraints(tokenizer, vocab_size, threads)
        self._texts = Texts(tokenizer)
        self._beams = Beams(self._texts, max_seq_len)
        self._bad_words = lru_cache(CACHED)(self._words_as_tokens)
        self._watched: dict[int, Sequence] = {}  # those with stop strings or logprobs: host work for every token
        self._in_flight: deque[StepRows] = deque()  # the steps that are started and whose tokens are not taken yet
        self._stopped: set[int] = set()  # ended when their next token was already under way
        self._constrained = 0  # open sequences
        self._scored = 0  # open sequences whose prompts are scored
        self._refused: list[Completion] = []
        self._next_id = 0
        self._open = 0
        self._fresh, self._fresh_tokens = 0, 0  # requests since the last step, and tokens of their prompts
        self._closed = False
        self._stats = EngineStats(pages_total=num_pages, weight_bytes=weight_bytes)
        self._clock = StepClock(self._stats, trace, costs)

    @property
    def num_open(self) -> int:
        """Requests added and not yet returned."""
        return self._open

    @property
    def wants_more(self) -> bool:
        """Whether another request would help to keep the batch full: half a batch waits beside the running one. They go
        in step by step, a portion at a time."""
        if self._fresh >= PORTION and self._fresh_tokens >= PORTION_TOKENS:
            return False
        return self._scheduler.num_open < self.max_slots + self.max_slots // 2 + 1

    @property
    def num_running(self) -> int:
        """Open samples that have a slot."""
        return self._scheduler.num_running

    def tokens_left(self) -> np.ndarray:
        """New tokens that each open sample, running or waiting, will probably still get: int64 [K] in no order."""
        return self._scheduler.tokens_left()

    def limit_prompts(self, step_tokens: int) -> None:
        """Steps have prompt tokens only up to so many tokens in all from now on; 0: as many as fit."""
        self._scheduler.limit_prompts(step_tokens)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache of what no open request holds."""
        self._scheduler.forget_prefixes()

    def expected_tokens(self, request: Request) -> int:
        """New tokens that each sample of a request will probably get, beside those that it brings along."""
        if request.scored_from is not None or self._pool:
            return 1
        params = request.sampling
        before = max((len(sample.token_ids) for sample in request.so_far if not sample.finish_reason), default=0)
        room = self.max_seq_len - len(request.prompt)
        return max(0, min(room, self._lengths.expected(params.max_tokens, request.group)) - before)

    def add(self, request: Request) -> None:
        """Take a request. One that can't run comes back from the next :meth:`step` as a Completion with an error."""
        if not self._open:
            self._clock.resume()
        self._open += not self._beams.is_beam(request.id)
        self._fresh, self._fresh_tokens = self._fresh + 1, self._fresh_tokens + len(request.prompt)
        if self._pool or request.scored_from is not None:
            request = replace(request, prompt=trimmed(request.prompt, self._pool), sampling=SCORING)
        error, constraints = refusal(request, self.max_seq_len, self.vocab_size, self._adapters), []
        if error is None and request.sampling.beam_width:
            reason = self._beams.refusal(request)
            if reason is None:
                for beam in self._beams.begin(request):
                    self.add(beam)
                return
            error = RowError(ErrorCode.BAD_SAMPLING, reason)
        if error is None:
            try:
                constraints = self._constraints_of(request)
            except ValueError as reason:
                error = RowError(ErrorCode.BAD_CONSTRAINT, str(reason))
        if error is None:
            try:
                self._add_samples(request, constraints)
            except ValueError as reason:  # of the first sample already: all are alike
                error = RowError(
                    ErrorCode.KV_CAPACITY,
                    f"{reason}: raise engine.kv_cache_gb, or lower sampling.max_tokens or engine.max_model_len",
                )
        if error is None:
            self._stats.prompt_tokens += len(request.prompt)
            self._stats.needed_prompt_tokens += len(request.prompt) * request.sampling.samples
        else:
            self._refused.append(Completion(request.id, len(request.prompt), error=error))

    def _add_samples(self, request: Request, constraints: list[Constraint | None]) -> None:
        params = request.sampling
        owner = OpenRequest(request, [None] * params.samples, params.samples)
        scored_from, wide = request.scored_from, 1
        if params.prompt_logprobs is not None:
            scored_from, wide = 1, params.prompt_logprobs
        for index in range(params.samples):
            before = request.so_far[index] if request.so_far else None
            if before is not None and before.finish_reason:
                owner.samples[index] = before
                owner.missing -= 1
                continue
            seq_id = self._next_id
            self._scheduler.add(
                seq_id,
                request.prompt,
                max_new_tokens=params.max_tokens,
                min_new_tokens=params.min_tokens,
                expected_new_tokens=self._lengths.expected(params.max_tokens, request.group),
                **cache_rules(request.adapter, scored_from, self._pool),
                lookup=not params.constrained,  # its grammar would have to foresee the draft
                stop_token_ids=self._texts.stop_ids(request),
                generated=() if before is None else before.token_ids,
            )
            self._next_id += 1
            self._constrained += params.constrained
            sequence = Sequence(owner, index, unstack(before), constraint=constraints[index])
            self._sequences[seq_id] = sequence
            if scored_from is not None:
                self._scored += 1
                sequence.scored_from, scored_from = scored_from, None  # the samples share a prompt: one scores it
                sequence.scores = no_scores(len(request.prompt) - sequence.scored_from, wide)
            if params.stop or params.computed_logprobs is not None:
                self._watched[seq_id] = sequence

    def step(self) -> list[Completion]:
        """Start one step, and take the tokens of the oldest under way if the runner needs them taken; return the
        requests that this completed. [] at once when nothing is open.

        With a step ahead, a sequence whose end only its tokens can tell (stop token or string) is computed once more,
        for nothing; a GPU spares its attention where a stop token ended it. What is sampled by all tokens so far
        (penalties, bad words, a constraint) is sampled when they are taken, while the device is at the layers of this
        step already. With drafts, which begin behind the newest token, there is no step ahead.
        """
        begin = time.perf_counter()
        done, self._refused = self._refused, []
        started = self._start_step()
        if len(self._in_flight) > (self._ahead if started else 0):
            done += self._finish_step()
        self._runner.sample()
        if self._beams:
            done = self._beams.sift(done, self.add)
        self._open -= len(done)
        if started or done:
            self._clock.step(begin, self._scheduler.num_running)
        return done

    def _start_step(self) -> bool:
        """Whether there was one to start."""
        begin = time.perf_counter()
        self._fresh = self._fresh_tokens = 0
        step = self._scheduler.schedule()
        if step is None:
            return False
        for slot, seq_id in zip(step.new_slots.tolist(), step.new_seqs.tolist(), strict=True):
            self._assign(slot, seq_id)
        places = tuple(places_scored(step, self._sequences)) if self._scored else ()
        rows = StepRows(
            step, self._sequences, self._scheduler.tokens, self._constraints, places, adapted=self._adapters > 0
        )
        begin = self._clock.phase("schedule", begin)
        self._runner.start(step, rows)
        self._in_flight.append(rows)
        self._clock.phase("launch", begin)
        return True

    def _finish_step(self) -> list[Completion]:
        """Take the tokens of the oldest step under way; completions of the requests whose last sample ended."""
        begin = time.perf_counter()
        out = self._runner.finish()
        begin = self._clock.phase("wait", begin)
        rows = self._in_flight.popleft()
        step = rows.step
        wasted = sum(seq_id in self._stopped for seq_id in step.sample_seq.tolist()) if self._stopped else 0
        self._stopped.clear()
        self._stats.pages_peak = max(self._stats.pages_peak, self._scheduler.pages_used)
        if rows.places:
            record_scores(rows.places, out.scores)
        if self._pool:
            record_states(step, out.states.numpy(), self._pool, self._sequences)
        self._stats.steps += 1
        done = self._take(step, out.sample)
        self._stats.output_tokens -= wasted
        self._clock.count(rows, out, sampled=self._pool is None)
        self._clock.phase("output", begin)
        return done

    def unfinished(self) -> list[Completion]:
        """What there is of the requests that have begun and not ended: each can go on in another engine, as
        ``Request.so_far`` of the same request."""
        begun: dict[int, tuple[Request, list[Sample]]] = {}
        for seq_id, sequence in self._sequences.items():
            request = sequence.owner.request
            if self._beams.is_beam(request.id):
                continue  # a search begins anew
            if request.id not in begun:
                begun[request.id] = request, [sample or _NOTHING for sample in sequence.owner.samples]
            logprobs = stack(sequence.logprobs, request.sampling.computed_logprobs)
            begun[request.id][1][sequence.index] = Sample(self._scheduler.tokens(seq_id), "", "", logprobs)
        states = [Completion(r.id, len(r.prompt), tuple(samples)) for r, samples in begun.values()]
        return [state for state in states if any(len(sample.token_ids) for sample in state.samples)]

    def abandon(self, request_id: int) -> Completion:
        """Drop an open request and return what there is of it, with the text so far. KeyError if it is not open."""
        if request_id in self._beams:
            for beam in self._beams.asked(request_id):
                self.abandon(beam)
            self._open -= 1
            return self._beams.drop(request_id)
        mine = {i: s for i, s in self._sequences.items() if s.owner.request.id == request_id}
        if not mine:
            raise KeyError(request_id)
        owner = next(iter(mine.values())).owner
        samples = [sample or _NOTHING for sample in owner.samples]
        for seq_id, sequence in mine.items():
            tokens = self._scheduler.tokens(seq_id)
            (text,) = self._texts.of([Ending(owner.request, tokens)])
            logprobs = stack(sequence.logprobs, owner.request.sampling.logprobs)
            samples[sequence.index] = Sample(tokens, text.text, "", logprobs, text.reasoning)
            self._scheduler.finish(seq_id)
            self._forget(seq_id)
            if self._in_flight:
                self._stopped.add(seq_id)
        self._open -= not self._beams.is_beam(request_id)
        return Completion(request_id, len(owner.request.prompt), tuple(samples[: owner.request.sampling.n]))

    def stats(self) -> EngineStats:
        """Counters so far."""
        scheduler, stats = self._scheduler, self._stats
        stats.cached_prompt_tokens = scheduler.cached_prompt_tokens
        stats.preemptions = scheduler.preemptions
        stats.drafted_tokens, stats.accepted_tokens = scheduler.drafted_tokens, scheduler.accepted_tokens
        stats.running, stats.waiting = scheduler.num_running, scheduler.num_waiting
        stats.pages_used = scheduler.pages_used
        stats.step_seconds = self._clock.seconds | self._runner.seconds
        stats.device_bytes = self._runner.peak_device_bytes()
        return stats

    def close(self) -> None:
        """Drop what is open and give the memory back; the engine can't be used afterwards."""
        if self._closed:
            return
        self._closed = True
        self._runner.close()
        self._clock.close()
        for seq_id in list(self._sequences):
            self._scheduler.finish(seq_id)
        self._in_flight.clear()
        self._sequences.clear()
        self._watched.clear()

    def _constraints_of(self, request: Request) -> list[Constraint | None]:
        """Each sample's, after the tokens that it has. ValueError says what is wrong with it."""
        constraints = [self._constraints.constraint(request.sampling) for _ in range(request.sampling.samples)]
        for constraint, before in zip(constraints, request.so_far, strict=False):
            if constraint is not None and not before.finish_reason:
                constraint.take(before.token_ids)
        return constraints

    def _assign(self, slot: int, seq_id: int) -> None:
        sequence = self._sequences[seq_id]
        request = sequence.owner.request
        seed = sample_seed(request.seed, sequence.index)
        bad_words = self._bad_words(request.sampling.bad_words) if request.sampling.bad_words else ()
        self._runner.slots.assign(slot, request.sampling, seed, self._texts.stop_ids(request), bad_words)

    def _take(self, step: Step, out: SampleOutput) -> list[Completion]:
        """Record the step's tokens and end what they end."""
        tokens = out.tokens.numpy()
        kept = accepted(step, tokens)
        self._stats.output_tokens += int(kept.sum())
        if self._watched:
            self._record_logprobs(step, out, kept)
        failed = self._advance_constraints(step, out) if self._constrained else []
        ended = {f.seq_id: Ended(f.tokens, f.reason) for f in self._scheduler.update(tokens)}
        done = [self._fail(seq_id, ended) for seq_id in failed if seq_id in self._sequences]
        if self._watched:
            self._stop_at_strings(step, ended)
        endings = [Ending(self._request(seq_id), end.tokens, end.by_string) for seq_id, end in ended.items()]
        for (seq_id, end), text in zip(ended.items(), self._texts.of(endings), strict=True):
            completion = self._end_sample(seq_id, end, text)
            if completion is not None:
                done.append(completion)
        if self._stats.steps % LENGTHS_EVERY == 0:
            self._tell_running_lengths(step, kept)
        return done

    def _tell_running_lengths(self, step: Step, kept: np.ndarray) -> None:
        """Of the sequences that the step sampled and did not end."""
        newest = {seq_id: row for row, seq_id in enumerate(step.sample_seq.tolist()) if kept[row]}
        rows = [row for seq_id, row in newest.items() if seq_id in self._sequences]
        requests = [self._request(seq_id) for seq_id in step.sample_seq[rows].tolist()]
        self._lengths.running(
            step.sample_count[rows] + 1,
            np.array([request.sampling.max_tokens for request in requests], np.int64),
            np.array([request.group for request in requests], np.int64),
        )

    def _record_logprobs(self, step: Step, out: SampleOutput, kept: np.ndarray) -> None:
        if out.chosen is None:
            return
        chosen, top_ids, top = out.chosen.numpy(), out.top_ids.numpy(), out.top.numpy()
        for row in np.flatnonzero(kept).tolist():
            sequence = self._watched.get(int(step.sample_seq[row]))
            wanted = None if sequence is None else sequence.owner.request.sampling.computed_logprobs
            if wanted is not None:
                sequence.logprobs.append((float(chosen[row]), top_ids[row, :wanted], top[row, :wanted]))

    def _advance_constraints(self, step: Step, out: SampleOutput) -> list[int]:
        """Tell the constraints their newest tokens; the sequences that can't go on."""
        failed = []
        for seq_id, token in zip(step.sample_seq.tolist(), out.tokens.tolist(), strict=True):
            sequence = self._sequences.get(seq_id)
            if sequence is None or sequence.constraint is None:
                continue
            try:
                if not sequence.failure:
                    sequence.constraint.take([token])
            except ValueError as error:
                sequence.failure = str(error)
            if sequence.failure:
                failed.append(seq_id)
        return failed

    def _fail(self, seq_id: int, ended: dict[int, Ended]) -> Completion:
        """End the request of a sequence whose constraint has failed. ``ended``: what the scheduler has let go in this
        step; the request's own are taken out."""
        sequence = self._sequences[seq_id]
        request = sequence.owner.request
        for other in [i for i, s in self._sequences.items() if s.owner is sequence.owner]:
            if ended.pop(other, None) is None:
                self._scheduler.finish(other)
            self._forget(other)
            if self._in_flight:
                self._stopped.add(other)
        error = RowError(ErrorCode.BAD_CONSTRAINT, f"after some tokens: {sequence.failure}")
        return Completion(request.id, len(request.prompt), error=error)

    def _stop_at_strings(self, step: Step, ended: dict[int, Ended]) -> None:
        """End the sequences whose new tokens completed a stop string, there: a draft may go on behind it."""
        before = dict(zip(step.sample_seq.tolist()[::-1], step.sample_count.tolist()[::-1], strict=True))
        for seq_id in reversed(before):
            if seq_id not in self._watched or not (params := self._request(seq_id).sampling).stop:
                continue
            end = ended.get(seq_id)
            tokens = self._scheduler.tokens(seq_id) if end is None else end.tokens
            by_token = end is not None and end.reason == "stop"
            stop = self._texts.first_stop(params, tokens[:-1] if by_token else tokens, before[seq_id])
            if stop is None:
                continue
            if end is None:
                self._scheduler.finish(seq_id)
            self._stats.output_tokens -= len(tokens) - stop
            ended[seq_id] = Ended(tokens[:stop], "stop", by_string=True)

    def _words_as_tokens(self, words: tuple[str, ...]) -> tuple[np.ndarray, ...]:
        return token_sequences(words, partial(self.tokenizer.encode_batch, add_special_tokens=False))

    def _request(self, seq_id: int) -> Request:
        return self._sequences[seq_id].owner.request

    def _end_sample(self, seq_id: int, end: Ended, text: Text) -> Completion | None:
        """Record a sample; the request's completion if it was the last one."""
        sequence = self._forget(seq_id)
        owner = sequence.owner
        request, params = owner.request, owner.request.sampling
        if end.reason == "stop" and self._in_flight:
            self._stopped.add(seq_id)
        if request.scored_from is not None:
            sample = Sample(request.prompt[request.scored_from :], "", "scored", sequence.scores)
            self._stats.output_tokens -= 1  # the one that came with it is of no use
        elif self._pool:
            sample = pooled_sample(sequence.state, len(request.prompt), self._pool, self._dense)
            self._stats.output_tokens -= 1
        else:
            if not self._beams.is_beam(request.id):
                self._lengths.finished(len(end.tokens), params.max_tokens, request.group)
            logprobs = stack(sequence.logprobs[: len(end.tokens)], params.computed_logprobs)
            sample = Sample(end.tokens, text.text, end.reason, logprobs, text.reasoning)
            owner.prompt_logprobs = owner.prompt_logprobs or sequence.scores
        owner.samples[sequence.index] = sample
        owner.missing -= 1
        if owner.missing:
            return None
        samples = best_samples([s for s in owner.samples if s is not None], params)
        prompt_tokens = len(request.prompt) if request.scored_from is None else request.scored_from
        return Completion(request.id, prompt_tokens, samples, prompt_logprobs=owner.prompt_logprobs)

    def _forget(self, seq_id: int) -> Sequence:
        self._watched.pop(seq_id, None)
        sequence = self._sequences.pop(seq_id)
        params = sequence.owner.request.sampling
        self._constrained -= params.constrained
        self._scored -= sequence.scores is not None
        return sequence


_NOTHING = Sample(np.zeros(0, np.int32), "", "")
