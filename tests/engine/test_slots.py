from __future__ import annotations

import numpy as np
import pytest

from batchinfer.engine.slots import History, SlotTable
from batchinfer.types import SamplingParams

NONE = np.zeros(0, np.int32)


class Rows:
    """Histories by row, and for rows with a constraint a mask that names the row."""

    def __init__(self, histories: dict[int, History] | None = None, constrained: tuple[int, ...] = ()):
        self._histories, self._constrained = histories or {}, constrained

    def history(self, row: int) -> History:
        assert row in self._histories, f"row {row} has no penalties, so its history must not be asked for"
        return self._histories[row]

    def allow(self, rows: list[int], masks: np.ndarray) -> None:
        assert rows == list(self._constrained), "no others have a constraint"
        for row in rows:
            masks[row] = row


PLAIN = Rows()


def table(*params: SamplingParams) -> SlotTable:
    slots = SlotTable(len(params), vocab_size=65)
    for slot, p in enumerate(params):
        slots.assign(slot, p, seed=2**63 + slot, stop_ids=np.array([slot, 99], np.int32))
    return slots


def test_plain_rows_cost_no_extra_arrays() -> None:
    got = table(SamplingParams(), SamplingParams(temperature=0.5, top_k=3)).gather(
        np.array([1, 0], np.int32), np.array([4, 7], np.int32), PLAIN
    )
    assert got.temperature.tolist() == [0.5, 0.0]
    assert got.top_k.tolist() == [3, 0]
    assert got.position.tolist() == [4, 7]
    assert got.seed.numpy().view(np.uint64).tolist() == [2**63 + 1, 2**63]
    assert got.penalties is got.history_ids is got.banned_ids is got.allowed is got.num_logprobs is None


def test_history_is_gathered_for_penalised_rows_only() -> None:
    slots = table(SamplingParams(), SamplingParams(repetition_penalty=1.5), SamplingParams(presence_penalty=1.0))
    histories = {1: (np.array([5, 6], np.int32), NONE), 2: (np.array([7], np.int32), np.array([8], np.int32))}
    got = slots.gather(np.array([0, 1, 2], np.int32), np.array([0, 0, 1], np.int32), Rows(histories))
    assert got.history_ids is not None
    assert got.history_start is not None
    assert got.history_prompt is not None
    assert got.history_ids.tolist() == [5, 6, 7, 8]
    assert got.history_start.tolist() == [0, 0, 2, 4]
    assert got.history_prompt.tolist() == [0, 2, 1]
    assert got.penalties is not None
    assert got.penalties[0].tolist() == [1.0, 1.5, 1.0]


def test_masks_of_constrained_rows() -> None:
    slots = table(SamplingParams(), SamplingParams(regex="a"), SamplingParams(choice=("b",)))
    got = slots.gather(np.array([2, 0, 1], np.int32), np.array([0, 0, 1], np.int32), Rows(constrained=(0, 2)))
    assert got.allowed is not None
    assert got.allowed.tolist() == [[0] * 3, [-1] * 3, [2] * 3]


def test_stop_tokens_are_banned_until_min_tokens() -> None:
    slots = table(SamplingParams(min_tokens=2), SamplingParams(min_tokens=2), SamplingParams())
    got = slots.gather(np.array([0, 1, 2], np.int32), np.array([1, 2, 0], np.int32), PLAIN)
    assert got.banned_ids is not None
    assert got.banned_start is not None
    assert got.banned_ids.tolist() == [0, 99]
    assert got.banned_start.tolist() == [0, 2, 2, 2]


def test_a_slot_forgets_its_last_sequence() -> None:
    slots = table(SamplingParams(repetition_penalty=2.0, logprobs=3, min_tokens=9))
    slots.assign(0, SamplingParams(), 1, NONE)
    got = slots.gather(np.array([0], np.int32), np.array([0], np.int32), PLAIN)
    assert got.penalties is got.num_logprobs is got.banned_ids is None


@pytest.mark.parametrize(("wanted", "expected"), [(None, -1), (0, 0), (5, 5)])
def test_logprobs_of_a_row(wanted: int | None, expected: int) -> None:
    slots = table(SamplingParams(logprobs=wanted), SamplingParams(logprobs=2))
    got = slots.gather(np.array([0, 1], np.int32), np.array([0, 0], np.int32), PLAIN)
    assert got.num_logprobs is not None
    assert got.num_logprobs.tolist() == [expected, 2]


def test_masks_biases_and_bad_words_of_the_rows_that_have_them() -> None:
    params = [
        SamplingParams(),
        SamplingParams(allowed_token_ids=(0, 31, 64), logit_bias={7: 1.5, 3: -2.0}),
        SamplingParams(regex="a"),
        SamplingParams(bad_words=("x",), min_tokens=2, logit_bias={9: 1.0}),
    ]
    slots = table(*params)
    slots.assign(3, params[3], 0, np.array([5], np.int32), [np.array([8, 6], np.int32), np.array([4], np.int32)])
    histories = {3: (NONE, np.array([8], np.int32))}
    rows = np.array([0, 1, 2, 3], np.int32)
    got = slots.gather(rows, np.array([0, 0, 0, 1], np.int32), Rows(histories, constrained=(2,)))
    assert got.allowed is not None
    assert got.bias_ids is not None
    assert got.bias_start is not None
    assert got.bias_values is not None
    assert got.banned_ids is not None
    assert got.banned_start is not None
    assert got.allowed.tolist() == [[-1] * 3, [-(2**31) + 1, 0, 1], [2] * 3, [-1] * 3]
    assert (got.bias_ids.tolist(), got.bias_start.tolist()) == ([7, 3, 9], [0, 0, 2, 2, 3])
    assert got.bias_values.tolist() == [1.5, -2.0, 1.0]
    assert (got.banned_ids.tolist(), got.banned_start.tolist()) == ([5, 4, 6], [0, 0, 0, 0, 3])


def test_a_slot_forgets_what_its_last_sequence_had() -> None:
    slots = table(SamplingParams(allowed_token_ids=(1,), logit_bias={2: 1.0}))
    slots.assign(0, SamplingParams(), 1, NONE)
    got = slots.gather(np.array([0], np.int32), np.array([0], np.int32), PLAIN)
    assert got.allowed is got.bias_ids is got.bias_values is got.banned_ids is None
