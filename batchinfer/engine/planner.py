"""In which order requests go into the engine: those that begin alike together, the longest first at the end of a job.

Together, a common beginning is computed once and its KV pages are kept only while somebody needs them. In any other
order the cache has to keep the beginnings of all groups at once, or computes them again: BatchLLM (arXiv 2412.03594)
found 36 % of the prompt tokens in a least-recently-used cache where 58 % could have been. Sorting the prompts by their
tokens makes the groups neighbours, at every depth of the tree that they form.

Pure: no torch, no clock. A request's tokens don't depend on the order, so that a plan can cost time and nothing else.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from batchinfer.types import Request

GRAIN = 16
"""Tokens: common beginnings are rounded down to so many, an engine's usual page. Less than a page is never shared."""

SIBLINGS = 8
"""Requests below which a group says nothing about the lengths of its answers."""

SPARE = 1.25
"""Sequences side by side at the end of a job, for each that would just do if none waited for its prompt."""

ROUND = 64
"""More of them are a multiple of this: a device computes so many rows at the price of one more. Simulated with an
H100's times of products for Llama-3.1-8B, 300 to 3,000 requests of chat-like lengths: this, SPARE and BEGUN take 1 %
less time than to run just as many as do, rounded, and to let prompts take turns once half of these run."""

PROMPT_ROOM = 64
"""Prompt tokens at least that a step has room for beside its decodes, however few are left."""

SCARCE_SLOTS, SCARCE_PAGES = 0.75, 0.25
"""Shares of the slots and of the pages that the end of a job needs on average above which all that fit should run: what
is held back then costs steps (chat-like lengths, simulated: 4 % where slots, 3 % where pages decide)."""

BEGUN = 0.1
"""Share of the sequences side by side that run when steps begin to be limited. Where hardly one runs, prompts that take
turns are what all wait for."""

FEWEST = 8
"""At least an eighth of the slots is in use while there are requests: so few cost a step hardly more than one."""


@dataclass(slots=True)
class _Group:
    """Members that begin with the same ``shared`` tokens: requests, by their number, and groups that share more."""

    shared: int
    members: list[int | _Group]
    rank: int = 0  # the lowest of a request in it
    size: int = 0  # requests in it


@dataclass(frozen=True)
class Plan:
    """``order``: the numbers of the requests, int64 [N]. ``group``, int64 [N], is one number for the requests that are
    expected to get answers of like lengths, because they begin alike; 0 for those that are like no others. ``shared``:
    tokens, in multiples of GRAIN, that some prompt before has too."""

    order: np.ndarray
    group: np.ndarray
    shared: int


def make_plan(prompts: Sequence[np.ndarray], rank: np.ndarray, after: np.ndarray | None = None) -> Plan:
    """Put prompts (int32 [tokens] each) that begin alike next to each other; beside that, and within each group, the
    lower ``rank`` (int64 [N], distinct, from 0) first, where a group counts as its first member.

    ``after``: the prompt before these; those that begin like it come first, because its pages are there still.
    """
    count = len(prompts)
    if after is not None:  # as one more prompt, of the lowest rank
        prompts, rank = [*prompts, after], np.append(rank, -1)
    root, shared = _tree(prompts, rank)
    order: list[int] = []
    group = np.zeros(len(prompts), np.int64)
    todo: list[tuple[int | _Group, int]] = [(root, 0)]
    while todo:
        member, name = todo.pop()
        if isinstance(member, int):
            order.append(member)
            group[member] = name
            continue
        if member.shared and member.size >= SIBLINGS:
            name = zlib.crc32(prompts[_first(member)][: member.shared].tobytes()) + 1  # the same in every process
        todo += [(inner, name) for inner in sorted(member.members, key=lambda m: _rank(m, rank), reverse=True)]
    return Plan(np.array([i for i in order if i < count], np.int64), group[:count], shared)


class Engine(Protocol):
    """What of an engine a planner looks at (engine/engine.py)."""

    max_slots: int
    kv_tokens: int  # that its KV cache has room for
    flat_steps: bool  # a step of few sequences takes about as long as one of a hundred: it reads all weights

    @property
    def num_running(self) -> int: ...

    def expected_tokens(self, request: Request) -> int: ...

    def tokens_left(self) -> np.ndarray: ...

    def limit_prompts(self, step_tokens: int) -> None: ...


@dataclass(frozen=True)
class Rest:
    """Work of requests: new tokens, prompt tokens, and tokens in the cache times the steps that they are there."""

    new: int
    prompts: int
    cached: float


@dataclass(frozen=True)
class Spread:
    """How the end of a job is spread over the steps that its longest sequence takes anyway: so many ``sequences`` side
    by side, and so many tokens in a step with prompts (``step_tokens``, 0: any number) once these have begun."""

    sequences: int
    step_tokens: int


