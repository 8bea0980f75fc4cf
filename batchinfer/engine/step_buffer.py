"""The arrays of a step at fixed places of one buffer: what the host sends to a device, in one copy, for every step.

The places do not depend on the step, so that a captured graph finds the arrays of every later step where it expects
them. Arrays are filled up to the sizes that the graph was captured for with rows that change nothing: tokens whose keys
and values go nowhere, sequences without tokens, samples that are written to a slot that nobody has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from batchinfer.engine.slots import STOPS, SlotTable
from batchinfer.engine.step_shape import StepShape
from batchinfer.models.decoder import StepInput
from batchinfer.models.layers import Copies
from batchinfer.models.lora import NO_ADAPTERS, AdapterRows
from batchinfer.ops import AttentionInput, Ops, SampleInput
from batchinfer.ops.fields import SAMPLE_FIELDS

if TYPE_CHECKING:
    from batchinfer._engine import Step

_ALIGN = 16
"""Bytes: every array may be read in the widest access of a GPU."""


class StepBuffer:
    """One buffer, seen as a step's arrays. ``empty(size)`` makes it: so many bytes, uint8, where they are wanted.

    ``max_tokens`` T, ``max_slots`` S, ``max_samples`` N: no step has more tokens, sequences or samples. ``arrays`` maps
    names to views: token_ids, positions, adapter int32 [T]; kv_index int64 [T]; q_start [S + 1], kv_len, slot,
    copy_source, copy_target int32 [S]; stop_ids int32 [S * STOPS]; sample_row, sample_adapter, position, top_k int32
    [N]; sample_slot, seed int64 [N]; temperature, top_p, min_p float32 [N].
    """

    def __init__(self, max_tokens: int, max_slots: int, max_samples: int, empty: Callable[[int], Tensor]):
        self.max_slots = max_slots
        lengths: dict[str, tuple[torch.dtype, int]] = {
            "token_ids": (torch.int32, max_tokens),
            "positions": (torch.int32, max_tokens),
            "kv_index": (torch.int64, max_tokens),
            "adapter": (torch.int32, max_tokens),
            "q_start": (torch.int32, max_slots + 1),
            "kv_len": (torch.int32, max_slots),
            "slot": (torch.int32, max_slots),
            "stop_ids": (torch.int32, max_slots * STOPS),
            "copy_source": (torch.int32, max_slots),
            "copy_target": (torch.int32, max_slots),
            "sample_row": (torch.int32, max_samples),
            "sample_slot": (torch.int64, max_samples),
            "sample_adapter": (torch.int32, max_samples),
            **{name: (dtype, max_samples) for name, dtype in SAMPLE_FIELDS.items()},
        }
        starts, size = {}, 0
        for name, (dtype, length) in lengths.items():
            starts[name] = size
            size += -(-length * dtype.itemsize // _ALIGN) * _ALIGN
        self.data = empty(size)
        self.arrays = {
            name: self.data[starts[name] : starts[name] + length * dtype.itemsize].view(dtype)
            for name, (dtype, length) in lengths.items()
        }

    def fill(
        self, step: Step, slots: SlotTable, shape: StepShape, adapters: tuple[np.ndarray, np.ndarray] | None = None
    ) -> None:
        """Write the step, filled up to ``shape`` and max_slots sequences. ``adapters`` as of Rows.adapters. Host
        only."""
        nobody, tokens, samples = self.max_slots, shape.tokens, shape.samples
        values: dict[str, tuple[np.ndarray, int, int]] = {  # array, length of it, what fills it up
            "token_ids": (step.token_ids, tokens, 0),
            "positions": (step.positions, tokens, 0),
            "kv_index": (step.kv_index, tokens, -1),
            "q_start": (step.q_start, self.max_slots + 1, step.num_tokens),
            "kv_len": (step.kv_len, self.max_slots, 0),
            "slot": (step.seq_slot, self.max_slots, 0),
            "copy_source": (step.copy_source, shape.copies, -1),
            "copy_target": (step.copy_target, shape.copies, -1),
            "sample_row": (step.sample_row, samples, 0),
            "sample_slot": (step.sample_slot, samples, nobody),
        }
        values |= {
            name: (array, samples, 0) for name, array in slots.parameters(step.sample_slot, step.sample_count).items()
        }
        if adapters is not None:
            values |= {"adapter": (adapters[0], tokens, -1), "sample_adapter": (adapters[1], samples, -1)}
        for name, (array, length, filler) in values.items():
            target = self.arrays[name].numpy()
            target[: len(array)] = array
            target[len(array) : length] = filler
        self._fill_stops(step, slots)

    def _fill_stops(self, step: Step, slots: SlotTable) -> None:
        """Of the sequences whose token only the device knows: what it ends them with. Those come first, so that rows,
        tokens and sequences are the same there; others' stop ids nobody reads."""
        stops = self.arrays["stop_ids"].numpy().reshape(-1, STOPS)
        unknown = step.token_ids[step.sample_row] < 0
        stops[step.sample_row[unknown]] = slots.stops(step.sample_slot[unknown], step.sample_count[unknown] - 1)

    def feed_back(self, shape: StepShape, ops: Ops, last_token: Tensor) -> None:
        """To the sequences whose token only the device knows; by ``ops.feed_back``, where the buffer lies."""
        a, rows = self.arrays, min(shape.tokens, self.max_slots)
        stops = a["stop_ids"].view(-1, STOPS)[:rows]
        ops.feed_back(a["token_ids"][:rows], a["kv_len"][:rows], a["slot"][:rows], last_token, stops)

    def step_input(self, shape: StepShape, page_table: Tensor) -> StepInput:
        """Views of the first tokens and samples; always max_slots sequences."""
        a, tokens, samples, copied = self.arrays, shape.tokens, shape.samples, shape.copies
        adapters = AdapterRows(a["adapter"][:tokens], a["sample_adapter"][:samples]) if shape.adapted else NO_ADAPTERS
        return StepInput(
            token_ids=a["token_ids"][:tokens],
            positions=a["positions"][:tokens],
            kv_index=a["kv_index"][:tokens],
            attention=AttentionInput(a["q_start"], a["kv_len"], a["slot"], page_table, shape.decode_only),
            sample_row=a["sample_row"][:samples],
            adapters=adapters,
            copies=Copies(a["copy_source"][:copied], a["copy_target"][:copied]) if copied else None,
        )

    def sample_input(self, samples: int, **extras: object) -> SampleInput:
        """Views of the first ``samples`` rows, and the optional fields of SampleInput."""
        return SampleInput(**{name: self.arrays[name][:samples] for name in SAMPLE_FIELDS}, **extras)
