"""The joint between the job half and the engine half: plain data, no torch, no pyarrow, no MPI.

A :class:`Request` goes into the engine, a :class:`Completion` comes out. The job maps rows to requests and
completions to rows; the engine never learns what a row is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Literal

import numpy as np

ROW_BITS = 40
"""A row's identity is ``file ordinal << 40 | row index``: 2**24 files of 2**40 rows, in one unsigned 64-bit word."""

NEUTRAL_PENALTIES = (1.0, 0.0, 0.0)
"""Repetition, presence and frequency penalty that change nothing."""


class ErrorCode(str, Enum):
    """Why a row has no completion. A closed list: the value is what stands in the output column."""

    NULL_PROMPT = "NULL_PROMPT"
    EMPTY_PROMPT = "EMPTY_PROMPT"
    EMPTY_CONTINUATION = "EMPTY_CONTINUATION"
    INVALID_UTF8 = "INVALID_UTF8"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    BAD_MESSAGES = "BAD_MESSAGES"
    TEMPLATE_ERROR = "TEMPLATE_ERROR"
    BAD_TOKEN_IDS = "BAD_TOKEN_IDS"
    BAD_SAMPLING = "BAD_SAMPLING"
    BAD_CONSTRAINT = "BAD_CONSTRAINT"
    BAD_ADAPTER = "BAD_ADAPTER"
    KV_CAPACITY = "KV_CAPACITY"
    ENGINE_CRASH = "ENGINE_CRASH"
    TIMEOUT = "TIMEOUT"


@dataclass(frozen=True, slots=True)
class RowError:
    """One row's failure; its neighbours do not notice."""

    code: ErrorCode
    message: str


CONSTRAINTS = ("json_schema", "regex", "choice", "grammar")
"""Fields of SamplingParams that describe what the text must be."""


BEAM_FIELDS = (
    "max_tokens",
    "n",
    "beam_width",
    "length_penalty",
    "stop_token_ids",
    "ignore_eos",
    "include_stop",
    "skip_special_tokens",
    "detokenize",
    "truncate_prompt_tokens",
)
"""Fields of SamplingParams that a beam search looks at."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue a prompt. The neutral value of every field switches that field off.

    ``temperature`` 0 is greedy. ``logprobs`` is None (off) or the number of most likely alternatives to report
    beside the chosen token (0: the chosen token alone). ``seed`` is the run's seed; what a sample really draws
    from is ``Request.seed``. ``json_schema``, ``regex``, ``choice`` and ``grammar`` (Lark) each describe the whole
    text; one of them at most. ``bad_words`` are texts that a sample may not hold, ``logit_bias`` maps tokens to what is
    added to their logits. Of ``best_of`` samples (0: n) the ``n`` whose tokens have the highest mean log-probability
    are given, best first. ``beam_width`` above 0: the ``n`` best texts of a beam search, each sum of log-probabilities
    divided by length ** ``length_penalty``. ``prompt_logprobs`` is like ``logprobs``, for the tokens of the prompt.
    ``truncate_prompt_tokens``: a prompt is cut to its last so many tokens (0: it is not). ``include_stop``: the text
    keeps the stop string or stop token that ended it; ``skip_special_tokens``: it leaves special tokens out. Without
    ``detokenize`` there is no text, only tokens.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    n: int = 1
    best_of: int = 0
    beam_width: int = 0
    length_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    truncate_prompt_tokens: int = 0
    json_schema: str = ""
    regex: str = ""
    choice: tuple[str, ...] = ()
    grammar: str = ""

    def check(self) -> None:
        """Raise ValueError naming the first field outside its range, and the range."""
        ranges = {
            "max_tokens": (1, 2**20),
            "min_tokens": (0, self.max_tokens),
            "temperature": (0.0, 100.0),
            "top_k": (0, 2**20),
            "top_p": (math.ulp(0.0), 1.0),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (0.01, 100.0),
            "presence_penalty": (-100.0, 100.0),
            "frequency_penalty": (-100.0, 100.0),
            "seed": (0, 2**63 - 1),
            "n": (1, 1024),
            "beam_width": (0, 32),
            "length_penalty": (-10.0, 10.0),
            "truncate_prompt_tokens": (0, 2**27),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:  # also catches NaN
                raise ValueError(f"{name}={value!r} is not allowed: {name} must lie in [{low:g}, {high:g}]")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 64:
                raise ValueError(f"{name}={value!r} is not allowed: give null, or a number from 0 to 64")
        if self.best_of and not self.n <= self.best_of <= 1024:
            raise ValueError(f"best_of={self.best_of!r} is not allowed: give 0, or a number from n={self.n} to 1024")
        if self.beam_width:
            self._check_beams()
        if self.stop and not self.detokenize:
            raise ValueError(
                "stop and detokenize=false are both given, and a stop string is found in a text: remove one"
            )
        if any(not s for s in self.stop):
            raise ValueError("stop holds an empty string, which would stop before the first token: remove it")
        if any(not word.strip() for word in self.bad_words):
            raise ValueError("bad_words holds a text without a word: remove it")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:  # also catches NaN
                raise ValueError(f"logit_bias[{token}]={bias!r} is not allowed: a bias must lie in [-100, 100]")
        given = [name for name in CONSTRAINTS if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are both given, and a text follows one of them: remove one")
        masks = [name for name in ("allowed_token_ids", "bad_words") if getattr(self, name)]
        if given and masks:
            raise ValueError(f"{given[0]} says which tokens may come next, and so does {masks[0]}: remove one")
        if given and (self.ignore_eos or self.min_tokens):
            other = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise ValueError(f"{given[0]} ends the text where it is complete, which {other} forbids: remove one")

    def _check_beams(self) -> None:
        if self.n > self.beam_width:
            raise ValueError(f"n={self.n} is not allowed: beam_width={self.beam_width} finds no more texts")
        neutral, kept = SamplingParams(), (*BEAM_FIELDS, "seed")
        for f in fields(self):
            if f.name not in kept and getattr(self, f.name) != getattr(neutral, f.name):
                raise ValueError(
                    f"{f.name} and beam_width are both given, and a beam search goes by the model's probabilities "
                    f"alone: remove one (beside beam_width it takes {', '.join(BEAM_FIELDS)})"
                )

    @property
    def penalised(self) -> bool:
        """Whether sampling needs the token history."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != NEUTRAL_PENALTIES

    @property
    def constrained(self) -> bool:
        """Whether a grammar decides which tokens may come next."""
        return any(getattr(self, name) for name in CONSTRAINTS)

    @property
    def samples(self) -> int:
        """How many are generated."""
        return max(self.n, self.best_of)

    @property
    def computed_logprobs(self) -> int | None:
        """``logprobs``, or what the choice of the best samples needs."""
        return 0 if self.logprobs is None and self.samples > self.n else self.logprobs

    def truncated(self, prompt: np.ndarray) -> np.ndarray:
        """The tokens of a prompt that are used."""
        return prompt[-self.truncate_prompt_tokens :] if self.truncate_prompt_tokens else prompt