class Planner:
    """Requests in hand, given out in their planned order.

    A plan is made of all requests in hand and used up before the next one, so that none waits forever. At the end of a
    job the rest of it is ordered again, the longest first (Graham 1969), and held back where that costs no step: see
    :func:`spread`. With ``reorder`` False requests come out as they went in, and as soon as they are asked for.
    """

    def __init__(self, engine: Engine, reorder: bool = True):
        self._engine = engine
        self._reorder = reorder
        self._left: deque[Request] = deque()
        self._last: np.ndarray | None = None
        self._planned = False
        self._tail = 0  # requests at the end of the plan that go longest first if no others come
        self._rest: deque[Rest] = deque()  # at the end of a job: what is left from each request on
        self.shared_tokens = 0  # of prompts that were planned together, what a cache could find

    def __len__(self) -> int:
        return len(self._left)

    def add(self, requests: Iterable[Request]) -> None:
        """Take requests in hand, beside those that are left."""
        self._left.extend(requests)
        self._planned = False
        self._rest.clear()
        self._engine.limit_prompts(0)

    def next(self, more: bool) -> Request | None:
        """The request to start now, None if there is none, or if it had better wait. ``more``: others will be added."""
        if not self._left:
            return None
        if self._reorder and not self._planned:
            self.shared_tokens += self._plan(np.arange(len(self._left))) + self._repeated()
            self._tail = tail(*self._sizes(), self._engine.max_slots, self._engine.kv_tokens)
            self._planned = True
        if not more and len(self._left) <= self._tail:
            _, expected = self._sizes()
            self._plan(np.argsort(np.argsort(-expected, kind="stable")))
            self._tail = 0
            samples = np.array([request.sampling.samples for request in self._left], np.int64)
            self._rest = deque(rest(*self._sizes(), samples))
        if self._rest and self._had_better_wait(self._left[0], self._rest[0]):
            return None
        if self._rest:
            self._rest.popleft()
        request = self._left.popleft()
        self._last = _keyed(request)
        return request

    def _had_better_wait(self, request: Request, left: Rest) -> bool:
        """Whether a request can wait for a place beside the longest sample under way: it must be sure to end with it,
        whatever is expected."""
        if not self._engine.flat_steps:  # a mixture's reads the experts that its tokens meet: the fewer, the fewer
            return False
        running = self._engine.tokens_left()
        if not len(running) or request.sampling.max_tokens > running.max():
            return False
        wanted = spread(left, running, self._engine.max_slots, self._engine.kv_tokens)
        if len(running) < wanted.sequences:
            return False
        begun = self._engine.num_running >= BEGUN * wanted.sequences
        self._engine.limit_prompts(wanted.step_tokens if begun else 0)
        return True

    def _sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Prompt tokens and expected new tokens of what is left, int64 [N] each."""
        prompts = np.array([len(request.prompt) for request in self._left], np.int64)
        return prompts, np.array([self._engine.expected_tokens(request) for request in self._left], np.int64)

    def _repeated(self) -> int:
        """What the samples of a request have in common, but for the last token, which each computes."""
        return sum((r.sampling.samples - 1) * ((len(r.prompt) - 1) // GRAIN * GRAIN) for r in self._left)

    def _plan(self, rank: np.ndarray) -> int:
        """Order the requests that are left. Tokens that they have in common."""
        requests = list(self._left)
        plan = make_plan([_keyed(request) for request in requests], rank, self._last)
        groups = plan.group.tolist()
        self._left = deque(
            replace(requests[i], group=groups[i]) if groups[i] else requests[i] for i in plan.order.tolist()
        )
        return plan.shared


def _keyed(request: Request) -> np.ndarray:
    """What a request begins with, for the order: pages are shared within an adapter only, and so its number comes
    first, where there is one."""
    if request.adapter is None:
        return request.prompt
    return np.concatenate([np.full(GRAIN, -1 - request.adapter, np.int32), request.prompt])


def tail(prompts: np.ndarray, expected: np.ndarray, max_slots: int, kv_tokens: int) -> int:
    """Of requests with so many prompt and new tokens (int64 [N] each), in their order: how many at the end should go
    longest first.

    From where the longest of what is left takes as many steps as all of it: later, the batch would empty around that
    one; earlier, the long ones would meet, and use up the pages that long and short ones side by side share evenly. A
    request holds a slot for a step per new token, and meanwhile its prompt and half of its new tokens in the cache.
    What is left takes as many steps as the scarcer of the two allows.
    """
    slots = _sum_from_here(expected) / max_slots
    cache = _sum_from_here(expected * (prompts + expected / 2)) / kv_tokens
    longest = np.maximum.accumulate(expected[::-1])[::-1]
    return int(np.count_nonzero(np.maximum(slots, cache) <= longest))


def rest(prompts: np.ndarray, expected: np.ndarray, samples: np.ndarray) -> list[Rest]:
    """Of requests with so many prompt tokens, new tokens a sample, and samples (int64 [N] each), in their order: what
    is left from each of them on."""
    cached = expected * (prompts + samples * expected / 2)
    sums = (_sum_from_here(values).tolist() for values in (expected * samples, prompts, cached))
    return [Rest(*values) for values in zip(*sums, strict=True)]


def spread(left: Rest, running: np.ndarray, max_slots: int, kv_tokens: int) -> Spread:
    """For what is left of a job, beside samples that will get so many more tokens (``running``, int64 [K]), the longest
    of all among them.

    The longest sample takes a step for every token, whatever else is computed. With all others beside it from the
    beginning, the first steps are wide and the many after the last short sample has ended narrow: and a narrow step
    takes as long as reading the weights does. As wide as all together need, every step does useful work during that
    reading, and prompts take their place in steps that decode. They bring a step to the power of two that is no
    less than what all need: there matrix products lose least at their edges (Llama-3.1-8B on an H100, cuBLAS: 19.7 us a
    row of 512, 23.8 of 320).

    Where slots or pages are scarce, all that fit should run: nothing is held back.
    """
    longest, new = int(running.max()), left.new + int(running.sum())
    least = new / longest
    cached = (left.cached + int(running @ running) / 2) / longest
    if least > SCARCE_SLOTS * max_slots or cached > SCARCE_PAGES * kv_tokens:
        return Spread(left.new + len(running), 0)
    sequences = math.ceil(SPARE * least)
    if sequences > ROUND:
        sequences = math.ceil(sequences / ROUND) * ROUND
    sequences = max(sequences, max_slots // FEWEST)
    step_tokens = max((new + left.prompts) / longest, sequences + PROMPT_ROOM)
    return Spread(sequences, 1 << math.ceil(math.log2(step_tokens)))


def shared_tokens(prompts: Sequence[np.ndarray], page_size: int) -> int:
    """Tokens of the prompts (int32 [tokens] each) that a cache of whole pages could find, if it forgot nothing: those
    of pages that another prompt has already. The last token of a prompt is always computed."""
    found, before = 0, np.zeros(0, np.int32)
    for prompt in sorted((prompt[:-1] for prompt in prompts), key=_sort_key):
        found += _common(before, prompt, page_size)
        before = prompt
    return found


def _sum_from_here(values: np.ndarray) -> np.ndarray:
    return np.cumsum(values[::-1])[::-1]


def _tree(prompts: Sequence[np.ndarray], rank: np.ndarray) -> tuple[_Group, int]:
    """The tree of common beginnings, from the sorted prompts and what neighbours share, in one pass: the intervals of
    Abouelhoda, Kurtz & Ohlebusch, "Replacing suffix trees with enhanced suffix arrays", 2004. And the sum of what
    neighbours share."""
    keys = [_sort_key(prompt) for prompt in prompts]
    ordered = sorted(range(len(prompts)), key=keys.__getitem__)
    open_groups, total = [_Group(0, [])], 0

    def close() -> _Group:
        group = open_groups.pop()
        group.rank = min(_rank(member, rank) for member in group.members) if group.members else 0
        group.size = sum(1 if isinstance(member, int) else member.size for member in group.members)
        return group

    for place, row in enumerate(ordered):
        shared = _common(prompts[ordered[place - 1]], prompts[row], GRAIN) if place else 0
        total += shared
        while open_groups[-1].shared > shared:
            group = close()
            if open_groups[-1].shared < shared:
                open_groups.append(_Group(shared, []))
            open_groups[-1].members.append(group)
        if open_groups[-1].shared < shared:
            open_groups.append(_Group(shared, [open_groups[-1].members.pop()]))
        open_groups[-1].members.append(row)
    while len(open_groups) > 1:
        group = close()
        open_groups[-1].members.append(group)
    return close(), total


def _sort_key(prompt: np.ndarray) -> bytes:
    """Bytes that compare as the tokens do."""
    return prompt.astype(">i4").tobytes()


def _common(a: np.ndarray, b: np.ndarray, grain: int) -> int:
    """Tokens with which both begin, in multiples of ``grain``."""
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    first = int(different.argmax()) if length else 0
    return (first if length and different[first] else length) // grain * grain


def _rank(member: int | _Group, rank: np.ndarray) -> int:
    return int(rank[member]) if isinstance(member, int) else member.rank


def _first(group: _Group) -> int:
    member: int | _Group = group
    while not isinstance(member, int):
        member = member.members[0]
    return member
