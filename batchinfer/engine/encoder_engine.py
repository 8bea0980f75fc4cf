"""The engine of encoders: whole texts in, vectors out, as many texts at a time as a step has room for."""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import torch

from batchinfer.engine.pooled import Layers, finish
from batchinfer.engine.refusal import refusal
from batchinfer.models.encoder import Encoder, EncoderInput
from batchinfer.models.tokenizer import Tokenizer
from batchinfer.ops.accelerator import Accelerator
from batchinfer.types import Completion, EngineStats, PoolSpec, Request, Sample


class EncoderEngine:
    """What a job wants of an engine (loop.py). A text is never cut: one that is longer than ``max_step_tokens`` has a
    step of its own. Not thread-safe."""

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: Tokenizer,
        pool: PoolSpec,
        *,
        max_len: int,
        max_slots: int,
        max_step_tokens: int,
        weight_bytes: int = 0,
        dense: Layers = (),
    ):
        self.tokenizer = tokenizer
        self.vocab_size = encoder.spec.vocab_size
        self.max_seq_len = max_len + 1  # as if a token came after the text
        self.max_slots = max_slots
        self.kv_tokens = max_slots * max_len
        self.flat_steps = True
        self._dense = dense
        self._encoder, self._pool, self._max_step_tokens = encoder, pool, max_step_tokens
        self._waiting: deque[Request] = deque()
        self._refused: list[Completion] = []
        self._stats = EngineStats(weight_bytes=weight_bytes)

    @property
    def num_open(self) -> int:
        """Requests added and not yet returned."""
        return len(self._waiting) + len(self._refused)

    @property
    def wants_more(self) -> bool:
        """Whether another request would help to fill the next steps."""
        return self.num_open < 2 * self.max_slots

    @property
    def num_running(self) -> int:
        """Requests in the next step."""
        return min(self.num_open, self.max_slots)

    def tokens_left(self) -> np.ndarray:
        """See expected_tokens: int64 [num_open]."""
        return np.ones(self.num_open, np.int64)

    def limit_prompts(self, step_tokens: int) -> None:
        """Nothing: a step has prompts and nothing else."""

    def forget_prefixes(self) -> None:
        """Nothing: texts are whole, and none is kept."""

    def expected_tokens(self, request: Request) -> int:
        """As if each text had one new token."""
        return 1

    def add(self, request: Request) -> None:
        """Take a request. One that can't run comes back from the next :meth:`step` as a Completion with an error."""
        error = refusal(request, self.max_seq_len, self.vocab_size)
        if error is None:
            self._waiting.append(request)
            self._stats.prompt_tokens += len(request.prompt)
            self._stats.needed_prompt_tokens += len(request.prompt)
        else:
            self._refused.append(Completion(request.id, len(request.prompt), error=error))

    def step(self) -> list[Completion]:
        """Compute the next texts, in the order in which they came; [] at once when nothing is open."""
        done, self._refused = self._refused, []
        batch = self._next_batch()
        if not batch:
            return done
        begin = time.perf_counter()
        values = self._encoder.pool(self._input(batch), self._pool.pooling).cpu().numpy()
        self._count(batch, time.perf_counter() - begin)
        none = np.zeros(0, np.int32)
        for request, row in zip(batch, values, strict=True):
            sample = Sample(none, "", "pooled", vector=finish(row, self._pool, self._dense))
            done.append(Completion(request.id, len(request.prompt), (sample,)))
        return done

    def abandon(self, request_id: int) -> Completion:
        """Drop a request that waits. KeyError if it does not."""
        for request in self._waiting:
            if request.id == request_id:
                self._waiting.remove(request)
                return Completion(request_id, len(request.prompt))
        raise KeyError(request_id)

    def unfinished(self) -> list[Completion]:
        """Nothing is ever half done."""
        return []

    def stats(self) -> EngineStats:
        """Counters so far."""
        self._stats.waiting = len(self._waiting)
        self._stats.step_seconds = {"forward": self._stats.prefill.seconds}
        device = self._encoder.ops.device
        self._stats.device_bytes = 0 if device.type == "cpu" else Accelerator(device).peak_bytes()
        return self._stats

    def close(self) -> None:
        """Drop what is open."""
        self._waiting.clear()

    def _next_batch(self) -> list[Request]:
        batch: list[Request] = []
        room = self._max_step_tokens
        while self._waiting and len(batch) < self.max_slots:
            if batch and len(self._waiting[0].prompt) > room:
                break
            batch.append(self._waiting.popleft())
            room -= len(batch[-1].prompt)
        return batch

    def _input(self, batch: list[Request]) -> EncoderInput:
        spec = self._encoder.spec
        lengths = [len(request.prompt) for request in batch]
        types = [
            np.arange(n) >= (n if r.second_from is None else r.second_from) for n, r in zip(lengths, batch, strict=True)
        ]
        arrays = (
            np.concatenate([request.prompt for request in batch]),
            np.concatenate([np.arange(n) for n in lengths]) + spec.position_offset,
            np.minimum(np.concatenate(types), spec.type_rows - 1),
        )
        device = self._encoder.ops.device
        tensors = (torch.from_numpy(array.astype(np.int32)).to(device) for array in arrays)
        return EncoderInput(*tensors, starts=[0, *np.cumsum(lengths).tolist()])

    def _count(self, batch: list[Request], seconds: float) -> None:
        lengths = np.array([len(request.prompt) for request in batch], np.int64)
        work = self._stats.prefill
        self._stats.steps += 1
        work.steps += 1
        work.seconds += seconds
        work.tokens += int(lengths.sum())
        work.pairs += int((lengths * lengths).sum())
