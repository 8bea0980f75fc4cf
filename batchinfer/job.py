"""One rank's job: chunks -> rows -> requests -> engine -> completions -> parts.

Rank 0 plans and hands out chunks; every rank, rank 0 too, computes and commits. The same command again finds the parts
that are there and computes the rest.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from batchinfer import __version__
from batchinfer.cluster.dispatch import Dispatcher, RootDispatcher, WorkerDispatcher
from batchinfer.cluster.world import POLL_SECONDS, World, cpu_share
from batchinfer.config import Config, EngineConfig, ModelConfig, to_dict
from batchinfer.data.columns import check_input, prompt_source, used_columns
from batchinfer.data.ledger import STATE, Ledger, open_job
from batchinfer.data.plan import Plan, make_plan
from batchinfer.data.prompts import PromptBuilder
from batchinfer.data.reader import ChunkReader
from batchinfer.data.results import ResultOptions, count_results, result_schema, result_table
from batchinfer.data.tables import InputFile, input_schema, list_inputs
from batchinfer.data.template import template_text
from batchinfer.pipeline import Feeder, OpenChunk, Writer
from batchinfer.report import Counters, Meter, Progress, summary, total, write_record
from batchinfer.types import Chunk, Completion, EngineStats, ExitCode, Request

LOOK_AHEAD = 2
"""Chunks read and not yet handed to the engine, the one being handed out included."""


class Engine(Protocol):
    """The engine half, as a job sees it (engine/engine.py)."""

    tokenizer: Any
    max_seq_len: int

    @property
    def num_open(self) -> int: ...

    @property
    def wants_more(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def step(self) -> list[Completion]: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


class EngineLoader(Protocol):
    def __call__(self, model: ModelConfig, engine: EngineConfig, *, threads: int, ranks_on_node: int) -> Engine: ...


@dataclass(frozen=True)
class Opening:
    """What rank 0 found out, sent to every rank. ``success`` is what _SUCCESS says, if the job is complete already."""

    attempt: str
    path: str
    plan: Plan
    columns: list[str]
    missing: list[Chunk]
    success: dict[str, Any] | None


def load_engine(model: ModelConfig, engine: EngineConfig, *, threads: int, ranks_on_node: int) -> Engine:
    """The real engine; torch is imported here and not before."""
    from batchinfer.engine.loading import load_engine as load

    return load(model, engine, threads=threads, ranks_on_node=ranks_on_node)


def identify(model_path: str) -> dict[str, str]:
    """Digests of everything in the model's files that decides the results."""
    from batchinfer.models.identity import model_fingerprint

    return model_fingerprint(model_path)


def run(
    config: Config,
    world: World,
    load_engine: EngineLoader = load_engine,
    identify: Callable[[str], dict[str, str]] = identify,
) -> int:
    """Do this rank's part of the job. Returns its exit code, the same on every rank: 0, or 3 if more rows than
    job.max_error_fraction failed. JobError for everything that ends the job."""
    opening = world.bcast(open_on_root(config, identify) if world.rank == 0 else None)
    if opening.success is not None:
        return _exit_code(opening.success["counts"], config)
    ledger = Ledger(opening.path, opening.plan, config.output.compression)
    places = world.bcast(world.gather((world.hostname, tuple(sorted(os.sched_getaffinity(0))))))
    start = ready = time.monotonic()
    counters = Counters()
    if opening.missing:
        counters, ready = _take_part(config, world, opening, ledger, places, load_engine)
    notices = world.gather(ledger.notices)
    code = None
    if world.rank == 0:
        for notice in dict.fromkeys(text for of_rank in notices for text in of_rank):
            _say(notice)
        end = time.monotonic()
        times = {"seconds": round(end - start, 3), "computing_seconds": round(end - ready, 3)}
        code = _close(config, opening, ledger, counters, times, [host for host, _ in places])
    return world.bcast(code)


def _take_part(
    config: Config,
    world: World,
    opening: Opening,
    ledger: Ledger,
    places: list[tuple[str, tuple[int, ...]]],
    load_engine: EngineLoader,
) -> tuple[Counters, float]:
    """Compute chunks until all of the job are done. On rank 0: the sum of all ranks' counters, and when (monotonic
    clock) the engine was ready."""
    dispatcher = RootDispatcher(world, opening.missing) if world.rank == 0 else WorkerDispatcher(world)
    start = ready = time.monotonic()
    if world.rank < len(opening.missing):
        threads = config.engine.threads or cpu_share(places, world.rank)
        engine = load_engine(config.model, config.engine, threads=threads, ranks_on_node=world.local_size)
        ready = time.monotonic()
        if world.rank == 0:
            hosts = len({host for host, _ in places})
            _say(f"engine ready after {ready - start:.1f} s (ranks {world.size}, hosts {hosts}, threads {threads})")
        try:
            _compute(config, world, opening, ledger, engine, dispatcher)
        finally:
            engine.close()
    while not dispatcher.finished:  # a rank for which there is no chunk
        dispatcher.poll(Counters())
        time.sleep(POLL_SECONDS)
    return total(dispatcher.reports) if world.rank == 0 else Counters(), ready


