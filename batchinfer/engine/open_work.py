"""What the engine knows of its open requests, and tells a runner of the rows of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from batchinfer._engine import Step
from batchinfer.engine.constrain import Constraint, Constraints
from batchinfer.engine.slots import History, ScoredRows
from batchinfer.models.decoder import Scores
from batchinfer.types import Logprobs, Request, Sample, SamplingParams

_NO_TOKENS = np.zeros(0, np.int32)


@dataclass(slots=True)
class OpenRequest:
    """A request some of whose samples are still being generated."""

    request: Request
    samples: list[Sample | None]
    missing: int
    prompt_logprobs: Logprobs | None = None


@dataclass(slots=True)
class Sequence:
    """One sample of a request, as the scheduler knows it."""

    owner: OpenRequest
    index: int
    logprobs: list[tuple[float, np.ndarray, np.ndarray]] = field(default_factory=list)
    scored_from: int | None = None  # prompt tokens from here on get their log-probabilities
    scores: Logprobs | None = None  # these, filled in as the prompt is computed
    state: np.ndarray | None = None  # of a pooled one: float64, what the steps so far have given of it
    constraint: Constraint | None = None
    failure: str = ""  # why the constraint can't go on; its request fails with the step


@dataclass(frozen=True, slots=True)
class Scored:
    """Consecutive prompt tokens of one sequence, the first at index ``first``, and the rows int32 of a step that have
    their log-probabilities."""

    sequence: Sequence
    first: int
    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class StepRows:
    """The :class:`batchinfer.engine.slots.Rows` of a step."""

    step: Step
    sequences: dict[int, Sequence]
    tokens: Callable[[int], np.ndarray]
    constraints: Constraints
    places: tuple[Scored, ...] = ()
    adapted: bool = False  # whether sequences may have adapters

    def adapters(self) -> tuple[np.ndarray, np.ndarray] | None:
        if not self.adapted:
            return None
        numbers = [self.sequences[i].owner.request.adapter for i in self.step.seq_ids.tolist()]
        of_sequence = np.array([-1 if number is None else number for number in numbers], np.int32)
        if (of_sequence < 0).all():
            return None
        of_token = np.repeat(of_sequence, np.diff(self.step.q_start))
        return of_token, of_token[self.step.sample_row]

    def history(self, row: int) -> History:
        seq_id = int(self.step.sample_seq[row])
        if seq_id not in self.sequences:
            return _NO_TOKENS, _NO_TOKENS
        tokens, end = self.tokens(seq_id), int(self.step.sample_row[row]) + 1
        drafted = int(self.step.sample_count[row]) - len(tokens)
        if drafted:
            tokens = np.concatenate([tokens, self.step.token_ids[end - drafted : end]])
        return self.sequences[seq_id].owner.request.prompt, tokens

    def allow(self, rows: list[int], masks: np.ndarray) -> None:
        found = [(row, self.sequences.get(int(self.step.sample_seq[row]))) for row in rows]
        going_on = [(row, sequence) for row, sequence in found if sequence is not None]
        constraints = [sequence.constraint for _, sequence in going_on]
        failures = self.constraints.allow(constraints, [row for row, _ in going_on], masks)
        for (_, sequence), failure in zip(going_on, failures, strict=True):
            sequence.failure = failure

    def scored(self) -> ScoredRows | None:
        if not self.places:
            return None
        tokens = [p.sequence.owner.request.prompt[p.first : p.first + len(p.rows)] for p in self.places]
        wide = max(p.sequence.scores.top.shape[1] for p in self.places)
        return np.concatenate([p.rows for p in self.places]), np.concatenate(tokens).astype(np.int64), wide


def places_scored(step: Step, sequences: dict[int, Sequence]) -> Iterator[Scored]:
    """What the step foretells of the prompts that are scored."""
    for i, seq_id in enumerate(step.seq_ids.tolist()):
        sequence = sequences[seq_id]
        request = sequence.owner.request
        if sequence.scored_from is None:
            continue
        begin, end = int(step.q_start[i]), int(step.q_start[i + 1])
        position = int(step.positions[begin])  # the row of a token foretells the one after it
        first = max(position + 1, sequence.scored_from)
        last = min(position + end - begin, len(request.prompt) - 1)
        if first <= last:
            rows = np.arange(begin + first - position - 1, begin + last - position, dtype=np.int32)
            yield Scored(sequence, first, rows)


def no_scores(tokens: int, wide: int) -> Logprobs:
    """Of so many tokens, with ``wide`` alternatives each, to be filled in."""
    chosen, top = np.full(tokens, np.nan, np.float32), np.full((tokens, wide), np.nan, np.float32)
    return Logprobs(chosen, np.full((tokens, wide), -1, np.int32), top)


def record_scores(places: Iterable[Scored], scores: Scores) -> None:
    """Put a step's scores, on the host and in the order of ``places``, where they belong."""
    start = 0
    for place in places:
        end = start + len(place.rows)
        to = place.first - place.sequence.scored_from
        into, target = place.sequence.scores, slice(to, to + len(place.rows))
        wide = min(into.top.shape[1], scores.top.shape[1])  # a vocabulary may have fewer
        into.chosen[target] = scores.chosen[start:end].numpy()
        into.top_ids[target, :wide] = scores.top_ids[start:end, :wide].numpy()
        into.top[target, :wide] = scores.top[start:end, :wide].numpy()
        start = end


def accepted(step: Step, tokens: np.ndarray) -> np.ndarray:
    """Which rows of a step, bool [N], are the next tokens of their sequences, where ``tokens`` int32 [N] were sampled:
    those after draft tokens only if all of these were what the rows before sampled."""
    first = np.ones(step.num_samples, bool)
    first[1:] = step.sample_seq[1:] != step.sample_seq[:-1]
    if first.all():
        return first
    wrong = np.zeros(step.num_samples, np.int32)
    wrong[1:] = ~first[1:] & (step.token_ids[step.sample_row[1:]] != tokens[:-1])
    sums, begins = np.cumsum(wrong), np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))
    return sums == sums[begins]


def best_samples(samples: list[Sample], params: SamplingParams) -> tuple[Sample, ...]:
    """The ``n`` of them whose tokens have the highest mean log-probability, best first; all if no more were
    generated."""
    if len(samples) <= params.n:
        return tuple(samples)
    ranked = sorted(samples, key=lambda sample: -sample.logprobs.chosen.mean(dtype=np.float64))[: params.n]
    return tuple(ranked if params.logprobs is not None else [replace(sample, logprobs=None) for sample in ranked])


def unstack(sample: Sample | None) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """The inverse of :func:`stack`."""
    if sample is None or sample.logprobs is None:
        return []
    logprobs = sample.logprobs
    return [(float(c), ids, top) for c, ids, top in zip(logprobs.chosen, logprobs.top_ids, logprobs.top, strict=True)]


def stack(rows: list[tuple[float, np.ndarray, np.ndarray]], wanted: int | None) -> Logprobs | None:
    """One token's after the other's as arrays; None if no log-probabilities are ``wanted``."""
    if wanted is None:
        return None
    return Logprobs(
        chosen=np.array([chosen for chosen, _, _ in rows], np.float32),
        top_ids=np.array([ids for _, ids, _ in rows], np.int32).reshape(len(rows), wanted),
        top=np.array([top for _, _, top in rows], np.float32).reshape(len(rows), wanted),
    )
