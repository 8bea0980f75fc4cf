"""What a job will cost, from a sample of its rows: tokens, errors, files; with an engine at hand also node-hours."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchinfer.config import Config
from batchinfer.data.columns import used_columns
from batchinfer.data.plan import Plan
from batchinfer.data.prompts import PromptBuilder
from batchinfer.data.reader import ChunkReader
from batchinfer.data.tables import InputFile, input_schema
from batchinfer.feed import Engine, steps
from batchinfer.types import Chunk, Request

if TYPE_CHECKING:
    from batchinfer.models.tokenizer import Tokenizer

PLACES = 20
"""The sample is taken in so many places spread over the job: inputs are often sorted."""

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


def draw(
    config: Config, files: Sequence[InputFile], plan: Plan, tokenizer: Tokenizer, max_seq_len: int, count: int
) -> Sample:
    """About ``count`` of the job's rows as they would go into the engine. JobError as a run would raise."""
    builder = PromptBuilder(config.input, config.sampling, tokenizer, max_seq_len, run_seed=config.sampling.seed)
    requests: list[Request] = []
    errors: Counter[str] = Counter()
    with ChunkReader(files, used_columns(config.input, input_schema(list(files)))) as reader:
        for chunk in places(plan.chunks, count):
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


def describe(sample: Sample, config: Config, chunks: int, seconds: float | None = None) -> list[str]:
    """Lines for a person. ``seconds``: what the sample's requests took on this process's device."""
    mean, longest = sample.prompt_tokens()
    most = sample.scaled(sum(r.sampling.max_tokens * r.sampling.n for r in sample.requests))
    prompt = sample.scaled(mean * len(sample.requests))
    errors = ", ".join(f"{code} {count}" for code, count in sorted(sample.errors.items())) or "none"
    lines = [
        f"sample     {sample.drawn:,} rows; prompts of {mean:,.0f} tokens, {longest:,} at most; errors: {errors}",
        f"tokens     about {_short(prompt)} prompt, at most {_short(most)} output (sampling.max_tokens)",
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
