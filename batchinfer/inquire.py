"""plan, status, verify, compact, convert and export: what is done with files alone. None of them is changed."""

from __future__ import annotations

import os

from batchinfer.config import MISSING, VECTOR_TASKS, Config
from batchinfer.data.attempts import code_of_counts, code_of_job
from batchinfer.data.audit import Status, status, verify
from batchinfer.data.columns import check_input, passed_columns, prompt_source
from batchinfer.data.compact import compact
from batchinfer.data.convert import convert
from batchinfer.data.export import export
from batchinfer.data.plan import Plan, make_plan
from batchinfer.data.results import ResultOptions, result_schema
from batchinfer.data.tables import InputFile, input_schema, list_inputs
from batchinfer.estimate import STRETCH, describe, describe_order, draw, places, seconds_of, stretch
from batchinfer.report import duration
from batchinfer.types import ExitCode, JobError, PoolSpec

SHOWN = 8
"""Attempts and ranks that `status` lists one by one."""

SAMPLE_ROWS = 200
"""Rows from which `plan` estimates a job, if it is told the model."""


def show_plan(config: Config, timed: bool = False) -> int:
    """Print what a run would do, and given model.path what it will probably cost. ``timed``: load the engine, and
    compute the sampled rows too. JobError as a run would raise."""
    files = list_inputs(config.input.path)
    check_input(files, config.input)
    schema = input_schema(files)
    passed = passed_columns(config.input, schema)
    pool = _pool(config)
    written = result_schema(
        schema, ResultOptions.of(config.input, config.output, config.sampling, config.task.name, pool)
    )
    plan = make_plan(files, config.output.rows_per_chunk, {})
    source = prompt_source(config.input)
    size = sum(file.bytes for file in files)
    plural = "" if len(files) == 1 else "s"
    print(f"input      {len(files):,} file{plural}, {plan.rows:,} rows, {size / 2**20:,.1f} MiB below {files[0].root}")
    print(f"prompt     input.{source.kind}={source.name}")
    for field, column in config.input.sampling_columns.items():
        print(f"per row    sampling.{field} from column {column}")
    print(f"passed     {', '.join(passed) or 'no column'}")
    print(f"generated  {', '.join(written.names[len(passed) :])}")
    print(f"chunks     {len(plan.chunks):,} of up to {max(chunk.rows for chunk in plan.chunks):,} rows")
    target = config.output.path
    print(f"output     {'not given' if target == MISSING else os.path.abspath(target)}")
    if config.model.path != MISSING:
        for line in _estimate(config, files, plan, timed, pool):
            print(line)
    elif timed:
        raise JobError("--time computes rows: give model.path=PATH", ExitCode.USAGE)
    return ExitCode.COMPLETE


def _pool(config: Config) -> PoolSpec | None:
    if config.task.name not in VECTOR_TASKS:
        return None
    if config.model.path == MISSING:
        raise JobError(f"task={config.task.name}: the model decides the columns, give model.path=PATH", ExitCode.USAGE)
    from batchinfer.models.pool_spec import pool_spec

    return pool_spec(config)


def _estimate(config: Config, files: list[InputFile], plan: Plan, timed: bool, pool: PoolSpec | None) -> list[str]:
    from batchinfer.models.encoder_spec import EncoderSpec, encoder_spec
    from batchinfer.models.spec import load_spec

    spec = encoder_spec(config.model.path) or load_spec(config.model.path)
    seconds = None
    if timed:
        from batchinfer.engine.loading import load_engine

        engine = load_engine(config.model, config.engine, threads=config.engine.threads, pool=pool)
        tokenizer, longest = engine.tokenizer, engine.max_seq_len
    else:
        from batchinfer.models.tokenizer import load_tokenizer

        tokenizer, longest = load_tokenizer(config.model.path), spec.resolve_length(config.engine.max_model_len)
    sample = draw(config, files, plan, tokenizer, longest, places(plan.chunks, SAMPLE_ROWS))
    if timed:
        seconds = seconds_of(engine, sample.requests)
        engine.close()
    in_a_row = draw(config, files, plan, tokenizer, longest, stretch(plan.chunks, STRETCH))
    lines = describe(sample, config, len(plan.chunks), seconds)
    return lines if isinstance(spec, EncoderSpec) else lines + describe_order(config, in_a_row.requests, spec)


