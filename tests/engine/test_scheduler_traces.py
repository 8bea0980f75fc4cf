"""Property tests: whatever is added, in whatever order, every sequence gets exactly its own tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine.model_scheduler import VOCABULARY, Harness
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

TOKENS = st.integers(0, VOCABULARY - 1)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Pools that hardly hold the longest sequence, so that pages run out and cached ones are evicted."""
    page_size = draw(st.integers(1, 5))
    max_seq_len = draw(st.integers(4, 30))
    max_slots = draw(st.integers(1, 6))
    return {
        "num_pages": -(-max_seq_len // page_size) + draw(st.integers(0, 8)),
        "page_size": page_size,
        "max_slots": max_slots,
        "max_step_tokens": max_slots + draw(st.integers(0, 16)),
        "max_seq_len": max_seq_len,
        "prefix_cache": draw(st.booleans()),
        "_hash_bits": draw(st.sampled_from([64, 1, 0])),
    }


@st.composite
def prompts(draw: st.DrawFn, max_length: int) -> tuple[int, ...]:
    """Many begin alike: a head from a short list, then some tokens of their own."""
    head = draw(st.sampled_from([(), (0,) * 8, (0,) * 20, (0, 1) * 6]))
    tail = draw(st.lists(TOKENS, min_size=1, max_size=8))
    return (*head, *tail)[-max_length:]


@st.composite
def sequences(draw: st.DrawFn, max_seq_len: int) -> dict[str, Any]:
    max_new = draw(st.integers(1, 12))
    return {
        "prompt": draw(prompts(max_seq_len - 1)),
        "max_new": max_new,
        "min_new": draw(st.integers(0, 3)),
        "expected": draw(st.integers(0, max_new)),
        "stop": draw(st.sampled_from([(), (0,), (1, 2)])),
        "resume": draw(st.sampled_from([0, 0, 0, 1, 5])),
    }


class Traces(RuleBasedStateMachine):
    """add, step and finish in any order; at the end everything that is open must run to its end."""

    @initialize(config=configs(), steps_ahead=st.integers(0, 1), lookup=st.sampled_from([0, 0, 1, 3, 8]))
    def start(self, config: dict[str, Any], steps_ahead: int, lookup: int) -> None:
        self.harness = Harness(config | {"lookup": lookup}, 0 if lookup else steps_ahead)
        self.next_id = 0

    @rule(data=st.data(), copies=st.sampled_from([1, 1, 1, 4]))
    def add(self, data: st.DataObject, copies: int) -> None:
        sequence = data.draw(sequences(self.harness.config["max_seq_len"]))
        for _ in range(copies):
            self.harness.add(self.next_id, **sequence)
            self.next_id += 1

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.harness.advance()

    @precondition(lambda self: self.harness.jobs)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.harness.finish(data.draw(st.sampled_from(sorted(self.harness.jobs))))

    @precondition(lambda self: self.harness.jobs)
    @rule(data=st.data())
    def finish_and_add_under_the_same_id(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.harness.jobs)))
        self.harness.finish(seq_id)
        self.harness.add(seq_id, **data.draw(sequences(self.harness.config["max_seq_len"])))

    @invariant()
    def intact(self) -> None:
        if hasattr(self, "harness"):
            self.harness.scheduler.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.drain()
            self.harness.scheduler.check_integrity()


Traces.TestCase.settings = settings(max_examples=70, stateful_step_count=20)
TestTraces = Traces.TestCase


