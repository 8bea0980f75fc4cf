"""What rank 0 finds out before a job begins: the input, the plan, what is missing of it, what earlier attempts left."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from batchinfer import __version__
from batchinfer.cluster.array import Share, array_share
from batchinfer.cluster.deadline import seconds_left
from batchinfer.cluster.launch import launch_name
from batchinfer.config import Config, to_dict
from batchinfer.data import attempts
from batchinfer.data.columns import check_input, used_columns
from batchinfer.data.journal import journal_files
from batchinfer.data.ledger import STATE, open_job
from batchinfer.data.plan import Plan, make_plan
from batchinfer.data.results import ResultOptions, result_schema
from batchinfer.data.retry import EarlierOutput
from batchinfer.data.suspects import Suspicion, read_suspicion
from batchinfer.data.tables import InputFile, input_schema, list_inputs
from batchinfer.fingerprint import fingerprint, numeric
from batchinfer.report import say
from batchinfer.types import Chunk, ExitCode, JobError, PoolSpec


@dataclass(frozen=True)
class Opening:
    """What rank 0 found out, sent to every rank. ``success`` is what _SUCCESS says, if the job is complete already;
    otherwise ``number`` is that of the attempt's record. ``share``: rank 0's place in a job array. ``seconds``: until
    the allocation ends, None if nobody says. ``pool``: what becomes of a row where no text does. ``journals``: files of
    earlier attempts, by chunk index. ``suspicion``: the rows that were in the engine when it crashed."""

    attempt: str
    number: int
    share: Share | None
    path: str
    plan: Plan
    columns: list[str]
    pool: PoolSpec | None
    missing: list[Chunk]
    success: dict[str, Any] | None
    seconds: float | None
    journals: dict[int, list[str]]
    suspicion: Suspicion

    @property
    def state(self) -> str:
        return os.path.join(self.path, STATE)


def identify(model_path: str) -> dict[str, str]:
    """Digests of everything in the model's files that decides the results. A model that can't run is refused here,
    before there is a plan that names it: with the right one in its place the same command would be another job."""
    from batchinfer.models.identity import check_model, model_fingerprint

    check_model(model_path)
    return model_fingerprint(model_path)


def _identify_adapters(adapters: Mapping[str, str]) -> dict[str, str]:
    if not adapters:
        return {}
    from batchinfer.models.identity import adapter_fingerprints

    return adapter_fingerprints(adapters)


def find_pool(config: Config) -> PoolSpec | None:
    """What the model and the task make of a row where no text is made."""
    from batchinfer.models.pool_spec import pool_spec

    return pool_spec(config)


def open_on_root(
    config: Config,
    identify: Callable[[str], dict[str, str]],
    ranks: int,
    find_pool: Callable[[Config], PoolSpec | None],
) -> Opening:
    """Look at the input, make the plan or find the one that is there, see what is missing, and record the attempt."""
    share = array_share() if ranks == 1 else None
    files = list_inputs(config.input.path)
    check_input(files, config.input)
    schema = input_schema(files)
    pool = find_pool(config)
    options = result_options(config, pool)
    result_schema(schema, options)  # refuses name collisions
    if config.sampling.constrained:
        from batchinfer.engine.constrain import check_constraint

        try:
            check_constraint(config.sampling)
        except ValueError as error:
            raise JobError(f"sampling.{error}", ExitCode.USAGE) from None
    model = identify(config.model.path) | _identify_adapters(config.model.adapters)
    retried = config.input.retry_errors_of
    earlier = EarlierOutput(retried, options) if retried else None
    plan = make_plan(
        files,
        earlier.plan.rows_per_chunk if earlier else config.output.rows_per_chunk,  # a chunk is taken over from one part
        fingerprint(config, model, earlier.plan.id if earlier else None, pool),
        free={"engine": dataclasses.asdict(config.engine), "batchinfer": __version__},
        numeric=numeric(config),
    )
    if earlier:
        earlier.check(plan)
    ledger = open_job(
        config.output.path,
        plan,
        config.output.compression,
        allow_append=config.input.allow_append,
        strict=config.job.strict_resume,
    )
    success = ledger.success()
    missing = [] if success else ledger.missing()
    for notice in ledger.notices:
        say(notice)
    rows, rows_missing = ledger.plan.rows, sum(chunk.rows for chunk in missing)
    state = "complete, nothing to do" if success else f"{rows_missing:,} to do in {len(missing):,} chunks"
    say(f"{rows:,} rows in {_files(files)}, {state}; output {ledger.path}")
    attempt = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.uname().nodename}-{os.getpid()}"
    record = {
        "attempt": attempt,
        "batchinfer": __version__,
        "launch": launch_name(),
        "task": share.task if share else None,
        "ranks": ranks,
        "done": attempts.work_done(ledger),
        "config": to_dict(config),
    }
    return Opening(
        attempt=attempt,
        number=0 if success else attempts.begin(ledger.path, record),
        share=share,
        path=ledger.path,
        plan=ledger.plan,
        columns=used_columns(config.input, schema),
        pool=pool,
        missing=missing,
        success=success,
        seconds=seconds_left(os.environ),
        journals=journal_files(os.path.join(ledger.path, STATE)) if missing else {},
        suspicion=read_suspicion(os.path.join(ledger.path, STATE)) if missing else Suspicion(),
    )


def result_options(config: Config, pool: PoolSpec | None) -> ResultOptions:
    """What the columns of a result are."""
    return ResultOptions.of(config.input, config.output, config.sampling, config.task.name, pool)


def _files(files: list[InputFile]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files):,} files"