def _compute(
    config: Config, world: World, opening: Opening, ledger: Ledger, engine: Engine, dispatcher: Dispatcher
) -> None:
    """Put the stages together around the engine, and run them."""
    options = ResultOptions.of(config.input, config.output, config.sampling)
    reader = ChunkReader(opening.plan.files, opening.columns)
    builder = PromptBuilder(
        config.input, config.sampling, engine.tokenizer, engine.max_seq_len, run_seed=config.sampling.seed
    )
    provenance = {"attempt": opening.attempt, "rank": world.rank, "ranks": world.size, "model": config.model.path}

    def commit(opened: OpenChunk) -> None:
        table = result_table(opened.table, opened.completions, options)
        ledger.commit(opened.chunk, table, provenance | {"counts": count_results(opened.completions)})

    progress = _progress(config, opening) if world.rank == 0 else None
    feeder, writer = Feeder(reader.read, builder.build), Writer(commit)
    try:
        drive(engine, dispatcher, feeder, writer, lambda: progress and progress.show(dispatcher.reports))
    finally:
        if progress:
            progress.close()
        feeder.close()
        writer.close()
        reader.close()


def drive(engine: Engine, dispatcher: Dispatcher, feeder: Feeder, writer: Writer, show: Callable[[], object]) -> None:
    """The loop of a rank. The engine has rows of several chunks at a time, so that no chunk's end drains the batch."""
    meter = Meter(engine.stats)
    owners: dict[int, OpenChunk] = {}

    def settle(opened: OpenChunk, completion: Completion) -> None:
        meter.count(completion)
        if opened.settle(completion):
            writer.submit(opened)

    while not dispatcher.finished:
        dispatcher.poll(meter.report())
        if len(feeder) < LOOK_AHEAD:
            chunk = dispatcher.next_chunk(hungry=engine.wants_more and not len(feeder))
            if chunk is not None:
                feeder.open(chunk)
        while engine.wants_more and (row := feeder.next()) is not None:
            opened, item = row
            if isinstance(item, Completion):  # a row that can't be a request
                settle(opened, item)
            else:
                owners[item.id] = opened
                engine.add(item)
        idle = not engine.num_open
        for completion in engine.step():
            settle(owners.pop(completion.id), completion)
        for chunk in writer.committed():
            dispatcher.done(chunk, meter.report(fresh=True))
        show()
        if idle:
            time.sleep(POLL_SECONDS)


def open_on_root(config: Config, identify: Callable[[str], dict[str, str]]) -> Opening:
    """Look at the input, make the plan or find the one that is there, and see what is missing."""
    files = list_inputs(config.input.path)
    check_input(files, config.input)
    schema = input_schema(files)
    result_schema(schema, ResultOptions.of(config.input, config.output, config.sampling))  # refuses name collisions
    plan = make_plan(
        files,
        config.output.rows_per_chunk,
        fingerprint(config, identify(config.model.path)),
        free={"engine": dataclasses.asdict(config.engine), "batchinfer": __version__},
    )
    ledger = open_job(config.output.path, plan, config.output.compression)
    success = ledger.success()
    missing = [] if success else ledger.missing()
    for notice in ledger.notices:
        _say(notice)
    rows, rows_missing = ledger.plan.rows, sum(chunk.rows for chunk in missing)
    state = "complete, nothing to do" if success else f"{rows_missing:,} to do in {len(missing):,} chunks"
    _say(f"{rows:,} rows in {_files(files)}, {state}; output {ledger.path}")
    return Opening(
        attempt=f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.uname().nodename}-{os.getpid()}",
        path=ledger.path,
        plan=ledger.plan,
        columns=used_columns(config.input, schema),
        missing=missing,
        success=success,
    )


def fingerprint(config: Config, model: Mapping[str, str]) -> dict[str, Any]:
    """All that decides the output beside the input files: a plan with another one is another job's. Names are those of
    the configuration's keys, so that a refusal can be read."""
    source = prompt_source(config.input)
    prompt = template_text(source.name) if source.kind == "template" else source.name
    return {
        "model": dict(model),
        "input": {
            source.kind: prompt,
            "columns": config.input.columns,
            "sampling_columns": config.input.sampling_columns,
        },
        "output": {"prefix": config.output.prefix, "token_ids": config.output.token_ids},
        "sampling": to_dict(config)["sampling"],
        "engine": {"max_model_len": config.engine.max_model_len},
    }


def _close(
    config: Config,
    opening: Opening,
    ledger: Ledger,
    counters: Counters,
    times: dict[str, float],
    hosts: list[str],
) -> int:
    """Rank 0, when every chunk is committed: check, publish _SUCCESS, sum up."""
    success = ledger.finish({"attempt": opening.attempt, "ranks": len(hosts), **times})
    code = _exit_code(success["counts"], config)
    record = {
        "attempt": opening.attempt,
        "batchinfer": __version__,
        "exit_code": code,
        **times,
        "hosts": hosts,
        "this_attempt": dataclasses.asdict(counters),
        "job": success["counts"],
        "config": to_dict(config),
    }
    try:
        write_record(Path(opening.path) / STATE, opening.attempt, record)
    except OSError as error:  # the job is complete all the same
        _say(f"the record of this attempt cannot be written: {error}")
    print(summary(success["counts"], counters, times, len(hosts), opening.path), file=sys.stderr, flush=True)
    if code == ExitCode.TOO_MANY_ERRORS:
        _say(f"more rows failed than job.max_error_fraction={config.job.max_error_fraction:g} allows: exit code {code}")
    return code


def _exit_code(counts: Mapping[str, int], config: Config) -> int:
    ok, failed = counts.get("ok", 0), counts.get("error", 0)
    return ExitCode.TOO_MANY_ERRORS if failed > config.job.max_error_fraction * (ok + failed) else ExitCode.COMPLETE


def _progress(config: Config, opening: Opening) -> Progress:
    done = opening.plan.rows - sum(chunk.rows for chunk in opening.missing)
    return Progress(opening.plan.rows, done, seconds=config.job.progress_seconds)


def _files(files: list[InputFile]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files):,} files"


def _say(text: str) -> None:
    print(f"batchinfer: {text}", file=sys.stderr, flush=True)
