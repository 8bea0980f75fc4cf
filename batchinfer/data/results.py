"""Completions -> output table: the passed-through columns of the input, then the generated ones.

The schema follows from the configuration alone, never from the data, so that all parts of a job have the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from batchinfer.types import Completion, ExitCode, JobError, Logprobs, PoolSpec, Sample, SamplingParams

if TYPE_CHECKING:
    from batchinfer.config import InputConfig, OutputConfig

MAX_ERROR_BYTES = 1000

LOGPROBS = pa.struct(
    [
        ("chosen", pa.list_(pa.float32())),
        ("top_ids", pa.list_(pa.list_(pa.int32()))),
        ("top", pa.list_(pa.list_(pa.float32()))),
    ]
)
"""Per sample: the chosen token's log-probability for each token, and the alternatives, most likely first."""


@dataclass(frozen=True)
class ResultOptions:
    """What the output holds. ``columns`` None passes all input columns through. ``many``: rows may have several
    samples, so what belongs to a sample is a list column, in sample order, in every row. ``scored``: rows have the
    log-probability of a continuation that was given. ``reasoning``: thoughts are apart from the text. ``pool``: rows
    have what is made of a vector for the ``task``."""

    columns: tuple[str, ...] | None = None
    prefix: str = ""
    token_ids: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    reasoning: bool = False
    many: bool = False
    scored: bool = False
    task: str = "generate"
    pool: PoolSpec | None = None

    @staticmethod
    def of(
        input: InputConfig,
        output: OutputConfig,
        sampling: SamplingParams,
        task: str = "generate",
        pool: PoolSpec | None = None,
    ) -> ResultOptions:
        overridden = input.sampling_columns
        return ResultOptions(
            columns=None if input.columns is None else tuple(dict.fromkeys(input.columns)),
            prefix=output.prefix,
            token_ids=output.token_ids,
            logprobs=sampling.logprobs is not None or "logprobs" in overridden,
            prompt_logprobs=sampling.prompt_logprobs is not None or "prompt_logprobs" in overridden,
            reasoning=output.reasoning != "off",
            many=sampling.n > 1 or "n" in overridden,
            scored=input.continuation_column is not None,
            task=task,
            pool=pool,
        )


@dataclass(frozen=True)
class Column:
    """A generated column: its type, and its value for one completion."""

    name: str
    type: pa.DataType
    value: Callable[[Completion], Any]


STATUS = [
    Column("status", pa.string(), lambda c: "error" if c.error else "ok"),
    Column("error_code", pa.string(), lambda c: c.error and c.error.code.value),
    Column("error", pa.string(), lambda c: c.error and _shortened(c.error.message)),
]


def _vector_columns(task: str, pool: PoolSpec) -> list[Column]:
    """``label`` is the name of the largest of ``scores``; ``relevance`` the first value of a reranker's vector."""

    def of(value: Callable[[np.ndarray], Any]) -> Callable[[Completion], Any]:
        return lambda c: value(c.samples[0].vector) if c.samples and c.samples[0].vector is not None else None

    made = {
        "embed": [Column("embedding", pa.list_(pa.float32(), pool.width), of(lambda v: v))],
        "classify": [
            Column("label", pa.string(), of(lambda v: pool.labels[int(v.argmax())])),
            Column("scores", pa.list_(pa.float32()), of(lambda v: v)),
        ],
        "rerank": [Column("relevance", pa.float32(), of(lambda v: float(v[0])))],
    }
    return [*made[task], Column("prompt_tokens", pa.int32(), lambda c: c.prompt_tokens), *STATUS]


def _score_columns(token_ids: bool) -> list[Column]:
    """``logprob`` is the natural logarithm of the continuation's probability, ``perplexity`` exp(-logprob / tokens);
    ``is_greedy``: greedy decoding of the prompt would give it."""

    def of(value: Callable[[Sample, Logprobs], Any]) -> Callable[[Completion], Any]:
        return lambda c: value(c.samples[0], c.samples[0].logprobs) if c.samples and c.samples[0].logprobs else None

    def mean(logprobs: Logprobs) -> float:
        return float(logprobs.chosen.mean(dtype=np.float64))

    columns = [
        Column("logprob", pa.float64(), of(lambda s, p: float(p.chosen.sum(dtype=np.float64)))),
        Column("perplexity", pa.float64(), of(lambda s, p: math.exp(min(700.0, -mean(p))))),
        Column("is_greedy", pa.bool_(), of(lambda s, p: bool((p.top_ids[:, 0] == s.token_ids).all()))),
        Column("prompt_tokens", pa.int32(), lambda c: c.prompt_tokens),
        Column("completion_tokens", pa.int32(), of(lambda s, p: len(s.token_ids))),
    ]
    if token_ids:
        columns.append(Column("token_ids", pa.list_(pa.int32()), of(lambda s, p: s.token_ids)))
        columns.append(Column("token_logprobs", pa.list_(pa.float32()), of(lambda s, p: p.chosen)))
    return columns + STATUS


