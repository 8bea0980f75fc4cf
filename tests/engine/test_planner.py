"""The order of requests: common beginnings together, and the longest first at the end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.engine.planner import (
    GRAIN,
    SIBLINGS,
    Plan,
    Planner,
    Rest,
    Spread,
    make_plan,
    rest,
    shared_tokens,
    spread,
    tail,
)
from batchinfer.types import Request, SamplingParams


class Sizes:
    """An engine, as far as the planner sees one: every request gets its max_tokens."""

    def __init__(self, max_slots: int = 4, kv_tokens: int = 10**9):
        self.max_slots, self.kv_tokens = max_slots, kv_tokens
        self.running: list[int] = []  # what each sequence still gets
        self.waiting = 0
        self.flat_steps = True
        self.limit = 0

    @property
    def num_running(self) -> int:
        return len(self.running) - self.waiting

    def tokens_left(self) -> np.ndarray:
        return np.array(self.running, np.int64)

    def limit_prompts(self, step_tokens: int) -> None:
        self.limit = step_tokens

    def expected_tokens(self, request: Request) -> int:
        return request.sampling.max_tokens


def request(number: int, prompt: Sequence[int] | np.ndarray = (1,), tokens: int = 10) -> Request:
    return Request(number, np.array(prompt, np.int32), SamplingParams(max_tokens=tokens))


def plan_of(prompts: list[np.ndarray], after: np.ndarray | None = None) -> Plan:
    return make_plan(prompts, np.arange(len(prompts)), after)


def drain(planner: Planner, more: bool) -> list[int]:
    ids = []
    while (given := planner.next(more)) is not None:
        ids.append(given.id)
    return ids


@st.composite
def prompt_lists(draw: st.DrawFn) -> list[np.ndarray]:
    """Made of few different pages and a little more, so that they share beginnings at every depth."""
    pages = st.lists(st.integers(0, 2), max_size=4)
    rest = st.lists(st.integers(0, 1), max_size=3)
    drawn = draw(st.lists(st.tuples(pages, rest), max_size=30))
    return [np.array([p for page in ps for p in [page] * GRAIN] + r, np.int32) for ps, r in drawn]


@given(prompts=prompt_lists(), random=st.randoms(use_true_random=False))
def test_whoever_begins_alike_stands_together_and_the_lower_rank_first(prompts: list[np.ndarray], random) -> None:
    rank = np.array(random.sample(range(len(prompts)), len(prompts)), np.int64)
    order = make_plan(prompts, rank).order.tolist()
    assert sorted(order) == list(range(len(prompts)))
    for depth in (GRAIN, 2 * GRAIN, 3 * GRAIN, 4 * GRAIN):
        begins = [prompts[i][:depth].tobytes() if len(prompts[i]) >= depth else None for i in order]
        above = [prompts[i][: depth - GRAIN].tobytes() for i in order]
        places: dict[bytes, list[int]] = {}
        for place, begin in enumerate(begins):
            if begin is not None:
                places.setdefault(begin, []).append(place)
        for at in places.values():  # without a gap
            assert at == list(range(at[0], at[0] + len(at)))
        # Of two groups with the same parent, the one with the lowest rank is first.
        first = [(above[at[0]], min(rank[order[p]] for p in at)) for at in sorted(places.values())]
        for parent in {group for group, _ in first}:
            ranks = [lowest for group, lowest in first if group == parent]
            assert ranks == sorted(ranks)


def test_without_anything_in_common_the_order_stays() -> None:
    prompts = list(np.random.default_rng(0).integers(0, 1000, (50, 40)).astype(np.int32))
    plan = plan_of(prompts)
    assert plan.order.tolist() == list(range(50))
    assert not plan.group.any()


def test_the_group_of_the_prompt_before_comes_first() -> None:
    prompts = [np.full(40, i % 3, np.int32) for i in range(9)]
    assert plan_of(prompts, after=np.full(17, 2, np.int32)).order.tolist() == [2, 5, 8, 0, 3, 6, 1, 4, 7]
    assert plan_of(prompts, after=np.full(15, 2, np.int32)).order.tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8]


def test_groups_are_named_by_what_their_members_share() -> None:
    """The innermost beginning that enough requests have."""
    shared = np.arange(2 * GRAIN, dtype=np.int32)
    many = [np.concatenate([shared, np.full(GRAIN, 7), [i]]).astype(np.int32) for i in range(SIBLINGS)]
    few = [np.concatenate([shared, np.full(GRAIN, 8), [i]]).astype(np.int32) for i in range(SIBLINGS - 1)]
    alone = [np.array([9, 9], np.int32)]
    group = plan_of(many + few + alone).group
    assert len(set(group[: len(many)])) == len(set(group[len(many) : -1])) == 1
    assert group[0] != group[-2] != 0 == group[-1]
    again = plan_of([*reversed(many), *few]).group  # of another plan, the same
    assert set(again) == set(group[:-1])


def test_a_very_deep_tree_is_planned_too() -> None:
    prompts = [np.zeros(GRAIN * length, np.int32) for length in range(1500, 0, -1)]
    assert sorted(plan_of(prompts).order.tolist()) == list(range(1500))


@pytest.mark.feature("engine", "rows in hand are ordered by common beginning, and longest first at the end of a job")
def test_at_the_end_the_longest_go_first() -> None:
    planner = Planner(Sizes())
    lengths = [10, 30, 20, 30, 40]
    planner.add(request(i, [i], tokens) for i, tokens in enumerate(lengths))
    assert planner.next(more=True).id == 0  # type: ignore[union-attr]
    assert drain(planner, more=False) == [4, 1, 3, 2]


def test_groups_stay_together_at_the_end() -> None:
    planner = Planner(Sizes())
    prompts = [[1] * GRAIN, [2] * GRAIN, [1] * GRAIN, [2] * GRAIN]
    planner.add(request(i, p, tokens) for i, (p, tokens) in enumerate(zip(prompts, (5, 10, 20, 40), strict=True)))
    assert drain(planner, more=False) == [3, 1, 2, 0]


def test_a_plan_is_used_up_while_more_is_to_come() -> None:
    planner = Planner(Sizes())
    planner.add(request(i, [i], tokens=i + 1) for i in range(5))
    assert drain(planner, more=True) == [0, 1, 2, 3, 4]
    assert planner.next(more=False) is None
    assert len(planner) == 0


def test_the_order_can_be_left_alone() -> None:
    planner = Planner(Sizes(), reorder=False)
    planner.add(request(i, [i % 2] * GRAIN, tokens=i + 1) for i in range(6))
    assert drain(planner, more=False) == list(range(6))


def test_how_much_is_the_tail() -> None:
    """Half of the requests take as long as the other half and more on one slot less."""
    prompts, expected = np.full(100, 10), np.full(100, 8)
    assert tail(prompts, expected, max_slots=4, kv_tokens=10**9) == 4
    assert tail(prompts, expected, max_slots=1000, kv_tokens=10**9) == 100
    expected[-1] = 80  # is overtaken by nothing when the last 41 take its 80 steps on four slots
    assert tail(prompts, expected, max_slots=4, kv_tokens=10**9) == 31
    # With room for 56 tokens, four requests of 10 + 8 / 2 run at a time, whatever the slots.
    assert tail(np.full(100, 10), np.full(100, 8), max_slots=50, kv_tokens=56) == 4


@pytest.mark.feature("engine", "at the end of a job short rows run beside the longest, not before them")
def test_how_the_end_is_spread() -> None:
    """900 steps of one sequence and 1,800 more tokens: three side by side, and a spare one."""
    prompts, lengths, one = np.full(8, 100), np.full(8, 225), np.ones(8, np.int64)
    left, longest = rest(prompts, lengths, one), np.array([900])
    assert left[0] == Rest(1800, 800, 8 * 225 * 212.5)
    assert left[-1] == Rest(225, 100, 225 * 212.5)
    roomy = {"max_slots": 16, "kv_tokens": 10**6}
    assert spread(left[0], longest, **roomy) == Spread(4, 128)
    assert spread(left[4], longest, **roomy) == Spread(3, 128)
    assert spread(rest(1000 * prompts, lengths, one)[0], longest, **roomy) == Spread(4, 1024)  # 3 and 889
    assert spread(left[0], np.array([225]), **roomy).sequences >= 9  # they all end together
    assert spread(rest(prompts, lengths, 2 * one)[0], longest, **roomy).sequences == 7
    assert spread(rest(prompts, lengths, 40 * one)[0], longest, max_slots=128, kv_tokens=10**8).sequences == 128
    assert spread(rest(prompts, lengths, 40 * one)[0], longest, **roomy).step_tokens == 0  # for 81
    assert spread(left[0], longest, max_slots=1024, kv_tokens=10**6).sequences == 128
    assert spread(left[0], longest, max_slots=3, kv_tokens=10**6).step_tokens == 0
    # All in the cache for as long as they take, 787,500 tokens times steps: a quarter of what 3,500 tokens can hold.
    assert spread(left[0], longest, max_slots=16, kv_tokens=3500) == Spread(4, 128)
    assert spread(left[0], longest, max_slots=16, kv_tokens=3499).step_tokens == 0


@pytest.mark.feature("engine", "at the end of a job short rows run beside the longest, not before them")
def test_short_rows_wait_for_their_place_beside_the_longest() -> None:
    engine = Sizes(max_slots=16)
    planner = Planner(engine)
    planner.add(request(i, [1] * 10, tokens) for i, tokens in enumerate([900] + [225] * 8))
    started = 0
    while (given := planner.next(more=False)) is not None:
        assert engine.limit == 0
        engine.running.append(given.sampling.max_tokens)
        started += 1
    assert started == len(engine.running) == 4
    assert engine.limit == 128
    engine.waiting = 4  # for a slot, or pages
    assert planner.next(more=False) is None
    assert engine.limit == 0
    engine.waiting = 0
    assert planner.next(more=False) is None
    engine.running.pop()
    assert planner.next(more=False) is not None
    engine.running.append(225)
    assert planner.next(more=False) is None
    engine.running[0] = 225  # the longest has ended early: there is no reason to wait any more
    engine.running.pop()
    while (given := planner.next(more=False)) is not None:
        engine.running.append(given.sampling.max_tokens)
    assert len(engine.running) == 7
    planner.add([request(10)])
    assert engine.limit == 0


def test_nothing_waits_where_narrow_steps_are_cheap() -> None:
    """500 chat-like requests to Qwen3-30B-A3B on an H100: 22.8 s all at once, 24.1 s spread."""
    engine = Sizes(max_slots=16)
    engine.flat_steps = False
    planner = Planner(engine)
    planner.add(request(i, [1] * 10, tokens) for i, tokens in enumerate([900] + [225] * 8))
    while (given := planner.next(more=False)) is not None:
        engine.running.append(given.sampling.max_tokens)
    assert len(engine.running) == 9
    assert engine.limit == 0


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), slots=st.integers(1, 64))
def test_nobody_waits_forever(lengths: list[int], slots: int) -> None:
    engine = Sizes(max_slots=slots)
    planner = Planner(engine)
    planner.add(request(i, [i], tokens) for i, tokens in enumerate(lengths))
    steps = 0
    while len(planner) or engine.running:
        while len(engine.running) < slots and (given := planner.next(more=False)) is not None:
            engine.running.append(given.sampling.max_tokens)
        assert engine.running
        engine.running = [left - 1 for left in engine.running if left > 1]
        steps += 1
    # A list that never leaves a place empty (Graham 1966), with the places that spread() gives it.
    assert steps <= max(lengths) + max(max(lengths), -(-sum(lengths) // slots))


@given(prompts=prompt_lists(), page=st.sampled_from([4, 16, 32]))
def test_what_could_be_shared_is_what_a_tree_of_pages_holds_twice(prompts: list[np.ndarray], page: int) -> None:
    """At most all but the last token of a prompt is found."""
    seen: set[bytes] = set()
    found = 0
    for prompt in prompts:
        for end in range(page, len(prompt), page):
            found += page if prompt[:end].tobytes() in seen else 0
            seen.add(prompt[:end].tobytes())
    assert shared_tokens(prompts, page) == found


@given(prompts=prompt_lists())
def test_a_plan_tells_what_its_prompts_share(prompts: list[np.ndarray]) -> None:
    """With one more token each, as the last one is always computed."""
    longer = [np.append(prompt, 0).astype(np.int32) for prompt in prompts]
    assert plan_of(prompts).shared == shared_tokens(longer, GRAIN)


def test_what_was_planned_together_counts_once() -> None:
    """Samples of a request share its prompt, but for its last token; what the end of a job orders again is no more."""
    planner = Planner(Sizes())
    head = np.arange(40, dtype=np.int32)
    planner.add([Request(0, head, SamplingParams(n=2)), request(1, np.append(head, 7)), request(2, head + 1)])
    assert sorted(drain(planner, more=False)) == [0, 1, 2]
    assert planner.shared_tokens == 32 + 32