Pooling = Literal["last", "mean", "cls"]
"""Which of a text's hidden states stand for it: the last token's, all of them on average, or the first token's."""

Head = Literal["tokens", "classes", "hidden"]
"""What a model does with a hidden state: it foretells a token (LM head), tells classes apart, or leaves it as it is."""


@dataclass(frozen=True)
class DenseSpec:
    """A linear layer for pooled states: ``folder`` within the model's, ``digest`` of its weights."""

    folder: str
    inputs: int
    outputs: int
    bias: bool
    activation: str
    digest: str


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """How a text becomes ``width`` numbers, where nothing is generated.

    Its final hidden states are pooled, and go through ``head``; of an LM head only the rows of ``tokens`` matter. Then
    they go through the layers ``dense``, the first ``width`` values are kept, and ``activation`` makes the result of
    them: "normalise" to length 1, "softmax", "sigmoid", or "" as they are. ``labels`` name the values of a
    classification. ``pad_id``: tokens of this id at a text's end do not count.
    """

    pooling: Pooling
    width: int
    head: Head = "hidden"
    activation: Literal["", "normalise", "softmax", "sigmoid"] = ""
    labels: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    pad_id: int | None = None
    dense: tuple[DenseSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for the engine.

    ``id`` is opaque to the engine and comes back in the Completion. ``prompt`` is int32 [tokens], at least one.
    ``seed`` is a 64-bit hash of (run seed, row identity): sample ``i`` draws from hash(seed, i), so that its tokens do
    not depend on batch, rank or restart. ``so_far``: the samples that an earlier attempt began, none or all of them;
    the unfinished ones go on after their tokens. ``scored_from``: nothing is generated; the Completion's one sample is
    the prompt from this index on (at least 1), with the log-probability of each of its tokens. ``group``: requests of
    one number, not 0, are expected to get answers of like lengths. ``reasoning``: what the model marks as its thoughts
    is kept apart from the text. ``adapter``: the number of the model's adapter that it goes through, None for the base
    model. ``second_from``: where the second text of a pair begins, which some encoders are told.
    """

    id: int
    prompt: np.ndarray
    sampling: SamplingParams
    seed: int = 0
    so_far: tuple[Sample, ...] = ()
    scored_from: int | None = None
    group: int = 0
    reasoning: bool = False
    adapter: int | None = None
    second_from: int | None = None


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities (natural log, of the unmodified logits) of one sample's tokens.

    ``chosen`` float32 [tokens]; ``top_ids`` int32 and ``top`` float32 [tokens, k], most likely first.
    """

    chosen: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray


@dataclass(frozen=True, slots=True)
class Sample:
    """One continuation. ``finish_reason`` is "stop" (stop token or stop string), "length", "scored" for one that was
    given (``logprobs`` then has one alternative, the most likely token), or "pooled" for none: ``vector`` float32 is
    what :class:`PoolSpec` makes of the prompt. "" while it is unfinished, and then there is no text yet.

    ``token_ids`` (int32) ends with the stop token where there was one; ``text`` holds neither that nor the
    stop string, unless ``include_stop`` says so. ``reasoning`` is None where no thoughts were asked for or marked.
    """

    token_ids: np.ndarray
    text: str
    finish_reason: str
    logprobs: Logprobs | None = None
    reasoning: str | None = None
    vector: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of a Request: ``samples`` (n of them, in sample order or best first) or ``error``; both if it was
    abandoned. ``prompt_logprobs``, if asked for, are of the prompt's tokens after the first."""

    id: int
    prompt_tokens: int
    samples: tuple[Sample, ...] = ()
    error: RowError | None = None
    prompt_logprobs: Logprobs | None = None

    @property
    def finished(self) -> bool:
        """False for the state of a request that was interrupted."""
        return self.error is not None or all(sample.finish_reason for sample in self.samples)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The unit of commit: ``rows`` consecutive rows of one input file, fixed by the plan."""

    index: int
    file: int
    start: int
    rows: int

    def row_id(self, offset: int) -> int:
        """Identity of the chunk's row number ``offset`` (0-based)."""
        return self.file << ROW_BITS | (self.start + offset)


@dataclass(slots=True)
class StepWork:
    """What the steps of one kind computed, and how long the device took for it; sums.

    ``context``: positions whose keys and values were read, each sequence's on its own; ``pairs``: (query, key) pairs of
    attention; ``least_flops``, ``least_bytes``: what the steps could not do without, computed and read (roofline.py; 0
    of an encoder).
    """

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    samples: int = 0
    context: int = 0
    pairs: int = 0
    least_flops: float = 0.0
    least_bytes: float = 0.0

    def __add__(self, other: StepWork) -> StepWork:
        return StepWork(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, before: StepWork) -> StepWork:
        return StepWork(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))