@st.composite
def workloads(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    config = draw(configs())
    return config, draw(st.lists(sequences(config["max_seq_len"]), min_size=1, max_size=15))


@settings(max_examples=50)
@given(workload=workloads(), steps_ahead=st.integers(0, 1))
def test_nothing_is_preempted_while_predictions_hold(
    workload: tuple[dict[str, Any], list[dict[str, Any]]], steps_ahead: int
) -> None:
    """A sequence expected to reach max_new_tokens can only need less; then admission leaves nothing to chance."""
    config, given_sequences = workload
    harness = Harness(config, steps_ahead)
    for seq_id, sequence in enumerate(given_sequences):
        harness.add(seq_id, **(sequence | {"expected": 0}))
    harness.drain()
    assert harness.scheduler.preemptions == 0


@settings(max_examples=40)
@given(workload=workloads(), steps_ahead=st.integers(0, 1))
def test_same_calls_same_steps(workload: tuple[dict[str, Any], list[dict[str, Any]]], steps_ahead: int) -> None:
    config, given_sequences = workload
    one, other = Harness(config, steps_ahead), Harness(config | {"_hash_bits": 0}, steps_ahead)
    for seq_id, sequence in enumerate(given_sequences):
        one.add(seq_id, **sequence)
        other.add(seq_id + 1000, **sequence)  # neither ids nor hashes may decide anything
    while one.scheduler.num_open:
        a, b = one.advance(), other.advance()
        assert (a is None) == (b is None)
        if a is None or b is None:
            continue
        for name in ("token_ids", "positions", "kv_index", "q_start", "kv_len", "seq_slot", "sample_row", "sample_slot",
                     "sample_count", "new_slots", "page_updates", "copy_source", "copy_target"):  # fmt: skip
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)
        assert a.seq_ids.tolist() == [seq_id - 1000 for seq_id in b.seq_ids.tolist()]


@pytest.mark.feature("engine", "prefix cache: token ids compared, pages shared within a step too")
@settings(max_examples=40)
@given(
    given_prompts=st.lists(prompts(28), min_size=1, max_size=12),
    page_size=st.integers(1, 5),
    max_step_tokens=st.integers(12, 200),
)
def test_with_room_enough_every_shared_page_is_computed_once(
    given_prompts: list[tuple[int, ...]], page_size: int, max_step_tokens: int
) -> None:
    """Against a set of prefixes: in order of arrival, a prompt's full pages are new or found, the last token apart."""
    harness = Harness(
        {"num_pages": 400, "page_size": page_size, "max_slots": 12, "max_step_tokens": max_step_tokens,
         "max_seq_len": 30}
    )  # fmt: skip
    for seq_id, prompt in enumerate(given_prompts):
        harness.add(seq_id, prompt, max_new=1)
    harness.drain()
    seen: set[tuple[int, ...]] = set()
    found = 0
    for prompt in given_prompts:
        matched = 0
        while matched + page_size < len(prompt) and prompt[: matched + page_size] in seen:
            matched += page_size
        found += matched
        seen |= {prompt[:end] for end in range(page_size, len(prompt) + 1, page_size)}
    assert harness.scheduler.cached_prompt_tokens == found
    computed = sum(count for _, count in harness.prefill_tokens)
    assert computed + harness.copied == sum(map(len, given_prompts)) - found


def test_model_would_notice_foreign_tokens() -> None:
    """The checks above can fail: a device that lost a page's content is noticed."""
    harness = Harness({"num_pages": 8, "page_size": 2, "max_slots": 2, "max_step_tokens": 8, "max_seq_len": 12})
    harness.add(0, (1, 1, 1), max_new=6)
    harness.advance()
    harness.kv[harness.where(0, 1)] = (2, 2)
    with pytest.raises(AssertionError, match="foreign"):
        harness.advance()


@settings(max_examples=60)
@given(workload=workloads(), lookup=st.sampled_from([1, 2, 5, 64]))
def test_drafts_save_steps_and_change_no_token(
    workload: tuple[dict[str, Any], list[dict[str, Any]]], lookup: int
) -> None:
    """The harness knows the tokens; alone in the engine, each draft token that was right is a step less."""
    config, given_sequences = workload
    for seq_id, sequence in enumerate(given_sequences):
        plain, drafting = Harness(config), Harness(config | {"lookup": lookup})
        steps = []
        for harness in (plain, drafting):
            harness.add(seq_id, **sequence)
            steps.append(0)
            while harness.scheduler.num_open:
                harness.advance()
                steps[-1] += 1
        scheduler = drafting.scheduler
        assert steps[0] - steps[1] == drafting.accepted
        assert (scheduler.drafted_tokens, scheduler.accepted_tokens) == (drafting.drafted, drafting.accepted)
        assert scheduler.preemptions == 0
    together = Harness(config | {"lookup": lookup})
    for seq_id, sequence in enumerate(given_sequences):
        together.add(seq_id, **sequence)
    together.drain()
