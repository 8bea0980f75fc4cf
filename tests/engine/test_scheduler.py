"""The scheduler, one behaviour per test. Traces over random jobs are in test_scheduler_traces.py, refusals in
test_scheduler_refusals.py, shared pages in test_scheduler_prefixes.py."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from engine.model_scheduler import Harness

from batchinfer._engine import Scheduler, Step


def scheduler(**changes: Any) -> Scheduler:
    return Scheduler(**(CONFIG | changes))


CONFIG: dict[str, Any] = {
    "num_pages": 32,
    "page_size": 4,
    "max_slots": 8,
    "max_step_tokens": 64,
    "max_seq_len": 64,
}


def step_of(s: Scheduler) -> Step:
    step = s.schedule()
    assert step is not None
    s.check_integrity()
    return step


def run(s: Scheduler, token: int = 7) -> Step:
    """One step whose every sample is ``token``."""
    step = step_of(s)
    s.update([token] * step.num_samples)
    s.check_integrity()
    return step


def computed(step: Step) -> dict[int, int]:
    """Tokens of each sequence in the step."""
    return dict(zip(step.seq_ids.tolist(), np.diff(step.q_start).tolist(), strict=True))


def test_one_sequence_from_prompt_to_length() -> None:
    s = scheduler()
    s.add(5, [1, 2, 3, 4, 5, 6], max_new_tokens=3)
    first = step_of(s)
    assert (first.num_tokens, first.num_seqs, first.num_samples, first.num_decode) == (6, 1, 1, 0)
    assert first.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert first.positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert first.new_slots.tolist() == [0]
    assert first.new_seqs.tolist() == [5]
    assert first.kv_len.tolist() == [6]
    assert first.sample_row.tolist() == [5]
    pages = first.page_table[0, :2]
    assert first.kv_index.tolist() == [pages[p // 4] * 4 + p % 4 for p in range(6)]
    assert first.page_updates.tolist() == [[0, 0, pages[0]], [0, 1, pages[1]]]
    assert s.update([10]) == []
    second = step_of(s)
    assert (second.token_ids.tolist(), second.positions.tolist(), second.num_decode) == ([10], [6], 1)
    assert second.sample_count.tolist() == [1]
    assert s.update([11]) == []
    run(s, 12)
    assert s.schedule() is None
    assert s.num_open == 0


def test_dtypes_are_as_promised() -> None:
    s = scheduler()
    s.add(0, np.arange(6, dtype=np.int64), max_new_tokens=3)
    step = step_of(s)
    for name in ("kv_index", "seq_ids", "sample_seq", "new_seqs"):
        assert getattr(step, name).dtype == np.int64, name
    for name in ("token_ids", "positions", "q_start", "kv_len", "seq_slot", "sample_row", "sample_slot", "sample_count",
                 "new_slots", "page_updates", "page_table"):  # fmt: skip
        assert getattr(step, name).dtype == np.int32, name
    assert step.page_table.shape == (8, 16)
    assert s.tokens(0).dtype == np.int32


def test_finished_says_why() -> None:
    s = scheduler()
    s.add(1, [1, 2], max_new_tokens=2)
    s.add(2, [1, 2], max_new_tokens=9, stop_token_ids=[4, 5])
    assert s.update([3, 3][: step_of(s).num_samples]) == []
    ended = s.update([6, 5][: step_of(s).num_samples])
    assert [(f.seq_id, f.reason, f.tokens.tolist()) for f in ended] == [(1, "length", [3, 6]), (2, "stop", [3, 5])]


def test_stop_tokens_count_only_after_min_new_tokens() -> None:
    s = scheduler()
    s.add(1, [1, 2], max_new_tokens=9, min_new_tokens=2, stop_token_ids=[5])
    step_of(s)
    assert s.update([5]) == []
    step_of(s)
    assert s.update([5]) == []
    step_of(s)
    assert s.update([5])[0].tokens.tolist() == [5, 5, 5]


def test_max_new_tokens_is_clipped_to_max_seq_len() -> None:
    s = scheduler(max_seq_len=10)
    s.add(1, [1] * 7, max_new_tokens=100)
    ended = []
    while s.num_open:
        step_of(s)
        ended += s.update([2])
    assert ended[0].tokens.tolist() == [2, 2, 2]
    assert ended[0].reason == "length"


@pytest.mark.feature("engine", "continuous batching, chunked prefill beside decode")
def test_long_prompt_goes_in_chunks_beside_decodes() -> None:
    s = scheduler(max_step_tokens=10, max_slots=4)
    s.add(0, [1] * 3, max_new_tokens=20)
    s.add(1, [2] * 25, max_new_tokens=20)
    s.add(2, [3] * 2, max_new_tokens=20)
    assert computed(run(s)) == {0: 3, 1: 7}
    step = run(s)
    assert (computed(step), step.num_decode, step.num_samples) == ({0: 1, 1: 9}, 1, 1)
    step = run(s)
    assert (computed(step), step.num_decode, step.num_samples) == ({0: 1, 1: 9}, 1, 2)
    assert step.sample_seq.tolist() == [0, 1]
    assert computed(run(s)) == {0: 1, 1: 1, 2: 2}


def test_a_step_may_sample_nothing() -> None:
    s = scheduler(max_step_tokens=8)
    s.add(0, [1] * 20, max_new_tokens=1)
    assert step_of(s).num_samples == 0
    assert s.update([]) == []
    assert s.num_steps_ahead == 0


@pytest.mark.parametrize(("lookup", "most"), [(0, 2), (4, 1)])
def test_no_more_steps_wait_than_may(lookup: int, most: int) -> None:
    s = scheduler(lookup=lookup)
    assert s.max_steps_ahead == most
    s.add(0, [1, 2], max_new_tokens=9)
    for _ in range(most):
        step_of(s)
    with pytest.raises(RuntimeError, match="a draft waits" if lookup else "two steps wait"):
        s.schedule()


def test_slots_are_reused_lowest_first() -> None:
    s = scheduler(max_slots=3)
    for seq_id, max_new in enumerate([9, 1, 2, 9, 9]):
        s.add(seq_id, [seq_id + 1], max_new_tokens=max_new)
    assert run(s).new_slots.tolist() == [0, 1, 2]
    step = run(s)
    assert (step.new_seqs.tolist(), step.new_slots.tolist()) == ([3], [1])
    step = run(s)
    assert (step.new_seqs.tolist(), step.new_slots.tolist()) == ([4], [2])
    assert step.seq_slot.tolist() == [0, 1, 2]


@pytest.mark.feature("engine", "admission that foresees page use")
def test_admission_waits_for_pages_that_will_be_needed() -> None:
    """Both prompts would fit now; both sequences would not fit later."""
    s = scheduler(num_pages=8, max_seq_len=32)
    for seq_id in range(2):
        s.add(seq_id, [seq_id] * 4, max_new_tokens=17)  # 20 computed tokens: 5 pages each
    assert computed(run(s)) == {0: 4}
    while s.num_waiting:
        run(s)
    assert s.num_open == 2  # the second came in before the first was done ...
    while s.num_open:
        run(s)
    assert s.preemptions == 0  # ... and nothing had to be thrown out


def test_admission_knows_that_a_long_prompt_takes_many_steps() -> None:
    """One prompt token fits beside each decode: the second sequence will last until the first has grown."""
    s = scheduler(num_pages=8, page_size=4, max_slots=2, max_step_tokens=2, max_seq_len=32)
    s.add(0, [0] * 4, max_new_tokens=23)
    run(s)
    run(s)
    s.add(1, [1] * 12, max_new_tokens=3)  # 4 pages, to the end of 14 steps; the other will need 5 by then
    assert run(s).num_seqs == 1
    while s.num_open:
        run(s)
    assert s.preemptions == 0


def test_admission_counts_shared_pages_once() -> None:
    s = scheduler(num_pages=12, max_seq_len=44)
    for seq_id in range(3):
        s.add(seq_id, [1] * 32 + [seq_id], max_new_tokens=2)  # 8 shared pages and one of its own
    assert computed(run(s)) == {0: 33, 1: 1, 2: 1}


def test_expectation_lets_more_sequences_in() -> None:
    wanted = {0: 1, 4: 3}
    for expected, running in wanted.items():
        s = scheduler(num_pages=8, max_seq_len=32)
        for seq_id in range(3):
            s.add(seq_id, [seq_id] * 4, max_new_tokens=25, expected_new_tokens=expected)
        assert run(s).num_seqs == running


@pytest.mark.feature("engine", "preemption by recomputation")
def test_preempted_sequence_comes_back_with_its_tokens() -> None:
    """Two sequences that turn out longer than expected: the newer one leaves, returns, and goes on where it was."""
    harness = Harness({**CONFIG, "num_pages": 8, "max_seq_len": 32})
    harness.add(0, (0,) * 4, max_new=17, expected=1)
    harness.add(1, (1,) * 4, max_new=17, expected=1)
    while harness.scheduler.preemptions == 0:
        harness.advance()
    assert (harness.scheduler.num_running, harness.scheduler.num_waiting) == (1, 1)
    assert harness.prefill_tokens == [(0, 4), (1, 4)]
    before = harness.scheduler.tokens(1).tolist()
    harness.drain()
    assert harness.done[1][: len(before)] == before
    assert harness.scheduler.preemptions == 1
    # It had four full pages, of which the other one needed the last.
    assert harness.prefill_tokens[2:] == [(1, 4 + len(before) - 12)]
    assert harness.scheduler.cached_prompt_tokens == 0  # counted once, at the first admission


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_token_in_flight_survives_preemption(steps_ahead: int) -> None:
    """The newest of two leaves in the very step that follows one which sampled from it."""
    s = scheduler(num_pages=6, max_seq_len=24, max_slots=2)
    for seq_id in range(2):
        s.add(seq_id, [seq_id] * 4, max_new_tokens=16, expected_new_tokens=1)
    pending, sampled, finished = [], {0: [], 1: []}, {}
    token = 100
    while s.num_open or pending:
        step = s.schedule()
        s.check_integrity()
        if step is not None:
            tokens = []
            for seq_id, count in zip(step.sample_seq.tolist(), step.sample_count.tolist(), strict=True):
                token += 1
                tokens.append(token)
                assert count == len(sampled[seq_id])
                sampled[seq_id].append(token)
            pending.append(tokens)
        if len(pending) > (0 if step is None else steps_ahead):
            finished |= {f.seq_id: f.tokens.tolist() for f in s.update(pending.pop(0))}
    assert s.preemptions > 0
    assert finished == sampled
    assert all(len(tokens) == 16 for tokens in finished.values())


@pytest.mark.feature("engine", "steps planned ahead of the device")
def test_one_step_ahead_sends_unknown_tokens() -> None:
    s = scheduler()
    s.add(0, [1, 2, 3], max_new_tokens=3, stop_token_ids=[9])
    s.add(1, [4, 2, 3], max_new_tokens=9, stop_token_ids=[9])
    step_of(s)
    ahead = step_of(s)
    assert ahead.token_ids.tolist() == [-1, -1]
    assert ahead.sample_count.tolist() == [1, 1]
    assert [f.seq_id for f in s.update([5, 9])] == [1]
    assert step_of(s).seq_ids.tolist() == [0]  # its third and last token
    assert s.update([6, 6]) == []  # the second is superfluous
    assert s.schedule() is None
    assert s.num_open == 1
    assert [f.tokens.tolist() for f in s.update([7])] == [[5, 6, 7]]


def test_last_token_frees_slot_and_pages_before_it_is_known() -> None:
    s = scheduler(max_slots=1)
    s.add(0, [1, 2, 3], max_new_tokens=1)
    s.add(1, [4, 2, 3], max_new_tokens=1)
    step_of(s)
    assert (s.num_running, s.num_open, s.pages_used) == (0, 2, 0)
    assert step_of(s).new_seqs.tolist() == [1]
    assert [f.seq_id for f in s.update([8])] == [0]
    assert [f.seq_id for f in s.update([8])] == [1]


def test_finish_stops_a_sequence_anywhere() -> None:
    s = scheduler(max_slots=1)
    for seq_id in range(2):
        s.add(seq_id, [seq_id] * 3, max_new_tokens=5)
    step_of(s)
    s.finish(0)  # running, with a token in flight
    s.finish(1)  # waiting
    s.check_integrity()
    assert (s.num_open, s.num_running, s.num_waiting, s.pages_used) == (0, 0, 0, 0)
    s.add(0, [9] * 3, max_new_tokens=5)  # the id is free again, and the old token does not reach it
    assert s.update([4]) == []
    assert s.tokens(0).tolist() == []
    assert step_of(s).token_ids.tolist() == [9, 9, 9]


def test_arrays_live_as_long_as_someone_holds_them() -> None:
    s = scheduler()
    s.add(0, list(range(10, 20)), max_new_tokens=30)
    ids = step_of(s).token_ids
    s.update([1])
    for _ in range(5):
        run(s)
    assert ids.tolist() == list(range(10, 20))
    table = step_of(s).page_table
    before = table.copy()
    del s
    gc.collect()
    np.testing.assert_array_equal(table, before)


def test_prompts_can_be_limited_to_a_part_of_a_step() -> None:
    s = scheduler()
    s.add(0, range(10), max_new_tokens=20)
    assert run(s).num_tokens == 10
    s.limit_prompts(4)
    s.add(1, range(20, 30), max_new_tokens=20)
    s.add(2, range(40, 46), max_new_tokens=20)
    assert [computed(run(s)) for _ in range(5)] == [{0: 1, 1: 3}] * 3 + [{0: 1, 1: 1, 2: 2}, {0: 1, 1: 1, 2: 2}]
    assert sorted(s.tokens_left().tolist()) == [20 - len(s.tokens(i)) for i in range(3)]
    for i in range(3, 6):
        s.add(i, range(60, 61 + i), max_new_tokens=9)
    s.limit_prompts(2)
    assert computed(run(s)) == {0: 1, 1: 1}  # what decodes goes on; the rest of the prompt waits
    s.limit_prompts(0)
    assert computed(run(s)) == {0: 1, 1: 1, 2: 2, 3: 4, 4: 1, 5: 2}  # of 4 and 5 a page is there
    with pytest.raises(ValueError, match="step_tokens=-1"):
        s.limit_prompts(-1)