@dataclass(slots=True)
class EngineStats:
    """Counters of one engine since its start; sums unless stated otherwise."""

    steps: int = 0
    prompt_tokens: int = 0
    needed_prompt_tokens: int = 0  # each sample's own, as if there were no cache
    cached_prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0  # guessed and computed (engine.lookup)
    accepted_tokens: int = 0  # of them, those that were right
    running: int = 0  # sequences that hold a slot now
    waiting: int = 0  # sequences admitted later
    pages_used: int = 0  # now, evictable cached pages not counted
    pages_peak: int = 0  # most after a step
    pages_total: int = 0
    weight_bytes: int = 0  # memory of the packed weights, shared with other ranks or not
    decode: StepWork = field(default_factory=StepWork)  # steps that only decode
    prefill: StepWork = field(
        default_factory=StepWork
    )  # steps with tokens of prompts, and all that decodes beside them
    device_idle: float = 0.0  # seconds between steps, and before the first, that had open requests
    device_bytes: int = 0  # most memory of a GPU that was in use; 0 where the host's is
    step_seconds: dict[str, float] = field(default_factory=dict)  # schedule, forward, sample, output


class JobError(Exception):
    """The job cannot go on. ``exit_code`` follows the table in the README; the message says what to do."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class ExitCode:
    """Exit codes of every batchinfer command (sysexits.h where it has a fitting one)."""

    COMPLETE = 0
    TOO_MANY_ERRORS = 3
    USAGE = 64
    MISMATCH = 65
    INPUT = 66
    UNFIT = 69
    INTERNAL = 70
    LOST_RANK = 71
    OUTPUT = 73
    IO = 74
    INCOMPLETE = 75


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends with ``error``."""
    if isinstance(error, JobError):
        return error.exit_code
    return ExitCode.INCOMPLETE if isinstance(error, KeyboardInterrupt) else ExitCode.INTERNAL
