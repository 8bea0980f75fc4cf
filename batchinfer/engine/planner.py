"""In which order requests go into the engine: those that begin alike together, the longest first at the end of a job.

Together, a common beginning is computed once and its KV pages are kept only while somebody needs them. In any other
order the cache has to keep the beginnings of all groups at once, or computes them again: BatchLLM (arXiv 2412.03594)
found 36 % of the prompt tokens in a least-recently-used cache where 58 % could have been. Sorting the prompts by their
tokens makes the groups neighbours, at every depth of the tree that they form.

Pure: no torch, no clock. A request's tokens don't depend on the order, so that a plan can cost time and nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from batchinfer.types import Request

GRAIN = 16
"""Tokens: common beginnings are rounded down to so many, an engine's usual page. Less than a page is never shared."""

SIBLINGS = 8
"""Requests below which a group says nothing about the lengths of its answers."""

TAIL = 2048
"""Requests at the end of a job that go longest first (Graham 1969): the last to start should be short, or the batch
empties around it. No more than needed: in between, long and short ones side by side use slots and pages evenly."""


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
    expected to get answers of like lengths, because they begin alike; 0 for those that are like no others."""

    order: np.ndarray
    group: np.ndarray


def make_plan(prompts: Sequence[np.ndarray], rank: np.ndarray, after: np.ndarray | None = None) -> Plan:
    """Put prompts (int32 [tokens] each) that begin alike next to each other; beside that, and within each group, the
    lower ``rank`` (int64 [N], distinct, from 0) first, where a group counts as its first member.

    ``after``: the prompt before these; those that begin like it come first, because its pages are there still.
    """
    count = len(prompts)
    if after is not None:  # as one more prompt, of the lowest rank
        prompts, rank = [*prompts, after], np.append(rank, -1)
    root = _tree(prompts, rank)
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
            name = hash(prompts[_first(member)][: member.shared].tobytes())
        todo += [(inner, name) for inner in sorted(member.members, key=lambda m: _rank(m, rank), reverse=True)]
    return Plan(np.array([i for i in order if i < count], np.int64), group[:count])


class Planner:
    """Requests in hand, given out in their planned order. ``expected``: how many tokens a request will probably get.

    A plan is made of all requests in hand and used up before the next one, so that none waits forever. With
    ``reorder`` False they come out as they went in.
    """

    def __init__(self, expected: Callable[[Request], int], reorder: bool = True):
        self._expected = expected
        self._reorder = reorder
        self._left: deque[Request] = deque()
        self._last: np.ndarray | None = None
        self._planned = False
        self._longest_first = False

    def __len__(self) -> int:
        return len(self._left)

    def add(self, requests: Iterable[Request]) -> None:
        """Take requests in hand, beside those that are left."""
        self._left.extend(requests)
        self._planned = self._longest_first = False

    def next(self, more: bool) -> Request | None:
        """The request to start now, None if there is none. ``more``: others will be added."""
        if not self._left:
            return None
        tail = not more and len(self._left) <= TAIL
        if not self._planned or (tail and not self._longest_first):
            self._plan(longest_first=tail)
        request = self._left.popleft()
        self._last = request.prompt
        return request

    def _plan(self, longest_first: bool) -> None:
        self._planned, self._longest_first = True, longest_first
        if not self._reorder or len(self._left) < 2:
            return
        requests = list(self._left)
        rank = np.arange(len(requests))
        if longest_first:
            by_length = np.argsort([-self._expected(request) for request in requests], kind="stable")
            rank[by_length] = np.arange(len(requests))
        plan = make_plan([request.prompt for request in requests], rank, self._last)
        groups = plan.group.tolist()
        self._left = deque(
            replace(requests[i], group=groups[i]) if groups[i] else requests[i] for i in plan.order.tolist()
        )


def _tree(prompts: Sequence[np.ndarray], rank: np.ndarray) -> _Group:
    """The tree of common beginnings, from the sorted prompts and what neighbours share, in one pass: the intervals of
    Abouelhoda, Kurtz & Ohlebusch, "Replacing suffix trees with enhanced suffix arrays", 2004."""
    keys = [prompt.astype(">i4").tobytes() for prompt in prompts]  # bytes that compare as the tokens do
    ordered = sorted(range(len(prompts)), key=keys.__getitem__)
    open_groups = [_Group(0, [])]

    def close() -> _Group:
        group = open_groups.pop()
        group.rank = min(_rank(member, rank) for member in group.members) if group.members else 0
        group.size = sum(1 if isinstance(member, int) else member.size for member in group.members)
        return group

    for place, row in enumerate(ordered):
        shared = _common(prompts[ordered[place - 1]], prompts[row]) if place else 0
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
    return close()


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens with which both begin, in whole GRAINs."""
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    first = int(different.argmax()) if length else 0
    return (first if length and different[first] else length) // GRAIN * GRAIN


def _rank(member: int | _Group, rank: np.ndarray) -> int:
    return int(rank[member]) if isinstance(member, int) else member.rank


def _first(group: _Group) -> int:
    member: int | _Group = group
    while not isinstance(member, int):
        member = member.members[0]
    return member
