"""What sequences with the same beginning share: pages of the prefix cache, and copies of a prompt's last page."""

from __future__ import annotations

import pytest
from engine.model_scheduler import Harness, make_job
from engine.test_scheduler import CONFIG, computed, run, scheduler, step_of

from batchinfer._engine import Scheduler


@pytest.mark.feature("engine", "prefix cache: token ids compared, pages shared within a step too")
def test_prompts_of_one_step_share_their_prefix() -> None:
    """256 prompts with one long head: the head is computed once, though all start in the same step."""
    s = scheduler(num_pages=500, max_slots=256, max_step_tokens=4096, max_seq_len=256)
    head = list(range(100, 140))
    for seq_id in range(256):
        s.add(seq_id, [*head, seq_id], max_new_tokens=2)
    step = step_of(s)
    assert computed(step) == {0: 41} | dict.fromkeys(range(1, 256), 1)
    assert len(set(map(tuple, step.page_table[:, :10].tolist()))) == 1
    assert s.pages_used == 10 + 256
    assert s.cached_prompt_tokens == 255 * 40


def test_samples_of_one_prompt_compute_the_last_token_each() -> None:
    s = scheduler()
    for seq_id in range(4):
        s.add(seq_id, list(range(8)), max_new_tokens=4)  # two full pages; the second can't be taken over
    step = step_of(s)
    assert computed(step) == {0: 8, 1: 1, 2: 1, 3: 1}
    first, *others = step.page_table[:4, 1].tolist()
    assert step.copy_source.tolist() == 3 * [first]
    assert step.copy_target.tolist() == others
    assert len({first, *others}) == 4  # each has a page of its own
    s.update([1, 2, 1, 3])
    step = run(s)  # now their twins of the second page are given back
    assert len(set(step.page_table[:4, 1].tolist())) == 1
    assert len(set(step.page_table[:4, 2].tolist())) == 4
    assert s.pages_used == 2 + 4


@pytest.mark.parametrize(
    ("changes", "of_first", "of_second", "taken"),
    [
        ({}, {}, {}, 5),
        ({"prefix_cache": False}, {}, {}, 0),
        ({}, {}, {"family": 1}, 0),
        ({}, {}, {"compute_from": 3}, 3),
        ({}, {"compute_from": 3}, {}, 5),
        ({}, {}, {"prompt": [1, 2, 3, 4, 5, 9]}, 0),  # the tokens that agree are in a page that is not full
        ({"page_size": 1}, {}, {}, 0),  # there are full pages only
        ({"max_step_tokens": 6}, {}, {}, 0),  # the second comes in the next step
    ],
)
def test_what_is_taken_over_from_a_twin(changes: dict, of_first: dict, of_second: dict, taken: int) -> None:
    s = scheduler(**({"page_size": 8, "max_slots": 2} | changes))
    for seq_id, special in enumerate((of_first, of_second)):
        s.add(seq_id, **({"prompt": [1, 2, 3, 4, 5, 6], "max_new_tokens": 4} | special))
    step = step_of(s)
    source, target = step.page_table[:2, 0].tolist()
    assert step.copy_source.tolist() == [source] * (taken > 0)
    assert step.copy_target.tolist() == [target] * (taken > 0)
    if 1 in computed(step):
        assert step.num_tokens == 12 - taken - (5 if changes.get("page_size") == 1 else 0)
        assert step.kv_len.tolist() == [6, 6]


def test_a_step_copies_no_more_pages_than_there_are_slots() -> None:
    """The first page is another's already, and the first sequence computes all of its own nevertheless, where nobody
    finds it. The second finds that page and copies three, of which the others find two."""
    s = scheduler(max_slots=5)
    s.add(0, [0, 1, 2, 3, 9], max_new_tokens=1)
    run(s)
    for seq_id in range(1, 6):
        s.add(seq_id, list(range(16)), max_new_tokens=4, **({"compute_from": 0} if seq_id == 1 else {}))
    step = step_of(s)
    assert computed(step) == {1: 16, 2: 1, 3: 1, 4: 1, 5: 4}
    table = step.page_table[:5].tolist()
    assert step.copy_source.tolist() == [*table[0][1:4], table[0][3], table[0][3]]
    assert step.copy_target.tolist() == [*table[1][1:4], table[2][3], table[3][3]]


def test_twins_of_a_prompt_that_two_steps_computed() -> None:
    s = scheduler(page_size=8, max_slots=3, max_step_tokens=12)
    for seq_id in range(3):
        s.add(seq_id, list(range(14)), max_new_tokens=4)
    assert computed(run(s)) == {0: 12}
    step = run(s)
    assert computed(step) == {0: 2, 1: 1, 2: 1}  # what the first step computed of the page is copied with the rest
    assert step.copy_target.tolist() == step.page_table[1:3, 1].tolist()


def test_same_tokens_after_another_prefix_are_another_page() -> None:
    s = scheduler()
    s.add(0, [1, 1, 1, 1, 5, 5, 5, 5, 9], max_new_tokens=1)
    s.add(1, [2, 2, 2, 2, 5, 5, 5, 5, 9], max_new_tokens=1)
    assert computed(run(s)) == {0: 9, 1: 9}


