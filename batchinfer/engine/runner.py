"""From a step plan to sampled tokens: the only place where the engine touches a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from batchinfer.engine.slots import History, SlotTable
from batchinfer.models.decoder import Decoder, StepInput
from batchinfer.ops import AttentionInput, Ops, SampleOutput

if TYPE_CHECKING:
    from batchinfer._engine import Step


class Runner:
    """Runs the decoder over one step of the scheduler. On CPU the scheduler's arrays are used in place."""

    def __init__(self, decoder: Decoder, ops: Ops, num_pages: int, page_size: int, max_slots: int):
        self._decoder = decoder
        self._ops = ops
        self._cache = decoder.new_cache(num_pages, page_size)
        self.slots = SlotTable(max_slots)
        self.seconds = {"forward": 0.0, "sample": 0.0}

    def run(self, step: Step, history: Callable[[int], History]) -> SampleOutput:
        """One token for each of the step's sampled rows; ``history(row)`` as in :meth:`SlotTable.gather`."""
        start = time.perf_counter()
        logits = self._decoder.forward(self._step_input(step), self._cache)
        middle = time.perf_counter()
        if step.num_samples:
            out = self._ops.sample(logits, self.slots.gather(step.sample_slot, step.sample_count, history))
        else:
            out = SampleOutput(torch.zeros(0, dtype=torch.int32))
        self.seconds["forward"] += middle - start
        self.seconds["sample"] += time.perf_counter() - middle
        return out

    @staticmethod
    def _step_input(step: Step) -> StepInput:
        tensor: Callable[[np.ndarray], torch.Tensor] = torch.from_numpy
        return StepInput(
            token_ids=tensor(step.token_ids),
            positions=tensor(step.positions),
            kv_index=tensor(step.kv_index),
            attention=AttentionInput(
                q_start=tensor(step.q_start),
                kv_len=tensor(step.kv_len),
                slot=tensor(step.seq_slot),
                page_table=tensor(step.page_table),
            ),
            sample_row=tensor(step.sample_row),
        )