def generated_columns(options: ResultOptions) -> list[Column]:
    """What the job adds to a row, in the order of the output. Without samples (an error), everything that belongs to a
    sample is null; ``prompt_tokens`` is then 0 unless the prompt was tokenised."""

    def of_sample(name: str, kind: pa.DataType, value: Callable[[Sample], Any]) -> Column:
        if options.many:
            return Column(name, pa.list_(kind), lambda c: [value(s) for s in c.samples] or None)
        return Column(name, kind, lambda c: value(c.samples[0]) if c.samples else None)

    if options.scored or options.pool is not None:
        special = _vector_columns(options.task, options.pool) if options.pool else _score_columns(options.token_ids)
        return [replace(column, name=options.prefix + column.name) for column in special]
    columns = [
        of_sample("generated_text", pa.string(), lambda s: s.text),
        *([of_sample("reasoning", pa.string(), lambda s: s.reasoning)] if options.reasoning else []),
        of_sample("finish_reason", pa.string(), lambda s: s.finish_reason or None),
        Column("prompt_tokens", pa.int32(), lambda c: c.prompt_tokens),
        of_sample("completion_tokens", pa.int32(), lambda s: len(s.token_ids)),
    ]
    if options.token_ids:
        columns.append(of_sample("token_ids", pa.list_(pa.int32()), lambda s: s.token_ids))
    if options.logprobs:
        columns.append(of_sample("logprobs", LOGPROBS, lambda s: logprobs_value(s.logprobs)))
    if options.prompt_logprobs:
        columns.append(Column("prompt_logprobs", LOGPROBS, lambda c: logprobs_value(c.prompt_logprobs)))
    columns += STATUS
    return [replace(column, name=options.prefix + column.name) for column in columns]


def result_schema(source: pa.Schema, options: ResultOptions) -> pa.Schema:
    """The schema of every part, for a ``source`` that has at least the passed-through columns.

    JobError(64) if a generated column would have the name of a passed-through one.
    """
    passed = _passed(source, options)
    generated = generated_columns(options)
    for column in generated:
        if column.name in passed:
            raise JobError(
                f"the input has a column {column.name!r}, and so has the output: set output.prefix (for example "
                "output.prefix=model_), or leave the column out with input.columns=[...]",
                ExitCode.USAGE,
            )
    return pa.schema([source.field(name) for name in passed] + [pa.field(c.name, c.type) for c in generated])


def result_table(source: pa.Table, completions: Sequence[Completion], options: ResultOptions) -> pa.Table:
    """One row per row of ``source``; ``completions`` are in the same order."""
    if source.num_rows != len(completions):
        raise ValueError(f"{len(completions)} completions for {source.num_rows} rows")
    passed = [source[name] for name in _passed(source.schema, options)]
    made = [pa.array([column.value(c) for c in completions], column.type) for column in generated_columns(options)]
    return pa.table([*passed, *made], schema=result_schema(source.schema, options))


def count_results(completions: Sequence[Completion]) -> dict[str, int]:
    """Sums for one part: rows by status and by error code ("error:NULL_PROMPT"), and tokens."""
    counts = Counter(ok=0, error=0, prompt_tokens=0, completion_tokens=0)
    for completion in completions:
        counts["error" if completion.error else "ok"] += 1
        if completion.error:
            counts[f"error:{completion.error.code.value}"] += 1
        counts["prompt_tokens"] += completion.prompt_tokens
        counts["completion_tokens"] += sum(len(sample.token_ids) for sample in completion.samples)
    return dict(counts)


def _passed(source: pa.Schema, options: ResultOptions) -> list[str]:
    return list(source.names if options.columns is None else options.columns)


def logprobs_value(logprobs: Logprobs | None) -> dict[str, Any] | None:
    """As a value of the type :data:`LOGPROBS`."""
    if logprobs is None:
        return None
    return {"chosen": logprobs.chosen, "top_ids": list(logprobs.top_ids), "top": list(logprobs.top)}


def _shortened(message: str) -> str:
    """At most MAX_ERROR_BYTES of UTF-8, cut between characters."""
    return message.encode("utf-8", "replace")[:MAX_ERROR_BYTES].decode("utf-8", "ignore")
