"""What the steps cost: seconds of the host by what it did, of the device by kind of step, and how much that was."""

from __future__ import annotations

import time

import numpy as np

from batchinfer.engine.open_work import StepRows
from batchinfer.engine.roofline import Costs
from batchinfer.engine.runner import StepOutput
from batchinfer.engine.trace import Trace
from batchinfer.types import EngineStats


class StepClock:
    """Counts into ``stats``, and draws what it counts into a trace. ``costs``: of the model, where they are known."""

    def __init__(self, stats: EngineStats, trace: Trace | None, costs: Costs | None):
        self.seconds = {"schedule": 0.0, "output": 0.0}
        self._stats = stats
        self._trace = trace
        self._costs = costs
        self._device_end = 0.0  # since then the device has been idle, though a request was open

    def resume(self) -> None:
        """A request has come, and none was open: until now the device had nothing to do."""
        self._device_end = time.perf_counter()

    def phase(self, name: str, begin: float) -> float:
        """The host has done something since ``begin`` (time.perf_counter); now."""
        now = time.perf_counter()
        if name in self.seconds:
            self.seconds[name] += now - begin
        if self._trace:
            self._trace.span("host", name, begin, now)
        return now

    def step(self, begin: float, running: int) -> None:
        """The host has gone once through the loop since ``begin``."""
        if self._trace:
            self._trace.span("host", "step", begin, time.perf_counter(), running=running)

    def count(self, rows: StepRows, out: StepOutput, *, sampled: bool) -> None:
        """A step has ended on the device. ``sampled``: its last states went through the LM head."""
        step = rows.step
        lengths, queries = step.kv_len.astype(np.int64), np.diff(step.q_start).astype(np.int64)
        decode_only = step.num_seqs == step.num_decode
        work = self._stats.decode if decode_only else self._stats.prefill
        work.steps += 1
        work.seconds += out.end - out.begin
        samples = step.num_samples + sum(len(place.rows) for place in rows.places) if sampled else 0
        context = int(lengths.sum())
        # A token attends to itself and all before it; the last of a prompt's to the whole length.
        pairs = int((queries * lengths - queries * (queries - 1) // 2).sum())
        work.tokens += step.num_tokens
        work.samples += samples
        work.context += context
        work.pairs += pairs
        if self._costs:
            flops, read = self._costs.step(step.num_tokens, samples, context, pairs)
            work.least_flops += flops
            work.least_bytes += read
        self._stats.device_idle += max(0.0, out.begin - self._device_end)
        self._device_end = max(self._device_end, out.end)
        if self._trace:
            name = "decode" if decode_only else "prefill"
            counts = {"tokens": step.num_tokens, "sequences": step.num_seqs, "decoding": step.num_decode}
            self._trace.span("device", name, out.begin, out.end, **counts)

    def close(self) -> None:
        if self._trace:
            self._trace.close()
