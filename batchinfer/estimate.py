"""What a job will cost, from a sample of its rows: tokens, errors, files; with an engine at hand also node-hours."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from batchinfer.config import VECTOR_TASKS, Config
from batchinfer.data.columns import used_columns
from batchinfer.data.plan import Plan
from batchinfer.data.prompts import PromptBuilder
from batchinfer.data.reader import ChunkReader
from batchinfer.data.tables import InputFile, input_schema
from batchinfer.feed import Engine, steps
from batchinfer.types import Chunk, Request, SamplingParams

if TYPE_CHECKING:
    from batchinfer.engine.simulate import Simulated
    from batchinfer.models.spec import ModelSpec
    from batchinfer.models.tokenizer import Tokenizer

PLACES = 20
"""The sample is taken in so many places spread over the job: inputs are often sorted."""

STRETCH = 2048
"""Rows in a row for the simulated order: what a rank has in hand at a time, with chunks of the default size."""

SIMULATED_TOKENS = 256
"""New tokens of a simulated row at most: nobody knows how many it will be, and a simulated step takes 0.1 ms."""

STATE_FILES = 8
"""Inodes of a job beside its parts: folders, plan, _SUCCESS, two records of an attempt. Temporary files come and go."""


@dataclass(frozen=True)
class Sample:
    """Rows drawn from a job of ``rows`` rows. ``requests`` can be computed, ``errors`` can't (by code)."""

    rows: int
    requests: tuple[Request, ...]
    errors: Counter[str]

    @property
    def drawn(self) -> int:
        return len(self.requests) + self.errors.total()

    def prompt_tokens(self) -> tuple[float, int]:
        """(mean, longest) of the rows that can be computed; (0, 0) if none can."""
        lengths = [len(request.prompt) for request in self.requests]
        return (sum(lengths) / len(lengths), max(lengths)) if lengths else (0.0, 0)

    def scaled(self, amount: float) -> float:
        """What is ``amount`` in the sample, in the whole job."""
        return amount * self.rows / max(1, self.drawn)