def show_status(config: Config) -> int:
    """Print how far the job in output.path is; its exit code: 0, 3 (too many failed rows) or 75 (not complete)."""
    state = status(config.output.path)
    failed = state.counts.get("error", 0)
    codes = ", ".join(f"{k.partition(':')[2]} {n:,}" for k, n in sorted(state.counts.items()) if ":" in k)
    print(f"state      {'complete' if state.complete else 'not complete'}, plan {state.plan[:12]}")
    print(f"chunks     {state.chunks_done:,} of {state.chunks:,}")
    print(f"rows       {state.rows_done:,} of {state.rows:,}, {failed:,} failed{f' ({codes})' if codes else ''}")
    tokens = [state.counts.get(name, 0) for name in ("prompt_tokens", "completion_tokens")]
    print(f"tokens     {tokens[0]:,} prompt, {tokens[1]:,} output")
    for line in _progress(state):
        print(line)
    if not state.complete:
        return ExitCode.INCOMPLETE
    return code_of_counts(state.counts, config.job.max_error_fraction)


def _progress(state: Status) -> list[str]:
    """Attempts, and how fast the newest ones are."""
    ends = [f"exit code {attempt.code}" if attempt.code is not None else "no end" for attempt in state.attempts]
    earlier = "..., " if len(ends) > SHOWN else ""
    lines = [f"attempts   {len(ends)}: {earlier}{', '.join(ends[-SHOWN:])}"] if ends else []
    total = sum(state.speeds.values())
    if total and not state.complete:
        each = ", ".join(f"{label} {speed:,.2f}" for label, speed in list(state.speeds.items())[:SHOWN])
        left = duration((state.rows - state.rows_done) / total)
        lines.append(f"speed      {total:,.2f} rows/s ({each}); {left} left at that speed")
    return lines


def show_code(config: Config, launch: str | None, noted: int | None) -> int:
    """Print nothing; the exit code to which the job in output.path has come, see data/attempts.py."""
    return code_of_job(config.output.path, config.job.max_error_fraction, launch, noted)


def show_verify(config: Config) -> int:
    """Read and check every part; 0, 74 (something is wrong) or 75 (all right, not complete)."""
    report = verify(config.output.path)
    print(report)
    if not report.ok:
        return ExitCode.IO
    return ExitCode.COMPLETE if report.complete else ExitCode.INCOMPLETE


def run_compact(config: Config) -> int:
    """Make the larger files in compact.path, and print what was made."""
    made = compact(config.output.path, config.compact.path, config.compact.rows_per_file)
    size = sum(file["bytes"] for file in made["files"])
    print(f"{made['rows']:,} rows in {len(made['files']):,} files, {size / 2**20:,.1f} MiB, in {config.compact.path}")
    return ExitCode.COMPLETE


def run_convert(config: Config) -> int:
    """Make the Parquet file of convert.path, and print the command that reads it."""
    made = convert(config.input.path, config.convert.path)
    print(f"{made.rows:,} rows with the columns {', '.join(made.columns)} in {made.path}")
    print(" ".join(["batchinfer run model.path=PATH", f"input.path={made.path}", *made.settings, "output.path=PATH"]))
    return ExitCode.COMPLETE


def run_export(config: Config) -> int:
    """Write the lines of export.path."""
    count = export(config.output.path, config.export.path, config.export.format)
    print(f"{count:,} lines in {config.export.path}")
    return ExitCode.COMPLETE
