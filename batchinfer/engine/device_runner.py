"""Steps on a GPU, one ahead of the host: step N + 1 is started while N runs, and takes N's tokens on the device.

What lives on the device: the last token of every slot, the page table, the step's arrays, the weights and the cache. A
step sends one pinned buffer and the page table's changes, and brings back its tokens; no call here waits for the device
but :meth:`DeviceRunner.finish`, and products of a number of rows for which the vendor's library has to load a kernel
first. Steps that only decode, and small ones of small models (step_shape.py), are replays of a graph, captured when a
shape comes for the second time: to start a step of 16 layers takes the host 0.16 ms so, and 2 to 4 when it launches
each kernel. The sampler is part of the graph, unless rows have penalties, masks and the like. What those need of the
tokens so far the host puts together while the device is at the layers of the step. That a stop token has ended a
sequence the device sees when it takes the token, a step before the host can: attention spares the sequence then.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from batchinfer.engine.memory import allocate_or_shrink, device_budget
from batchinfer.engine.runner import StepOutput
from batchinfer.engine.slots import Extra, Extras, Rows, ScoredRows, SlotTable
from batchinfer.engine.step_buffer import StepBuffer
from batchinfer.engine.step_shape import Limits, StepShape
from batchinfer.models.decoder import Decoder, KVCache, ScoreInput, Scores
from batchinfer.ops import SampleOutput
from batchinfer.ops.accelerator import Accelerator, Event, Graph
from batchinfer.types import ExitCode, JobError

if TYPE_CHECKING:
    from batchinfer._engine import Step

SMALLEST_PAGE = 16
"""Tokens of a page: the attention kernels copy 16 positions at a time."""

A = TypeVar("A", SampleOutput, Scores)

UPDATES = 4096
"""Changes of the page table that there is room for at first; the buffers grow when a step has more."""


@dataclass
class _Started:
    """A step under way: its tokens on their way to the host, or its logits until they are sampled; and the events
    around it."""

    step: Step
    rows: Rows
    out: StepOutput
    logits: Tensor
    begin: Event
    end: Event


@dataclass
class EventClock:
    """Where the events of a stream lie on the host's clock (time.perf_counter, seconds), given one ``event`` whose
    ``time`` is known. From each event on to the next, because the distance of two is a float32 in milliseconds: after
    an hour it would be a quarter of one off."""

    event: Event
    time: float = 0.0

    def advance(self, event: Event) -> float:
        """The time of an event, which the device has passed. The next ones are counted from it."""
        self.time += self.event.elapsed_time(event) / 1000
        self.event = event
        return self.time


@dataclass(frozen=True)
class Captured:
    """A graph and the tensor that its tokens, or its logits, are in after a replay."""

    graph: Graph
    out: Tensor


class DeviceRunner:
    """A :class:`batchinfer.engine.runner.Runner` for a decoder whose ops run on ``gpu``."""

    ahead = 1

    def __init__(self, decoder: Decoder, page_size: int, max_slots: int, gpu: Accelerator):
        if page_size < SMALLEST_PAGE:
            raise JobError(
                f"engine.page_size={page_size} is not allowed: on a GPU a page holds at least {SMALLEST_PAGE} tokens",
                ExitCode.USAGE,
            )
        self._gpu = gpu
        self._decoder, self._ops, self._device = decoder, decoder.ops, decoder.ops.device
        self._page_size, self._max_slots = page_size, max_slots
        self._stream = gpu.stream()
        self._graphs: dict[StepShape, Captured] = {}
        self._seen: set[StepShape] = set()
        self._pool = gpu.graph_pool() if gpu.graphs else None
        self._started: deque[_Started] = deque()
        self._waits = False  # the step started last: to be sampled
        self._parity = 0
        self.slots = SlotTable(max_slots, decoder.spec.vocab_size)
        self.seconds = {"launch": 0.0, "wait": 0.0, "device": 0.0}
        self._clock = EventClock(gpu.event())

        self.limits = Limits.of(decoder.spec, max_slots, decoder.max_step_tokens, decoder.max_samples)

        columns = -(-decoder.max_positions // page_size)
        sizes = decoder.max_step_tokens, max_slots, decoder.max_samples
        self._buffer = StepBuffer(*sizes, lambda size: torch.empty(size, dtype=torch.uint8, device=self._device))
        # Two: while the copy of one waits for the step before, the other has been copied and can be filled.
        self._host = [StepBuffer(*sizes, lambda size: gpu.pinned((size,), torch.uint8)) for _ in range(2)]
        self._updates: list[Tensor] = [gpu.pinned((0, 2), torch.int64) for _ in range(2)]
        self._page_table = torch.zeros(max_slots, columns, dtype=torch.int32, device=self._device)
        self._last_token = torch.zeros(max_slots + 1, dtype=torch.int32, device=self._device)  # the last: of nobody
        self._cache = decoder.new_cache(1, page_size)
        # What was made on the default stream is finished before this one uses it; here, and in allocate().
        self._gpu.synchronize()
        with self._gpu.on(self._stream):
            self._profile()
            self._clock.event.record()
        self._gpu.synchronize()
        self._clock.time = time.perf_counter()

    def cache_budget(self, ranks_on_node: int) -> int:
        """Each rank has a device of its own, so that the number of ranks does not matter."""
        return device_budget(*self._gpu.memory())

    def allocate(self, num_pages: int) -> int:
        self._cache = KVCache((), ())

        def make(pages: int) -> None:
            self._gpu.empty_cache()
            self._cache = self._decoder.new_cache(pages, self._page_size)
            self._gpu.synchronize()

        def free() -> int:
            return self._gpu.memory()[0]

        page_bytes = KVCache.bytes_per_page(self._decoder.spec, self._page_size, self._decoder.kv_dtype)
        return allocate_or_shrink(make, num_pages, page_bytes, self._gpu.OutOfMemory, free)

    def start(self, step: Step, rows: Rows) -> None:
        start = time.perf_counter()
        waits = bool(self._started) and self.slots.need_tokens(step.sample_slot)
        extras = {} if waits else self.slots.extras(step.sample_slot, step.sample_count, rows)
        scored = rows.scored()
        adapters = rows.adapters()
        adapted = adapters is not None
        copied = len(step.copy_source)
        shape = StepShape(step.num_tokens, step.num_samples, adapted=adapted, copies=copied)
        if not (scored or self._decoder.pooling or copied):
            shape = self.limits.shape(step.num_tokens, step.num_samples, step.num_decode, adapted)
        if waits or extras:
            shape = replace(shape, sampled=False)
        host = self._host[self._parity]
        host.fill(step, self.slots, shape, adapters)
        begin, end = self._gpu.event(), self._gpu.event()
        with self._gpu.on(self._stream):
            begin.record()
            self._update_page_table(step.page_updates)
            self._buffer.data.copy_(host.data, non_blocking=True)
            if shape.repeats and self._captured(shape):
                graph = self._graphs[shape]
                graph.graph.replay()
                out, scores = graph.out, None
            else:
                score = self._score_input(scored) if scored else None
                out, scores = self._compute(shape, score)
            scores = None if scores is None else self._to_host(scores, len(scores.chosen))
            given = StepOutput(SampleOutput(torch.zeros(step.num_samples, dtype=torch.int32)), scores)
            if self._decoder.pooling:
                given = replace(given, states=self._copy(out))
            elif shape.sampled:
                given = replace(given, sample=SampleOutput(self._copy(out[: step.num_samples])))
            started = _Started(step, rows, given, out, begin, end)
            if not shape.sampled and not waits:
                self._sample_rows(started, extras)
            end.record()
        self._started.append(started)
        self._waits = waits
        self._parity ^= 1
        self.seconds["launch"] += time.perf_counter() - start

    def sample(self) -> None:
        if not self._waits:
            return
        start = time.perf_counter()
        self._waits, started = False, self._started[-1]
        step = started.step
        extras = self.slots.extras(step.sample_slot, step.sample_count, started.rows)
        with self._gpu.on(self._stream):
            self._sample_rows(started, extras)
            started.end.record()
        self.seconds["launch"] += time.perf_counter() - start

    def finish(self) -> StepOutput:
        start = time.perf_counter()
        step = self._started.popleft()
        step.end.synchronize()
        self.seconds["wait"] += time.perf_counter() - start
        begin, end = self._clock.advance(step.begin), self._clock.advance(step.end)
        self.seconds["device"] += end - begin
        return replace(step.out, begin=begin, end=end)

    def peak_device_bytes(self) -> int:
        return self._gpu.peak_bytes()

    def close(self) -> None:
        self._gpu.synchronize()
        self._started.clear()
        self._graphs.clear()
        self._cache = KVCache((), ())
        del self._decoder, self._ops, self._buffer, self._page_table  # the engine may live on, for its counters
        self._gpu.empty_cache()

    def _compute(self, shape: StepShape, score: ScoreInput | None = None) -> tuple[Tensor, Scores | None]:
        """The step in the device's buffer: its tokens, which the slots remember; logits, which the next step
        overwrites, where it is not ``shape.sampled``; or pooled states."""
        samples = shape.samples
        self._buffer.feed_back(shape, self._ops, self._last_token)
        step = replace(self._buffer.step_input(shape, self._page_table), score=score)
        if self._decoder.pooling:
            return self._decoder.pool(step, self._cache), None
        logits, scores = self._decoder.forward(step, self._cache)
        if not shape.sampled:
            return logits, scores
        if not samples:
            return torch.zeros(0, dtype=torch.int32, device=self._device), scores
        return self._sample(logits, samples, {}).tokens, scores

    def _sample(self, logits: Tensor, samples: int, extras: Extras) -> SampleOutput:
        """Of the step in the device's buffer."""
        out = self._ops.sample(logits[:samples], self._buffer.sample_input(samples, **extras))
        # Of the rows of a draft it is not said which is the last: their step's tokens are known before the next.
        self._last_token.index_copy_(0, self._buffer.arrays["sample_slot"][:samples], out.tokens)
        return out

    def _sample_rows(self, started: _Started, extras: Extras) -> None:
        """Sample the step's logits by what only the host knows."""
        samples = started.step.num_samples
        on_device = {name: self._option(name, value) for name, value in extras.items()}
        out = self._sample(started.logits, samples, on_device)
        started.out = replace(started.out, sample=self._to_host(out, samples))

    def _option(self, name: str, value: Extra) -> Extra:
        """An optional field of SampleInput, on the device. num_logprobs stays: it decides the shape of the output."""
        if isinstance(value, tuple):
            return tuple(self._option(name, part) for part in value)
        return value if name == "num_logprobs" else self._to_device(value)

    def _score_input(self, scored: ScoredRows) -> ScoreInput:
        row, token = (self._to_device(torch.from_numpy(array)) for array in scored[:2])
        return ScoreInput(row, token, scored[2])

    def _to_device(self, t: Tensor) -> Tensor:
        """By way of pinned memory: from any other a copy waits for all that was launched before it."""
        return self._gpu.pinned(tuple(t.shape), t.dtype).copy_(t).to(self._device, non_blocking=True)

    def _captured(self, shape: StepShape) -> bool:
        """Whether there is a graph for steps of this shape; makes it at the second time of asking."""
        if shape in self._graphs:
            return True
        if shape not in self._seen or not self._gpu.graphs:
            self._seen.add(shape)
            return False
        self._graphs[shape] = Captured(*self._gpu.capture(lambda: self._compute(shape)[0], self._pool))
        return True

    def _update_page_table(self, updates: np.ndarray) -> None:
        """``updates`` [U, 3]: slot, column, page."""
        count = len(updates)
        if not count:
            return
        if len(self._updates[self._parity]) < count:
            self._updates[self._parity] = self._gpu.pinned((max(UPDATES, 2 * count), 2), torch.int64)
        pinned = self._updates[self._parity][:count]
        values = pinned.numpy()
        np.multiply(updates[:, 0], self._page_table.shape[1], out=values[:, 0], dtype=np.int64)
        values[:, 0] += updates[:, 1]
        values[:, 1] = updates[:, 2]
        place, page = pinned.to(self._device, non_blocking=True).unbind(1)
        self._page_table.view(-1).scatter_(0, place, page.to(torch.int32))

    def _to_host(self, out: A, rows: int) -> A:
        """Copies of the first ``rows`` rows of its tensors, there once the stream has come this far."""
        tensors = {f.name: getattr(out, f.name) for f in fields(out)}
        return replace(out, **{name: None if t is None else self._copy(t[:rows]) for name, t in tensors.items()})

    def _copy(self, t: Tensor) -> Tensor:
        return self._gpu.pinned(tuple(t.shape), t.dtype).copy_(t, non_blocking=True)

    def _profile(self) -> None:
        """A step of the largest size on one page, so that what it takes of the memory is taken, its kernels are loaded
        and the workspaces of the libraries exist before the KV pool gets the rest."""
        tokens, arrays = self._decoder.max_step_tokens, self._buffer.arrays
        for array in arrays.values():
            array.zero_()
        for name in ("kv_index", "copy_source"):
            arrays[name].fill_(-1)
        longest = min(tokens, self._decoder.max_positions)
        torch.arange(0, longest * (self._max_slots + 1), longest, out=arrays["q_start"]).clamp_(max=tokens)
        arrays["kv_len"].fill_(longest)
        arrays["sample_slot"].fill_(self._max_slots)
        arrays["temperature"].fill_(1.0)
        arrays["top_p"].fill_(0.9)
        self._compute(StepShape(tokens, self._decoder.max_samples, adapted=self._decoder.adapted, copies=1))
