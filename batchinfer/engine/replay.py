"""Steps of few tokens on the CPU: recorded once for each shape, then repeated without Python between their ops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from batchinfer.models.decoder import Decoder, KVCache, Plans, Scores, StepInput
from batchinfer.ops.native import NativeOps

MOST_TOKENS = 64
"""Of a step that is recorded: an op of more takes far longer than Python between two of them."""

MOST_PROGRAMS = 64
"""Kept, about 50 kB each: the latest."""


@dataclass(frozen=True)
class Recorded:
    """A program of the ops, what it reads of a step, and where its logits are."""

    program: Any
    step: StepInput
    plans: Plans
    logits: Tensor


class Replay:
    """``Decoder.forward`` over one cache."""

    def __init__(self, decoder: Decoder, cache: KVCache):
        self._decoder, self._cache = decoder, cache
        # A mixture gathers the rows of its experts outside the program, an adapter its own; so are copies and sinks.
        spec = decoder.spec
        outside = spec.experts is not None or spec.latent is not None or spec.sinks or decoder.adapted
        self._able = isinstance(decoder.ops, NativeOps) and not outside
        self._programs: dict[tuple[int, int], Recorded] = {}

    def forward(self, step: StepInput) -> tuple[Tensor, Scores | None]:
        tokens, samples = shape = len(step.token_ids), len(step.sample_row)
        if not (self._able and samples and tokens <= MOST_TOKENS and step.score is None):
            return self._decoder.forward(step, self._cache)
        recorded = self._programs.pop(shape, None)
        if recorded is None:
            recorded = self._record(step)
        else:
            self._repeat(recorded, step)
        self._programs[shape] = recorded
        if len(self._programs) > MOST_PROGRAMS:
            del self._programs[next(iter(self._programs))]
        return recorded.logits, None

    def _record(self, step: StepInput) -> Recorded:
        own = replace(
            step,
            token_ids=step.token_ids.clone(),
            positions=step.positions.clone(),
            kv_index=step.kv_index.clone(),
            sample_row=step.sample_row.clone(),
        )
        plans = self._decoder.plans(step, self._cache)
        with self._decoder.ops.recording() as program:
            logits, _ = self._decoder.forward(own, self._cache, plans)
        return Recorded(program, own, plans, logits)

    def _repeat(self, recorded: Recorded, step: StepInput) -> None:
        for name in ("token_ids", "positions", "kv_index", "sample_row"):
            getattr(recorded.step, name).copy_(getattr(step, name))
        ops, heads = self._decoder.ops, self._decoder.spec.heads
        for window, plan in recorded.plans.items():
            ops.plan_attention(step.attention, heads, self._cache.k[0], window, again=plan)
        ops.replay(recorded.program)
