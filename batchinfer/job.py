"""One rank's job: chunks -> rows -> requests -> engine -> completions -> parts.

Rank 0 plans and hands out chunks; every rank, rank 0 too, computes and commits. In a job array every task is a rank 0
of its own job, with the same output. The same command again finds the parts that are there, goes on with the rows that
the journal has, and computes the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from batchinfer.cluster import signals
from batchinfer.cluster.array import ArrayDispatcher, Share
from batchinfer.cluster.binding import Place, check_places, cpu_share, place, table
from batchinfer.cluster.deadline import Deadline
from batchinfer.cluster.dispatch import SILENCE_SECONDS, Dispatcher, RootDispatcher, WorkerDispatcher, meanwhile
from batchinfer.cluster.sharing import leaders, no_gpu, sharing
from batchinfer.cluster.tree import Links, tree
from batchinfer.cluster.weights import Loaded, LoadingStopped, WeightStream
from batchinfer.cluster.world import POLL_SECONDS, World
from batchinfer.config import Config, EngineConfig, ModelConfig
from batchinfer.data import attempts
from batchinfer.data.journal import Journal, recall, resume
from batchinfer.data.ledger import Ledger
from batchinfer.data.prompts import PromptBuilder
from batchinfer.data.reader import ChunkReader
from batchinfer.data.results import count_results, result_table
from batchinfer.data.retry import EarlierOutput
from batchinfer.data.suspects import SuspectLog, condemn
from batchinfer.engine.trace import path_of_rank
from batchinfer.fingerprint import numeric
from batchinfer.loop import Engine, Loop, must_stop
from batchinfer.models.files import Source
from batchinfer.opening import Opening, find_pool, identify, open_on_root, result_options
from batchinfer.pipeline import Feeder, OpenChunk, Writer
from batchinfer.report import Counters, Progress, say, summary, total
from batchinfer.types import Chunk, Completion, ExitCode, JobError, PoolSpec, Request, exit_code

WORTH_MEASURING = 60.0
"""Seconds of computing: what the device reaches at most is measured in one."""


class EngineLoader(Protocol):
    def __call__(
        self,
        model: ModelConfig,
        engine: EngineConfig,
        *,
        threads: int,
        rank_on_node: int,
        ranks_on_node: int,
        source: Source,
        pool: PoolSpec | None,
    ) -> Engine: ...


def load_engine(
    model: ModelConfig,
    engine: EngineConfig,
    *,
    threads: int,
    rank_on_node: int,
    ranks_on_node: int,
    source: Source,
    pool: PoolSpec | None,
) -> Engine:
    """The real engine; torch is imported here and not before."""
    from batchinfer.engine.loading import load_engine as load

    node = {"rank_on_node": rank_on_node, "ranks_on_node": ranks_on_node}
    return load(model, engine, threads=threads, **node, source=source, pool=pool)


def run(
    config: Config,
    world: World,
    load_engine: EngineLoader = load_engine,
    identify: Callable[[str], dict[str, str]] = identify,
    find_pool: Callable[[Config], PoolSpec | None] = find_pool,
) -> int:
    """Do this rank's part of the job. Returns its exit code, the same on every rank: 0, 3 if more rows than
    job.max_error_fraction failed, or 75 if it had to stop before all was done. JobError for everything that ends the
    job."""
    opening = world.bcast(open_on_root(config, identify, world.size, find_pool) if world.rank == 0 else None)
    if opening.success is not None:
        code = attempts.code_of_counts(opening.success["counts"], config.job.max_error_fraction)
        world.leave(code, whole=True)
        return code
    try:
        code, whole = _work(config, world, opening, load_engine)
    except BaseException as error:
        attempts.end(opening.path, opening.number, {"exit_code": exit_code(error), "error": str(error)})
        raise
    world.leave(code, whole)
    return code


def _work(config: Config, world: World, opening: Opening, load_engine: EngineLoader) -> tuple[int, bool]:
    """Compute and close the job; the exit code, and whether all ranks have come to the end."""
    ledger = Ledger(opening.path, opening.plan, config.output.compression)
    gpus = _wants_gpus(config.engine)
    shares = config.cluster.share_weights and world.size > 1 and _on_cpu(config.engine)
    places = world.bcast(world.gather(place(world.hostname, world.local_rank, gpus, shares)))
    check_places(places)
    if world.rank == 0 and world.size > 1:
        say(f"{world.size} ranks\n{table(places)}")
    dispatcher = _dispatcher(world, opening, ledger)
    deadline = Deadline(opening.seconds, config.job.margin_seconds, signals.received, opening.state)
    start = ready = time.monotonic()
    loaded = None
    if opening.missing:
        ready, loaded = _take_part(config, world, opening, ledger, dispatcher, deadline, places, load_engine)
    end = time.monotonic()
    if isinstance(dispatcher, WorkerDispatcher):
        last_word = dispatcher.leave(ledger.notices)
        if last_word is not None:
            return last_word
        say(f"rank 0 is lost: rank {world.rank} has gone on without it")
        notices, reports, leave = [ledger.notices], [], None
    else:
        notices, reports, leave = dispatcher.gather(ledger.notices, SILENCE_SECONDS), dispatcher.reports, dispatcher
    for notice in dict.fromkeys(text for of_rank in notices for text in of_rank):
        say(notice)
    times = {"seconds": round(end - start, 3), "computing_seconds": round(end - ready, 3)}
    attempt = {**times, "hosts": [at.host for at in places], "this_attempt": dataclasses.asdict(total(reports))}
    attempt["weights"] = loaded and dataclasses.asdict(loaded)
    with meanwhile(dispatcher, world.threads):
        if isinstance(dispatcher, RootDispatcher) and dispatcher.finished and dispatcher.aside:
            reason = f"{len(dispatcher.aside)} chunks were in hand of several ranks when these died"
            code = _pause(opening, ledger, reason, attempt, ExitCode.LOST_RANK)
        elif dispatcher.finished:
            code = _close(config, opening, ledger, total(reports), attempt)
        else:
            code = _pause(opening, ledger, deadline.reason() or "rank 0 has stopped", attempt, ExitCode.INCOMPLETE)
    last_word = code, not dispatcher.lost
    if leave:
        leave.release(last_word)
    return last_word


def _dispatcher(world: World, opening: Opening, ledger: Ledger) -> RootDispatcher | WorkerDispatcher | ArrayDispatcher:
    def alone(held: set[int]) -> ArrayDispatcher:
        share = opening.share or Share(world.rank, world.size)
        return ArrayDispatcher(opening.missing, share, ledger.has, ledger.missing, held)

    if world.rank > 0:
        return WorkerDispatcher(world, alone)
    if opening.share is not None:
        return alone(set())
    return RootDispatcher(world, opening.missing)


def _take_part(
    config: Config,
    world: World,
    opening: Opening,
    ledger: Ledger,
    dispatcher: Dispatcher,
    deadline: Deadline,
    places: list[Place],
    load_engine: EngineLoader,
) -> tuple[float, Loaded | None]:
    """Compute chunks until all of the job are done, or this rank must stop. When (monotonic clock) the engine was
    ready, and what it has loaded."""
    while world.rank >= len(opening.missing) and not dispatcher.lost:  # there is no chunk for this rank, as yet
        if dispatcher.finished or must_stop(dispatcher, deadline):
            break
        dispatcher.poll(None)
        time.sleep(POLL_SECONDS)
    start = time.monotonic()
    engine, loaded = _load(config, world, opening, dispatcher, deadline, places, load_engine)
    if engine is None:
        return start, None
    ready = time.monotonic()
    if world.rank == 0:
        hosts, threads = len({at.host for at in places}), _threads(config, world, places)
        memory = f"weights in {engine.stats().weight_bytes / 2**20:,.0f} MiB"
        ranks = f"ranks {world.size}, hosts {hosts}, threads {threads}"
        say(f"engine ready after {ready - start:.1f} s ({ranks}, {memory})")
    try:
        if world.rank == 0:
            _note_weights(config, opening, loaded)
        _compute(config, world, opening, ledger, engine, dispatcher, deadline, loaded)
    finally:
        engine.close()
    while not dispatcher.finished and not must_stop(dispatcher, deadline):  # there is no time for another row
        dispatcher.poll(None)
        time.sleep(POLL_SECONDS)
    return ready, loaded


def _load(
    config: Config,
    world: World,
    opening: Opening,
    dispatcher: Dispatcher,
    deadline: Deadline,
    places: list[Place],
    load_engine: EngineLoader,
) -> tuple[Engine | None, Loaded | None]:
    """The engine and what was loaded for it; no engine if this rank must stop, or there is nothing left to do. The
    ranks that begin with a chunk share the reading; one that comes later, without rank 0, reads alone."""
    beginning = places[: len(opening.missing)]
    leader = leaders(beginning)
    hosts = [at.host if leader[rank] == rank else None for rank, at in enumerate(beginning)]
    links = tree(hosts, config.cluster.hosts_per_reader if world.threads else 0)
    mine = links[world.rank] if world.rank < len(links) else Links()

    def stop() -> bool:
        return dispatcher.finished or must_stop(dispatcher, deadline)

    profile = path_of_rank(config.engine.profile, world.rank) if config.engine.profile else None
    engine = None
    with (
        meanwhile(dispatcher, world.threads),
        sharing(opening.attempt, leader, world.rank, stop) as shared,
        WeightStream(mine, world.channel, stop, shared) as source,
    ):
        with contextlib.suppress(LoadingStopped):
            if not stop():
                engine = load_engine(
                    config.model,
                    dataclasses.replace(config.engine, profile=profile),
                    threads=_threads(config, world, places),
                    rank_on_node=world.local_rank,
                    ranks_on_node=world.local_size,
                    source=source,
                    pool=opening.pool,
                )
    readers = sum(host is not None and link.parent is None for host, link in zip(hosts, links, strict=True))
    counts = {"readers": readers, "packers": len(set(leader)), "ranks": len(links)}
    return engine, source.loaded and dataclasses.replace(source.loaded, **counts)


def _threads(config: Config, world: World, places: list[Place]) -> int:
    return config.engine.threads or cpu_share(places, world.rank)


def _note_weights(config: Config, opening: Opening, loaded: Loaded | None) -> None:
    """Say and record what was loaded. The plan has samples of the weights only (models/identity.py): here a change of
    any byte since an earlier attempt is seen."""
    if loaded is None:
        return
    say(str(loaded))
    other = attempts.note_weights(opening.path, opening.number, dataclasses.asdict(loaded))
    if other is not None:
        text = (
            f"the weights in {config.model.path} are not those that attempt {other} loaded (SHA-256), though their "
            "sizes and samples are the same: its rows were computed with other values"
        )
        if config.job.strict_resume:
            raise JobError(f"{text}; job.strict_resume=false goes on", ExitCode.MISMATCH)
        say(text)


def _compute(
    config: Config,
    world: World,
    opening: Opening,
    ledger: Ledger,
    engine: Engine,
    dispatcher: Dispatcher,
    deadline: Deadline,
    loaded: Loaded | None,
) -> None:
    """Put the stages together around the engine, and run them."""
    options = result_options(config, opening.pool)
    reader = ChunkReader(opening.plan.files, opening.columns)
    builder = PromptBuilder.of(config, engine.tokenizer, engine.max_seq_len)
    earlier = EarlierOutput(config.input.retry_errors_of, options) if config.input.retry_errors_of else None
    provenance = {"attempt": opening.attempt, "rank": world.rank, "ranks": world.size, "model": config.model.path}
    provenance |= {"numeric": numeric(config), "weights": loaded and loaded.digest}

    journal = Journal(opening.state, opening.plan.id, config.job.journal_seconds)

    def build(table: Any, chunk: Chunk) -> list[Request | Completion]:
        known = recall(opening.journals.get(chunk.index, ()), opening.plan.id, chunk)
        rows = condemn(resume(builder.build(table, chunk), known), opening.suspicion)
        good = earlier.good_rows(chunk) if earlier else {}
        return [good.get(row.id, row) for row in rows]

    def commit(opened: OpenChunk) -> None:
        table = result_table(opened.table, opened.completions, options)
        ledger.commit(opened.chunk, table, provenance | {"counts": count_results(opened.completions)})
        journal.forget(opened.chunk, opening.journals.get(opened.chunk.index, ()))

    def record(records: dict[int, list[Completion]]) -> None:
        try:
            journal.write(records)
        except OSError as error:  # only a cache: what it lacks is computed again
            ledger.notices.append(f"the journal of rank {world.rank} on {world.hostname} could not be written: {error}")

    progress = _progress(config, opening) if world.rank == 0 else None
    show = (lambda: progress.show(dispatcher.reports)) if progress else (lambda: None)
    feeder, writer, log = Feeder(reader.read, build), Writer(commit, record), SuspectLog(opening.state)
    crashed = False
    try:
        stages = (engine, dispatcher, feeder, writer, journal, deadline, opening.suspicion, log, show)
        Loop(*stages, row_seconds=config.job.row_seconds, reorder=config.engine.reorder).run()
    except BaseException as error:
        crashed = isinstance(error, JobError) and error.exit_code == ExitCode.LOST_RANK
        writer.record(journal.take())
        writer.finish()
        raise
    finally:
        log.close(in_order=not crashed)
        if progress:
            progress.close()
        feeder.close()
        writer.close()
        reader.close()


def _wants_gpus(engine: EngineConfig) -> bool:
    """Whether the ranks' GPUs are to be told apart before the engine finds its device: all but a run that may end on
    the CPU."""
    if engine.device == "auto":
        return engine.ops != "auto" or importlib.util.find_spec("batchinfer._gpu") is not None
    return engine.device not in ("cpu", "reference")


def _on_cpu(engine: EngineConfig) -> bool:
    """Whether the compiled kernels of the CPU will compute; false where that can't be known before the engine is
    loaded."""
    return engine.device == "cpu" or (engine.device == "auto" and not _wants_gpus(engine) and no_gpu())


def _close(config: Config, opening: Opening, ledger: Ledger, counters: Counters, attempt: dict[str, Any]) -> int:
    """Rank 0, or a rank that has lost it, when every chunk is committed: check, publish _SUCCESS, sum up."""
    times = {key: attempt[key] for key in ("seconds", "computing_seconds")}
    ranks = len(attempt["hosts"])
    success = ledger.finish({"attempt": opening.attempt, "ranks": ranks, **times})
    code = attempts.code_of_counts(success["counts"], config.job.max_error_fraction)
    attempts.end(opening.path, opening.number, {"exit_code": code, **attempt, "job": success["counts"]})
    shares = _roofline(config, counters, times["computing_seconds"])
    print(summary(success["counts"], counters, times, ranks, opening.path, shares), file=sys.stderr, flush=True)
    if code == ExitCode.TOO_MANY_ERRORS:
        say(f"more rows failed than job.max_error_fraction={config.job.max_error_fraction:g} allows: exit code {code}")
    return code


def _roofline(config: Config, counters: Counters, seconds: float) -> tuple[float, float] | None:
    """Shares of the device's time in prefill and decode steps that no device could have saved; None where measuring
    what this one reaches would take a notable part of the job's time, or fails, as others have its memory."""
    if seconds < WORTH_MEASURING or not counters.prefill.least_flops:
        return None
    from batchinfer.engine.kv_dtype import DTYPES
    from batchinfer.engine.probe import measure
    from batchinfer.engine.roofline import roofline_share

    try:
        ceilings = measure(config.engine, DTYPES[config.engine.dtype])
    except (RuntimeError, MemoryError, JobError):
        return None
    return roofline_share(counters.prefill, ceilings), roofline_share(counters.decode, ceilings)


def _pause(opening: Opening, ledger: Ledger, reason: str, attempt: dict[str, Any], code: int) -> int:
    """Rank 0, or a rank that has lost it, when it had to stop: say what is left."""
    left = sum(chunk.rows for chunk in ledger.missing())
    say(f"stopped, {reason}; {left:,} rows are not committed: the same command goes on")
    attempts.end(opening.path, opening.number, {"exit_code": code, "reason": reason, **attempt})
    return code


def _progress(config: Config, opening: Opening) -> Progress:
    done = opening.plan.rows - sum(chunk.rows for chunk in opening.missing)
    return Progress(opening.plan.rows, done, seconds=config.job.progress_seconds)
