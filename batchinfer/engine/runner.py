"""From a step plan to sampled tokens: what the engine asks of a device, and how the host's own CPU does it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from batchinfer.engine.memory import free_memory, host_budget
from batchinfer.engine.replay import Replay
from batchinfer.engine.slots import Rows, SlotTable
from batchinfer.models.decoder import Decoder, KVCache, ScoreInput, Scores, StepInput
from batchinfer.models.layers import Copies
from batchinfer.models.lora import NO_ADAPTERS, AdapterRows, Groups
from batchinfer.ops import AttentionInput, SampleOutput
from batchinfer.ops.accelerator import Accelerator

if TYPE_CHECKING:
    from batchinfer._engine import Step


@dataclass(frozen=True)
class StepOutput:
    """What a step has computed, on the host: one token for each sampled row, and the scores that were asked for, or
    pooled states as of :meth:`Decoder.pool`, and then tokens that mean nothing; and from when to when the device was at
    it, in seconds of time.perf_counter()."""

    sample: SampleOutput
    scores: Scores | None = None
    states: torch.Tensor | None = None
    begin: float = 0.0
    end: float = 0.0


class Runner(Protocol):
    """Runs the decoder over the scheduler's steps, in the order in which they are started.

    ``ahead`` is how many steps may be started before the tokens of the oldest are taken. ``seconds`` are sums by part.
    """

    ahead: int
    slots: SlotTable
    seconds: dict[str, float]

    def cache_budget(self, ranks_on_node: int) -> int:
        """Bytes that the KV pool of one of the node's ranks may take if the user names no size."""

    def allocate(self, num_pages: int) -> int:
        """Make the KV pool, once, before the first step. The pages that it got: fewer where ``num_pages`` don't fit.
        Raises JobError (69) with the arithmetic where that fails too."""

    def start(self, step: Step, rows: Rows) -> None:
        """Begin a step; ``rows`` as in :meth:`SlotTable.extras`. A token -1 is the one that the step started
        before sampled for the same slot. What it samples by tokens that are not taken yet waits for :meth:`sample`."""

    def sample(self) -> None:
        """Sample what waits in the step started last; all tokens before it are taken by now. Nothing if none waits."""

    def finish(self) -> StepOutput:
        """Wait for the oldest step that was started. Valid until the next call."""

    def peak_device_bytes(self) -> int:
        """Most bytes of device memory taken so far; 0 if the device is the host."""

    def close(self) -> None:
        """Wait for what is under way, and give the memory back: weights, cache and buffers. Once, and the last call."""


def make_runner(decoder: Decoder, page_size: int, max_slots: int) -> Runner:
    """The runner for the decoder's device. Raises JobError(64) for a page size that the device can't work with."""
    if decoder.ops.device.type == "cpu":
        return HostRunner(decoder, page_size, max_slots)
    from batchinfer.engine.device_runner import DeviceRunner

    return DeviceRunner(decoder, page_size, max_slots, Accelerator(decoder.ops.device))


class HostRunner:
    """Computes a step when it is started, on the scheduler's own arrays."""

    ahead = 0

    def __init__(self, decoder: Decoder, page_size: int, max_slots: int):
        self._decoder = decoder
        self._page_size = page_size
        self._cache = KVCache((), ())
        self._replay = Replay(decoder, self._cache)
        self._done: deque[StepOutput] = deque()
        self.slots = SlotTable(max_slots, decoder.spec.vocab_size)
        self.seconds = {"forward": 0.0, "sample": 0.0}

    def cache_budget(self, ranks_on_node: int) -> int:
        return host_budget(free_memory() // ranks_on_node)

    def allocate(self, num_pages: int) -> int:
        self._cache = self._decoder.new_cache(num_pages, self._page_size)
        self._replay = Replay(self._decoder, self._cache)
        return num_pages

    def start(self, step: Step, rows: Rows) -> None:
        start = time.perf_counter()
        sample, scores, states = SampleOutput(torch.zeros(step.num_samples, dtype=torch.int32)), None, None
        if self._decoder.pooling:
            states = self._decoder.pool(self._step_input(step, rows), self._cache)
        else:
            logits, scores = self._replay.forward(self._step_input(step, rows))
        middle = time.perf_counter()
        if step.num_samples and not self._decoder.pooling:
            inputs = self.slots.gather(step.sample_slot, step.sample_count, rows)
            sample = self._decoder.ops.sample(logits, inputs)
        end = time.perf_counter()
        self._done.append(StepOutput(sample, scores, states, start, end))
        self.seconds["forward"] += middle - start
        self.seconds["sample"] += end - middle

    def sample(self) -> None:
        """No step is ahead of the tokens here."""

    def finish(self) -> StepOutput:
        return self._done.popleft()

    def peak_device_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self._cache = KVCache((), ())
        del self._decoder, self._replay

    @staticmethod
    def _step_input(step: Step, rows: Rows) -> StepInput:
        scored = rows.scored()
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
            score=ScoreInput(tensor(scored[0]), tensor(scored[1]), scored[2]) if scored else None,
            adapters=grouped_rows(rows),
            copies=Copies(tensor(step.copy_source), tensor(step.copy_target)) if len(step.copy_source) else None,
        )


def grouped_rows(rows: Rows) -> AdapterRows:
    """By their adapters, the rows of a step that have one."""

    def groups(adapter: np.ndarray) -> Groups:
        numbers = np.unique(adapter[adapter >= 0]).tolist()
        return tuple((number, torch.from_numpy(np.flatnonzero(adapter == number))) for number in numbers)

    adapters = rows.adapters()
    return NO_ADAPTERS if adapters is None else AdapterRows(*map(groups, adapters))
