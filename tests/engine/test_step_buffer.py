"""What a step's buffer holds: the step, and rows that change nothing up to the size that was asked for."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import torch

from batchinfer._engine import Scheduler
from batchinfer.engine.slots import SlotTable
from batchinfer.engine.step_buffer import StepBuffer
from batchinfer.engine.step_shape import StepShape
from batchinfer.types import SamplingParams

empty_bytes = partial(torch.empty, dtype=torch.uint8)


def test_arrays_are_the_steps_and_the_rest_is_of_nobody() -> None:
    scheduler = Scheduler(num_pages=20, page_size=4, max_slots=5, max_step_tokens=16, max_seq_len=32)
    slots = SlotTable(5, vocab_size=64)
    for seq_id in range(3):
        scheduler.add(seq_id, np.arange(1 + seq_id), max_new_tokens=4)
        slots.assign(seq_id, SamplingParams(temperature=0.5 + seq_id, top_p=0.9), seed=2**63 + seq_id, stop_ids=[])
    step = scheduler.schedule()
    assert (step.num_tokens, step.num_samples) == (6, 3)
    buffer = StepBuffer(16, 5, 5, empty_bytes)
    buffer.data.fill_(0xEE)
    shape = StepShape(8, 4, adapted=True)
    of_token = np.array([3, -1, -1, 0, 0, 0], np.int32)
    buffer.fill(step, slots, shape, (of_token, of_token[step.sample_row]))

    given = buffer.step_input(shape, torch.zeros(5, 8, dtype=torch.int32))
    assert given.token_ids.tolist() == [0, 0, 1, 0, 1, 2, 0, 0]
    assert given.kv_index.tolist() == [*step.kv_index.tolist(), -1, -1]
    assert given.sample_row.tolist() == [0, 2, 5, 0]
    assert given.attention.q_start.tolist() == [0, 1, 3, 6, 6, 6]  # two sequences without tokens
    assert given.attention.kv_len.tolist() == [1, 2, 3, 0, 0]
    assert buffer.arrays["sample_slot"][:4].tolist() == [0, 1, 2, 5]
    assert given.adapters.tokens.tolist() == [3, -1, -1, 0, 0, 0, -1, -1]
    assert given.adapters.samples.tolist() == [3, -1, 0, -1]
    sampled = buffer.sample_input(4)
    assert sampled.temperature.tolist() == [0.5, 1.5, 2.5, 0.0]
    assert sampled.seed.numpy().view(np.uint64).tolist()[:3] == [2**63, 2**63 + 1, 2**63 + 2]
    assert sampled.position.tolist() == [0, 0, 0, 0]
    assert sampled.penalties is None
    assert (buffer.arrays["token_ids"][8:].numpy().view(np.uint8) == 0xEE).all()  # beyond the sizes: untouched


def test_stop_ids_of_the_sequences_whose_token_only_the_device_knows() -> None:
    scheduler = Scheduler(num_pages=20, page_size=4, max_slots=5, max_step_tokens=16, max_seq_len=32)
    slots = SlotTable(5, vocab_size=64)
    params = [SamplingParams(), SamplingParams(min_tokens=1), SamplingParams(min_tokens=2)]
    stops = [np.array(ids, np.int32) for ids in ([7, 8], [9], [10])]
    buffer = StepBuffer(16, 5, 5, empty_bytes)
    buffer.data.fill_(0xEE)

    def add(seq_id: int, given: SamplingParams, ids: np.ndarray) -> None:
        scheduler.add(seq_id, np.arange(3), max_new_tokens=9, min_new_tokens=given.min_tokens, stop_token_ids=ids)

    def next_stops() -> list[list[int]]:
        step = scheduler.schedule()
        for slot, seq_id in zip(step.new_slots.tolist(), step.new_seqs.tolist(), strict=True):
            slots.assign(slot, params[seq_id], seed=0, stop_ids=stops[seq_id])
        buffer.fill(step, slots, StepShape(step.num_tokens, step.num_samples))
        rows = buffer.arrays["stop_ids"].view(-1, 4)[: step.num_decode].tolist()
        return [row for row, token in zip(rows, step.token_ids, strict=False) if token < 0]

    add(0, params[0], stops[0])
    add(1, params[1], stops[1])
    assert next_stops() == []  # prompts
    add(2, params[2], stops[2])
    assert next_stops() == [[7, 8, -1, -1], [-1] * 4]  # the token that sequence 1 has is its first: banned
    scheduler.update(np.array([1, 2], np.int32))
    assert next_stops() == [[7, 8, -1, -1], [9, -1, -1, -1], [-1] * 4]
    scheduler.update(np.array([3, 4, 5], np.int32))
    scheduler.update(np.array([3, 4, 5], np.int32))
    assert next_stops() == []  # the host knows the tokens


def test_arrays_do_not_overlap_and_stand_where_wide_accesses_may() -> None:
    buffer = StepBuffer(37, 11, 23, empty_bytes)
    spans = sorted((a.data_ptr(), a.data_ptr() + a.nbytes) for a in buffer.arrays.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert all((start - buffer.data.data_ptr()) % 16 == 0 for start, _ in spans)