@pytest.mark.feature("engine", "prefix cache: token ids compared, pages shared within a step too")
@pytest.mark.parametrize("hash_bits", [0, 1, 64])
def test_colliding_hashes_do_not_mix_prefixes(hash_bits: int) -> None:
    harness = Harness({**CONFIG, "num_pages": 200, "max_step_tokens": 400, "_hash_bits": hash_bits})
    pages = [(0,) * 4, (1,) * 4]
    for seq_id in range(8):  # all binary numbers of three pages
        harness.add(seq_id, (*pages[seq_id >> 2], *pages[seq_id >> 1 & 1], *pages[seq_id & 1], 2), max_new=5)
    harness.drain()
    assert harness.scheduler.cached_prompt_tokens == 4 * (0 + 2 + 1 + 2 + 0 + 2 + 1 + 2)


def test_generated_tokens_are_found_by_a_later_turn() -> None:
    s = scheduler()
    s.add(0, [1, 2, 3], max_new_tokens=10)
    while s.num_open:
        step_of(s)
        s.update([7])
    s.add(1, [1, 2, 3] + [7] * 10 + [4, 4], max_new_tokens=1)
    assert computed(run(s)) == {1: 3}


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_what_comes_behind_a_stop_token_is_not_found(steps_ahead: int) -> None:
    """A device that saw the token left out what the step ahead had of the sequence. Here it is the last of a page."""
    harness = Harness(CONFIG, steps_ahead)
    prompt, page = (1, 2, 0, 1, 1), harness.page_size
    tokens = prompt + tuple(make_job(prompt, page, 0, (), 64, 0).expected)
    whole = next(n for n in (2 * page, 3 * page) if tokens[n - 1] not in tokens[len(prompt) : n - 1])
    harness.add(0, prompt, max_new=9, stop=(tokens[whole - 1],))
    harness.drain()
    assert len(prompt) + len(harness.done[0]) == whole
    harness.add(1, (*tokens[:whole], 2), max_new=2)
    harness.drain()
    assert harness.scheduler.cached_prompt_tokens == whole - page


def test_prefixes_can_be_forgotten() -> None:
    s = scheduler()
    for seq_id, found in enumerate((0, 8, 0)):
        if seq_id == 2:
            s.forget_prefixes()
            assert s.pages_cached == 0
        s.add(seq_id, [1] * 10, max_new_tokens=1)
        assert computed(run(s)) == {seq_id: 10 - found}


def test_prefix_cache_can_be_off() -> None:
    s = scheduler(prefix_cache=False)
    for seq_id in range(2):
        s.add(seq_id, [1] * 9, max_new_tokens=1)
    assert computed(run(s)) == {0: 9, 1: 9}
    assert (s.pages_cached, s.pages_free) == (0, 32)


def test_the_least_recently_used_prefix_is_evicted() -> None:
    s = scheduler(num_pages=6, max_seq_len=20)
    prompts = {name: [i] * 5 for i, name in enumerate("abc")}
    for seq_id, name in enumerate("abca"):  # a is used again after b and c
        s.add(seq_id, prompts[name], max_new_tokens=1)
        run(s)
    assert (s.pages_cached, s.pages_free) == (3, 3)
    s.add(9, [9] * 13, max_new_tokens=1)  # four pages: the three free ones, and the oldest cached one, of b
    run(s)
    assert s.pages_cached == 5
    s.add(10, prompts["a"], max_new_tokens=1)
    s.add(11, prompts["c"], max_new_tokens=1)
    assert computed(run(s)) == {10: 1, 11: 1}
    s.add(12, prompts["b"], max_new_tokens=1)
    assert computed(run(s)) == {12: 5}


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    s = scheduler(num_pages=5, max_seq_len=20)
    s.add(0, [1] * 16, max_new_tokens=1)
    run(s)
    s.add(1, [2] * 8, max_new_tokens=1)  # takes the free page and evicts the last of the four
    run(s)
    s.add(2, [1] * 16, max_new_tokens=1)
    assert computed(run(s)) == {2: 4}


@pytest.mark.parametrize(("compute_from", "first"), [(2**31 - 1, 12), (13, 12), (11, 8), (3, 0), (0, 0)])
def test_what_must_be_computed_does_not_come_from_the_cache(compute_from: int, first: int) -> None:
    s = Scheduler(num_pages=20, page_size=4, max_slots=4, max_step_tokens=32, max_seq_len=64)
    prompt = list(range(15))
    s.add(0, prompt, max_new_tokens=1)
    assert s.schedule() is not None
    s.update([5])
    s.add(1, prompt, max_new_tokens=1, compute_from=compute_from)
    step = s.schedule()
    assert step is not None
    assert step.positions.tolist() == list(range(first, 15))


def test_families_share_no_pages() -> None:
    s = Scheduler(num_pages=40, page_size=4, max_slots=8, max_step_tokens=64, max_seq_len=64)
    prompt, computed = list(range(15)), []
    for seq_id, family in enumerate([0, 1, 0, 1, 7, 7]):
        s.add(seq_id, prompt, max_new_tokens=1, family=family)
        step = s.schedule()
        assert step is not None
        s.check_integrity()
        computed.append(step.num_tokens)
        s.update([5])
        s.check_integrity()
    assert computed == [15, 15, 3, 3, 15, 3]
    assert s.pages_cached == 9
