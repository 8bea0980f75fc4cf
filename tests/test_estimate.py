"""The estimate of a job's cost: where the sample comes from, and what is made of it."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from engine.tiny_engine import SPEC as TINY
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from test_job import configure

from batchinfer.config import EngineConfig
from batchinfer.data.plan import make_plan
from batchinfer.data.tables import list_inputs
from batchinfer.estimate import PLACES, Sample, describe, describe_order, draw, places, seconds_of, stretch
from batchinfer.types import Chunk, Request, SamplingParams


@given(chunks=st.integers(1, 300), rows=st.integers(1, 50), count=st.integers(1, 400))
def test_a_sample_is_spread_over_the_job_and_no_larger_than_it(chunks: int, rows: int, count: int) -> None:
    job = [Chunk(index=i, file=0, start=i * rows, rows=rows) for i in range(chunks)]
    drawn = places(job, count)
    indices = [chunk.index for chunk in drawn]
    assert len(set(indices)) == len(drawn) == min(PLACES, chunks)
    assert max(b - a for a, b in zip([0, *indices], [*indices, chunks], strict=True)) <= -(-chunks // len(drawn)) + 1
    assert sum(chunk.rows for chunk in drawn) >= min(count, len(drawn) * rows)
    assert all(chunk.rows <= -(-count // len(drawn)) for chunk in drawn)
    assert all(chunk.start == job[chunk.index].start for chunk in drawn)


@given(chunks=st.integers(1, 60), rows=st.integers(1, 50), count=st.integers(1, 400))
def test_a_stretch_is_one_piece(chunks: int, rows: int, count: int) -> None:
    job = [Chunk(index=i, file=0, start=i * rows, rows=rows) for i in range(chunks)]
    drawn = stretch(job, count)
    assert sum(chunk.rows for chunk in drawn) == min(count, chunks * rows)
    for before, after in pairwise(drawn):
        assert after.start == before.start + before.rows == before.start + rows
    assert all(chunk.start == job[chunk.index].start for chunk in drawn)


@pytest.mark.feature("commands", "plan: what the order of the rows will save, from a simulation")
def test_what_the_order_saves(tmp_path: Path) -> None:
    """32 groups of eight rows, one row of each after the other: of eight beginnings seven need not be computed."""
    begins = np.random.default_rng(0).integers(0, 50, (32, 160))
    requests = [Request(i, np.append(begins[i % 32], i).astype(np.int32), SamplingParams()) for i in range(256)]
    spec = dataclasses.replace(TINY, max_positions=1024)
    config = configure(tmp_path / "in", tmp_path / "out", engine__num_pages=60, engine__max_slots=16)
    (line,) = describe_order(config, requests, spec)
    assert re.match(r"order +8[4-7]% fewer prompt tokens and \d+% fewer steps than as they come", line)
    assert line.endswith("(simulated: 256 rows, KV cache of 960 tokens)")
    assert describe_order(dataclasses.replace(config, engine=EngineConfig(reorder=False)), requests, spec) == []
    assert describe_order(config, [], spec) == []
    scored = [dataclasses.replace(request, scored_from=150) for request in requests]
    assert "fewer prompt tokens" in describe_order(config, scored, spec)[0]


@pytest.mark.feature("commands", "plan: tokens, errors, inodes and, with --time, hours, from a sample of the rows")
def test_tokens_errors_files_and_time_of_a_job(tmp_path: Path) -> None:
    prompts = [None if i % 10 == 3 else "x" * (10 + 10 * (i % 2)) for i in range(1000)]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in.parquet")
    config = configure(tmp_path / "in.parquet", tmp_path / "out", output__rows_per_chunk=20, sampling__n=2)
    files = list_inputs(config.input.path)
    plan = make_plan(files, 20, {})
    engine = FakeEngine()
    sample = draw(config, files, plan, engine.tokenizer, 100, places(plan.chunks, 200))
    assert sample.drawn == 200
    assert sample.errors == {"NULL_PROMPT": 20}
    assert not (tmp_path / "out").exists()
    ticks = iter([100.0, 136.0])
    seconds = seconds_of(engine, sample.requests, clock=lambda: next(ticks))
    assert engine.added == 180
    sizes = sum(len(r.prompt) for r in sample.requests)
    lines = dict(line.split(maxsplit=1) for line in describe(sample, config, len(plan.chunks), seconds))
    assert f"200 rows; prompts of {sizes / 180:,.0f} tokens" in lines["sample"]
    assert "errors: NULL_PROMPT 20" in lines["sample"]
    assert lines["tokens"] == f"about {5 * sizes / 1000:.3g} k prompt, at most 28.8 k output (sampling.max_tokens)"
    assert lines["inodes"] == "58"
    assert lines["time"] == "0.05 hours of one process like this one (5.00 rows/s in the sample)"


def test_a_sample_without_a_single_good_row(tmp_path: Path) -> None:
    config = configure(tmp_path / "in.parquet", tmp_path / "out")
    lines = describe(Sample(5000, (), Counter(NULL_PROMPT=200)), config, 5, seconds=1.0)
    assert "about 0 prompt, at most 0 output" in lines[1]
    assert len(lines) == 3
