"""Beam search: the texts with the highest sum of log-probabilities that a search of a fixed width finds.

A beam's next tokens come from a request of one token for its text so far, which the prefix cache makes cheap: no more
is computed than the beam's last page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from batchinfer.engine.texts import Ending, Texts
from batchinfer.types import Completion, Logprobs, Request, RowError, Sample, SamplingParams

MOST_OPTIONS = 64
"""The most alternatives of a token that a sampler reports."""


@dataclass(frozen=True)
class Beam:
    """``score``: the sum of the log-probabilities of its tokens, divided by length ** length_penalty once finished.
    float32, as in transformers, whose choices these are."""

    tokens: tuple[int, ...] = ()
    score: np.float32 = field(default_factory=lambda: np.float32(0))


def options_needed(width: int, stops: int) -> int:
    """How many of the likeliest tokens of each beam must be known for ``width`` that go on to be among them, where
    ``stops`` tokens end a text."""
    return max(2, 1 + stops) * width


class BeamSearch:
    """One search, without its model. The rules are those of transformers' ``generate`` with ``num_beams`` and
    ``early_stopping=False``: of the likeliest continuations of all running beams, those that end are finished if they
    are among the first ``width``, and the first ``width`` of the others run on. It ends when no running beam, at its
    present length, would displace one of ``width`` finished ones, or at ``max_tokens``.
    """

    def __init__(self, width: int, max_tokens: int, stop_ids: Iterable[int], length_penalty: float = 1.0):
        self._width, self._max_tokens = width, max_tokens
        self._stop_ids, self._penalty = frozenset(stop_ids), length_penalty
        self.options = options_needed(width, len(self._stop_ids))
        self.running = [Beam()]
        self.finished: list[Beam] = []

    @property
    def done(self) -> bool:
        return not self.running

    def advance(self, next_tokens: Sequence[Logprobs]) -> None:
        """Go on by a token. ``next_tokens``: of each running beam, one token's alternatives, ``options`` of them."""
        length = len(self.running[0].tokens) + 1
        found = [
            Beam((*beam.tokens, int(token)), beam.score + np.float32(logprob))
            for beam, after in zip(self.running, next_tokens, strict=True)
            for token, logprob in zip(after.top_ids[-1], after.top[-1], strict=True)
            if token >= 0
        ]
        found = sorted(found, key=lambda beam: -beam.score)[: self.options]
        at_end = length == self._max_tokens
        ended = [at_end or beam.tokens[-1] in self._stop_ids for beam in found]
        scale = np.float32(length**self._penalty)
        new = [Beam(b.tokens, b.score / scale) for b, e in zip(found[: self._width], ended, strict=False) if e]
        self.finished = sorted(self.finished + new, key=lambda beam: -beam.score)[: self._width]
        self.running = [beam for beam, end in zip(found, ended, strict=True) if not end][: self._width]
        full = len(self.finished) == self._width
        if full and self.running and self.running[0].score / scale <= self.finished[-1].score:
            self.running = []


@dataclass
class _Open:
    request: Request
    search: BeamSearch
    answers: dict[int, Completion | None]  # by the number of the beam's request, in the order of the running beams


class Beams:
    """The open requests that are beam searches. Their beams' own requests have negative numbers."""

    def __init__(self, texts: Texts, max_seq_len: int):
        self._texts, self._max_seq_len = texts, max_seq_len
        self._open: dict[int, _Open] = {}
        self._owner: dict[int, int] = {}
        self._next = -1

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._open

    def refusal(self, request: Request) -> str | None:
        """Why the search is too wide, if it is."""
        params, stops = request.sampling, len(set(self._texts.stop_ids(request).tolist()))
        if options_needed(params.beam_width, stops) <= MOST_OPTIONS:
            return None
        return (
            f"beam_width={params.beam_width} is not allowed: with {stops} tokens that end a text it may be "
            f"{MOST_OPTIONS // options_needed(1, stops)} at most"
        )

    def begin(self, request: Request) -> list[Request]:
        """The requests of its first beam."""
        params = request.sampling
        room = min(params.max_tokens, self._max_seq_len - len(request.prompt))
        stops = self._texts.stop_ids(request).tolist()
        self._open[request.id] = _Open(request, BeamSearch(params.beam_width, room, stops, params.length_penalty), {})
        return self._ask(request.id)

    def sift(self, done: Iterable[Completion], add: Callable[[Request], None]) -> list[Completion]:
        """What has come out of the engine, with the searches that this ends in place of their beams. ``add`` takes the
        requests of those that go on."""
        out = []
        for completion in done:
            owner = self._owner.pop(completion.id, None)
            if owner is None:
                out.append(completion)
                continue
            opened = self._open[owner]
            opened.answers[completion.id] = completion
            answers = list(opened.answers.values())
            if any(answer is None for answer in answers):
                continue
            error = next((answer.error for answer in answers if answer.error), None)
            if error is None:
                opened.search.advance([answer.samples[0].logprobs for answer in answers])
            if error or opened.search.done:
                out.append(self._end(owner, error))
            else:
                for request in self._ask(owner):
                    add(request)
        return out

    def asked(self, request_id: int) -> list[int]:
        """A search's requests that are still open."""
        return [number for number, answer in self._open[request_id].answers.items() if answer is None]

    def drop(self, request_id: int) -> Completion:
        """What there is of a search that is given up."""
        for number in self.asked(request_id):
            del self._owner[number]
        return Completion(request_id, len(self._open.pop(request_id).request.prompt))

    def is_beam(self, request_id: int) -> bool:
        """Whether it is a beam's own request."""
        return request_id in self._owner

    def _ask(self, request_id: int) -> list[Request]:
        opened = self._open[request_id]
        params = SamplingParams(max_tokens=1, ignore_eos=True, logprobs=opened.search.options)
        asked = []
        for beam in opened.search.running:
            prompt = np.concatenate([opened.request.prompt, np.array(beam.tokens, np.int32)])
            asked.append(
                Request(self._next, prompt, params, group=opened.request.group, adapter=opened.request.adapter)
            )
            self._owner[self._next] = request_id
            self._next -= 1
        opened.answers = dict.fromkeys(request.id for request in asked)
        return asked

    def _end(self, request_id: int, error: RowError | None) -> Completion:
        opened = self._open.pop(request_id)
        request = opened.request
        if error:
            return Completion(request_id, len(request.prompt), error=error)
        best = [np.array(beam.tokens, np.int32) for beam in opened.search.finished[: request.sampling.n]]
        texts = self._texts.of([Ending(request, tokens) for tokens in best])
        stops = self._texts.stop_ids(request)
        samples = tuple(
            Sample(tokens, text.text, "stop" if tokens[-1] in stops else "length", None, text.reasoning)
            for tokens, text in zip(best, texts, strict=True)
        )
        return Completion(request_id, len(request.prompt), samples)