def places(chunks: Sequence[Chunk], count: int) -> list[Chunk]:
    """Pieces of about ``count`` rows in all, from the starts of up to PLACES chunks that are spread evenly."""
    chosen = [chunks[i * len(chunks) // min(PLACES, len(chunks))] for i in range(min(PLACES, len(chunks)))]
    each = -(-count // len(chosen))
    return [dataclasses.replace(chunk, rows=min(chunk.rows, each)) for chunk in chosen]


def stretch(chunks: Sequence[Chunk], count: int) -> list[Chunk]:
    """``count`` consecutive rows from the middle of the job, or all there are."""
    first = len(chunks) // 2
    rows = sum(chunk.rows for chunk in chunks[first:])
    while first and rows < count:
        first -= 1
        rows += chunks[first].rows
    chosen: list[Chunk] = []
    for chunk in chunks[first:]:
        if count > 0:
            chosen.append(dataclasses.replace(chunk, rows=min(chunk.rows, count)))
        count -= chunk.rows
    return chosen


def draw(
    config: Config,
    files: Sequence[InputFile],
    plan: Plan,
    tokenizer: Tokenizer,
    max_seq_len: int,
    pieces: Sequence[Chunk],
) -> Sample:
    """The job's rows in ``pieces`` as they would go into the engine. JobError as a run would raise."""
    builder = PromptBuilder.of(config, tokenizer, max_seq_len)
    requests: list[Request] = []
    errors: Counter[str] = Counter()
    with ChunkReader(files, used_columns(config.input, input_schema(list(files)))) as reader:
        for chunk in pieces:
            for row in builder.build(reader.read(chunk), chunk):
                if isinstance(row, Request):
                    requests.append(row)
                elif row.error:
                    errors[row.error.code.value] += 1
    return Sample(plan.rows, tuple(requests), errors)


def seconds_of(engine: Engine, requests: Sequence[Request], clock: Callable[[], float] = time.perf_counter) -> float:
    """Run the requests to their ends. The time includes the engine's slow beginning and end with a batch that is not
    full, so that a job of many more rows takes rather less than the sample tells."""
    start = clock()
    for _ in steps(engine, requests):
        pass
    return clock() - start


def describe_order(config: Config, requests: Sequence[Request], spec: ModelSpec) -> list[str]:
    """A line on what the planner's order saves of these requests, told by a simulation of the engine with the KV cache
    that the configuration gives it on a CPU. No line where there is no compiled engine, or no order to tell of."""
    if not requests or not config.engine.reorder or importlib.util.find_spec("batchinfer._engine") is None:
        return []
    from batchinfer.engine.kv_dtype import kv_dtype
    from batchinfer.engine.memory import HOST_LIMIT, num_pages
    from batchinfer.engine.simulate import Pool, simulate
    from batchinfer.models.decoder import KVCache

    engine, longest = config.engine, spec.resolve_length(config.engine.max_model_len)
    page_bytes = KVCache.bytes_per_page(spec, engine.page_size, kv_dtype(engine))
    pages = engine.num_pages or num_pages(
        page_bytes, engine.page_size, engine.max_slots, longest, asked_gb=engine.kv_cache_gb, budget=HOST_LIMIT
    )
    pool = Pool(pages, engine.page_size, engine.max_slots, engine.max_step_tokens, longest, engine.prefix_cache)
    room = pages * engine.page_size - SIMULATED_TOKENS
    short = [
        # Of a scored row the whole text is computed, and next to nothing more.
        dataclasses.replace(r, sampling=SamplingParams(max_tokens=_simulated_tokens(r)), scored_from=None)
        for r in requests
        if len(r.prompt) <= room
    ]
    lengths = np.array([min(r.sampling.max_tokens, longest - len(r.prompt)) for r in short])

    def run(reorder: bool) -> Simulated:
        return simulate(short, lengths, pool, lambda e, rs: [c for step in steps(e, rs, reorder) for c in step])

    came, planned = run(False), run(True)
    saved = [1 - getattr(planned, what) / max(1, getattr(came, what)) for what in ("prompt_tokens", "steps")]
    return [
        f"order      {saved[0]:.0%} fewer prompt tokens and {saved[1]:.0%} fewer steps than as they come (simulated: "
        f"{len(short):,} rows, KV cache of {_short(pages * engine.page_size)} tokens)"
    ]


def _simulated_tokens(request: Request) -> int:
    return 1 if request.scored_from is not None else min(request.sampling.max_tokens, SIMULATED_TOKENS)


def describe(sample: Sample, config: Config, chunks: int, seconds: float | None = None) -> list[str]:
    """Lines for a person. ``seconds``: what the sample's requests took on this process's device."""
    mean, longest = sample.prompt_tokens()
    most = sample.scaled(sum(r.sampling.max_tokens * r.sampling.samples for r in sample.requests))
    prompt = sample.scaled(mean * len(sample.requests))
    errors = ", ".join(f"{code} {count}" for code, count in sorted(sample.errors.items())) or "none"
    answers = "" if config.task.name in VECTOR_TASKS else f", at most {_short(most)} output (sampling.max_tokens)"
    lines = [
        f"sample     {sample.drawn:,} rows; prompts of {mean:,.0f} tokens, {longest:,} at most; errors: {errors}",
        f"tokens     about {_short(prompt)} prompt{answers}",
        f"inodes     {chunks + STATE_FILES:,}",
    ]
    if seconds is not None and sample.requests:
        rate = len(sample.requests) / seconds
        hours = sample.scaled(len(sample.requests)) / rate / 3600
        lines.append(f"time       {hours:,.2f} hours of one process like this one ({rate:,.2f} rows/s in the sample)")
    return lines


def _short(number: float) -> str:
    """1234567 as 1.23 M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.0f}"
