"""The engine on a device that computes nothing: what an order of the requests is worth, known before a weight is read.

Scheduler, prefix cache, admission and length prediction are the real ones. Only the tokens are not: a sample goes on
for as long as it is told, and then stops.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from batchinfer._engine import Scheduler, Step
from batchinfer.engine.engine import Engine
from batchinfer.engine.lengths import LengthPredictor
from batchinfer.engine.no_text import NoText
from batchinfer.engine.runner import StepOutput
from batchinfer.engine.seeds import sample_seed
from batchinfer.engine.slots import BadWords, Rows, SlotTable
from batchinfer.ops import SampleOutput
from batchinfer.types import Completion, EngineStats, Request, SamplingParams

TOKEN, END = 0, 1
"""All that is ever sampled: a token, and the one that stops a sample."""

Feed = Callable[[Engine, Sequence[Request]], list[Completion]]


@dataclass(frozen=True)
class Pool:
    """The sizes that decide how an engine schedules: the fields of EngineConfig, and the longest sequence."""

    num_pages: int
    page_size: int
    max_slots: int
    max_step_tokens: int
    max_seq_len: int
    prefix_cache: bool = True


@dataclass(frozen=True)
class Simulated:
    """What the engine computed. ``prompt_tokens`` were computed before a sample's next token, those that preemption
    threw away again; the rest of ``tokens`` are decoded ones. ``context``: positions read, as in StepWork."""

    steps: int
    tokens: int
    prompt_tokens: int
    context: int
    preemptions: int
    widths: np.ndarray  # sequences of each step, int32 [steps]

    def seconds(self, step: float, token: float, position: float) -> float:
        """On a device that takes so long for a step as such, for a token, and to read a position of the cache."""
        return self.steps * step + self.tokens * token + self.context * position


class _Lengths(SlotTable):
    """Knows of each slot how long its sample is to be, by the sample's seed."""

    def __init__(self, max_slots: int, lengths: dict[int, int]):
        super().__init__(max_slots, vocab_size=END + 1)
        self._lengths = lengths
        self.length = np.zeros(max_slots, np.int64)

    def assign(
        self, slot: int, params: SamplingParams, seed: int, stop_ids: np.ndarray, bad_words: BadWords = ()
    ) -> None:
        self.length[slot] = self._lengths[seed]


class SimulatedRunner:
    """A runner (engine/runner.py) that counts what it is given."""

    ahead = 0

    def __init__(self, max_slots: int, lengths: dict[int, int]):
        self.slots = _Lengths(max_slots, lengths)
        self.seconds: dict[str, float] = {}
        self.prompt_tokens = 0
        self.widths: list[int] = []
        self._done: deque[StepOutput] = deque()

    def start(self, step: Step, rows: Rows) -> None:
        ends = step.sample_count + 1 >= self.slots.length[step.sample_slot]
        tokens = torch.from_numpy(np.where(ends, END, TOKEN).astype(np.int32))
        now = time.perf_counter()
        self._done.append(StepOutput(SampleOutput(tokens), begin=now, end=now))
        self.prompt_tokens += step.num_tokens - step.num_decode
        self.widths.append(step.num_seqs)

    def sample(self) -> None:
        """Nothing waits."""

    def finish(self) -> StepOutput:
        return self._done.popleft()

    def peak_device_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self._done.clear()


def simulate(requests: Sequence[Request], lengths: np.ndarray, pool: Pool, feed: Feed) -> Simulated:
    """Run requests whose samples get ``lengths`` (int64 [N], at most max_tokens) tokens each. ``feed`` gives them to
    the engine and takes what comes out until all have; it is there that one order differs from another."""
    # No two samples have the same seed: the number of the request, and then of the sample, are hashed one to one.
    seeded = [replace(request, seed=number) for number, request in enumerate(requests)]
    of_seed = {
        sample_seed(r.seed, i): int(n) for r, n in zip(seeded, lengths, strict=True) for i in range(r.sampling.samples)
    }
    scheduler = Scheduler(**vars(pool))
    runner = SimulatedRunner(pool.max_slots, of_seed)
    engine = Engine(
        scheduler,
        runner,  # type: ignore[arg-type]
        NoText(eos_ids=(END,)),  # type: ignore[arg-type]
        LengthPredictor(),
        max_seq_len=pool.max_seq_len,
        max_slots=pool.max_slots,
        num_pages=pool.num_pages,
        page_size=pool.page_size,
        vocab_size=2**31,
    )
    done = feed(engine, seeded)
    if len(done) < len(requests) or any(completion.error for completion in done):
        raise ValueError(f"{len(requests)} requests went in, and not all of them could run: see Engine.add")
    stats: EngineStats = engine.stats()
    work = (stats.prefill, stats.decode)
    return Simulated(
        steps=stats.steps,
        tokens=sum(w.tokens for w in work),
        prompt_tokens=runner.prompt_tokens,
        context=sum(w.context for w in work),
        preemptions=stats.preemptions,
        widths=np.array(runner.widths, np.int32),
    )
