"""The state of a job is its output folder: a plan that never changes, and a part file for every finished chunk.

    OUT/part-000123.parquet         one complete chunk, published whole (commit.py), never replaced
    OUT/.part-000123.ATTEMPT.tmp    on its way; readers of Parquet folders pass over names with a dot
    OUT/_SUCCESS                    JSON, last of all
    OUT/_batchinfer/plan.json       the plan (plan.py); plan-2.json, if the input has got further files, and so on
    OUT/_batchinfer/journal/        finished rows of chunks that are not (journal.py)
    OUT/_batchinfer/suspects/       rows in an engine that crashed (suspects.py)

There is no "running" state, no lock and no clock. Any number of processes may compute the same chunk: the first to
publish it wins, and the others throw their work away.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Literal, TypeVar

import pyarrow as pa

from batchinfer.data.commit import NO_SPACE, claims, probe, publish, publish_bytes, read_bytes, remove, write_new
from batchinfer.data.digest import content_digest
from batchinfer.data.journal import clear_journals
from batchinfer.data.part import (
    BadPart,
    PartInfo,
    check_identity,
    decode_part,
    describe,
    encode_part,
    part_name,
    read_info,
)
from batchinfer.data.plan import Plan, difference_table, differences, extended, numeric_differences
from batchinfer.data.suspects import clear_suspects
from batchinfer.types import Chunk, ExitCode, JobError

STATE = "_batchinfer"
PLAN = "plan.json"
SUCCESS = "_SUCCESS"
TRIES = 3
READERS = 16  # threads that open parts: latency of the file system, not work
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)

A = TypeVar("A")
T = TypeVar("T")


class Ledger:
    """The chunks of one job: which are missing, and how one is added. Rank 0 gets it from :func:`open_job`, other ranks
    from :meth:`attach`. ``notices`` collects what a person should be told."""

    def __init__(self, path: str, plan: Plan, compression: str = "zstd"):
        self.path = path
        self.plan = plan
        self.notices: list[str] = []
        self._compression = compression
        self._attempt = secrets.token_hex(16)  # never from a clock or a job id: two jobs can share those

    @classmethod
    def attach(cls, output_path: str, input_root: str | None = None, compression: str = "zstd") -> Ledger:
        """The ledger of a job that is open already; only reads. ``input_root`` is rank 0's ``plan.files[0].root``: the
        input may have moved since the job was planned."""
        path = _absolute(output_path)
        plan = load_plan(path)
        return cls(path, plan if input_root is None else plan.with_root(input_root), compression)

    def missing(self) -> list[Chunk]:
        """Chunks without a part file, in order. A folder listing can be out of date on network file systems: then a
        chunk is computed once more, and its commit loses."""
        try:
            names = set(os.listdir(self.path))
        except OSError as error:
            raise output_error(self.path, error) from None
        return [chunk for chunk in self.plan.chunks if part_name(chunk) not in names]

    def has(self, chunk: Chunk) -> bool:
        """Whether the chunk's part file is there; as out of date as :meth:`missing` may be."""
        return os.path.exists(os.path.join(self.path, part_name(chunk)))

    def commit(self, chunk: Chunk, table: pa.Table, provenance: dict[str, Any] | None = None) -> Literal["won", "lost"]:
        """Publish the chunk's rows, or find that another process did it before; either way the part is there.

        ``provenance``: JSON values for the part's footer; its entry "counts" (str -> int) is summed up by finish().
        What was written is read back and compared before it is published. JobError(74): no space or an I/O error
        (three tries with a new file each); (73): the folder cannot be written.
        """
        if table.num_rows != chunk.rows:
            raise ValueError(f"{table.num_rows} rows do not make {chunk}")
        content = content_digest(table)
        info = describe(self.plan, chunk, content, self._attempt, provenance or {})
        final = os.path.join(self.path, part_name(chunk))
        temporary = self._write(chunk, encode_part(table, info, self._compression))
        try:
            won = publish(temporary, final)
        except OSError as error:
            raise output_error(final, error) from None
        finally:
            remove(temporary)
        if not won:
            self._compare(chunk, final, content)
        return "won" if won else "lost"

    def finish(self, run: dict[str, Any] | None = None) -> dict[str, Any]:
        """Open every part by its name, add up, publish _SUCCESS and return what it says; ``run`` is recorded in it.

        JobError(75) if parts are missing, (74) if one is not what it should be.
        """
        names = [part_name(chunk) for chunk in self.plan.chunks]
        found = in_threads(self._inspect, self.plan.chunks)
        missing = [name for name, part in zip(names, found, strict=True) if part is None]
        if missing:
            shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
            text = f"{len(missing)} of {len(names)} parts are missing in {self.path} ({shown}): run the command again"
            raise JobError(text, ExitCode.INCOMPLETE)
        record = {"run": run or {}, **success_record(self.plan, found)}
        try:
            self.retire_success()
            publish_bytes(self.path, SUCCESS, json.dumps(record, indent=1).encode())
        except OSError as error:
            raise output_error(os.path.join(self.path, SUCCESS), error) from None
        self._sweep()
        return self.success() or record

    def success(self) -> dict[str, Any] | None:
        """What _SUCCESS says, or None while the job is not complete: a plan that this one extends may have been.
        JobError(65) if it is another plan's."""
        try:
            record = json.loads(read_bytes(os.path.join(self.path, SUCCESS)))
            plan = record["plan"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JobError(f"{self.path}/{SUCCESS} cannot be read: {error}", ExitCode.OUTPUT) from None
        if plan in self.plan.earlier:
            return None
        if plan != self.plan.id:
            text = f"{self.path}/{SUCCESS} belongs to plan {plan[:12]}, {STATE}/{PLAN} is {self.plan.id[:12]}"
            raise JobError(text, ExitCode.MISMATCH)
        return record

    def promises(self) -> bool:
        """Whether there is a _SUCCESS, be it damaged, that is not one of the plans that this one extends."""
        path = os.path.join(self.path, SUCCESS)
        return os.path.lexists(path) and _plan_of_success(path) not in self.plan.earlier

    def retire_success(self) -> None:
        """Take away the _SUCCESS of a plan that this one extends: the job is not complete any more. OSError."""
        path = os.path.join(self.path, SUCCESS)
        if _plan_of_success(path) not in self.plan.earlier:
            return
        aside = os.path.join(self.path, f".{SUCCESS}.{secrets.token_hex(16)}.json")
        try:
            os.rename(path, aside)
        except FileNotFoundError:  # another process did this just now
            return
        if _plan_of_success(aside) not in self.plan.earlier:  # another process did this before, and completed the job
            publish(aside, path)

    def _write(self, chunk: Chunk, data: bytes) -> str:
        """Path of a new temporary file that was read back whole."""
        stem = part_name(chunk).removesuffix(".parquet")
        for attempt in range(TRIES):
            temporary = os.path.join(self.path, f".{stem}.{self._attempt}-{attempt}.tmp")
            try:
                write_new(temporary, data)
                decode_part(read_bytes(temporary))
                return temporary
            except (OSError, BadPart) as error:
                remove(temporary)
                failure = error if isinstance(error, OSError) else OSError(errno.EIO, f"read back: {error}")
                if failure.errno in (*NO_SPACE, *NOT_WRITABLE):
                    break
        raise output_error(temporary, failure)

    def _compare(self, chunk: Chunk, final: str, content: str) -> None:
        try:
            theirs = read_info(final)
        except (OSError, BadPart) as error:
            self.notices.append(f"{final} was published by another process and cannot be read here: {error}")
            return
        if theirs.content != content:
            self.notices.append(
                f"{final} was published before by {theirs.host} (attempt {theirs.attempt[:12]}) with other values than "
                f"{os.uname().nodename} computed: unless the engine runs differ, one of the two hosts computes wrongly"
            )

    def _inspect(self, chunk: Chunk) -> tuple[PartInfo, int] | None:
        path = os.path.join(self.path, part_name(chunk))
        try:
            info = read_info(path)
            check_identity(info, self.plan, chunk)
            return info, os.stat(path).st_size
        except FileNotFoundError:
            return None
        except BadPart as error:
            text = f"{path} is damaged: {error}; move it away and run the command again"
            raise JobError(text, ExitCode.IO) from None
        except OSError as error:
            raise output_error(path, error) from None

    def _sweep(self) -> None:
        """Drop temporary files, journals and suspicions, whose ever they are: every chunk is published, and their
        owners can only lose."""
        with suppress(OSError):  # the job is complete whether its scraps are listed or not
            for name in os.listdir(self.path):
                if name.startswith((".part-", f".{SUCCESS}.")) and name.endswith(".tmp"):
                    remove(os.path.join(self.path, name))
            clear_journals(os.path.join(self.path, STATE))
            clear_suspects(os.path.join(self.path, STATE))
        for claim in claims(self.path):
            remove(claim)


def success_record(plan: Plan, parts: Iterable[tuple[PartInfo, int]]) -> dict[str, Any]:
    """What _SUCCESS promises about the output. ``parts``: (footer, size in bytes) of every chunk, in order."""
    counts: Counter[str] = Counter()
    listed = []
    for chunk, (info, size) in zip(plan.chunks, parts, strict=True):
        counts.update(info.counts)
        digests = {"content": info.content, "sha256": info.sha256}
        listed.append({"name": part_name(chunk), "rows": info.rows, "bytes": size, **digests})
    return {"plan": plan.id, "rows": plan.rows, "counts": dict(counts), "parts": listed}


def open_job(
    output_path: str, plan: Plan, compression: str = "zstd", allow_append: bool = False, strict: bool = False
) -> Ledger:
    """Start the job ``plan`` in ``output_path``, or continue it: the plan that is there already holds, and with
    ``allow_append`` the files that it lacks are added to it. Numeric differences are a notice, or with ``strict`` a
    refusal as well.

    JobError(65) with a table of differences if that plan would give other results; (73) if the folder has other
    content, cannot be written, or lies on a file system where no file can be published safely.
    """
    path = _absolute(output_path)
    state = os.path.join(path, STATE)
    try:
        os.makedirs(path, exist_ok=True)
        foreign = sorted(set(os.listdir(path)) - {STATE})
        if foreign and not _is_there(os.path.join(state, PLAN)):
            shown = ", ".join(foreign[:3]) + (" ..." if len(foreign) > 3 else "")
            text = f"output.path={output_path} holds other files ({shown}): give a new or empty folder"
            raise JobError(text, ExitCode.OUTPUT)
        os.makedirs(state, exist_ok=True)
        probe(state)
        if not _is_there(os.path.join(state, PLAN)):
            publish_bytes(state, PLAN, plan.to_json())
    except OSError as error:
        raise output_error(path, error) from None
    planned = load_plan(path)  # ours, or that of a job which was faster: both are compared alike
    longer = extended(planned, plan)
    while longer and allow_append:
        try:
            publish_bytes(state, _plan_name(len(longer.extends) + 1), longer.to_json())
        except OSError as error:
            raise output_error(path, error) from None
        planned = load_plan(path)  # ours, or that of a job which saw other files
        longer = extended(planned, plan)
    found = differences(planned, plan)
    if found:
        hint = ", or give input.allow_append=true, and the new files are added to the job" if longer else ""
        raise JobError(
            f"output.path={output_path} holds a job that would give other results than this one:\n"
            f"{difference_table(found)}\nGive a new output.path, or restore the planned values{hint}.",
            ExitCode.MISMATCH,
        )
    ledger = Ledger(path, planned.with_root(plan.files[0].root), compression)
    slight = numeric_differences(planned, plan)
    if slight and strict:
        raise JobError(
            f"output.path={output_path} holds a job that may give slightly other results than this one, which "
            f"job.strict_resume=true forbids:\n{difference_table(slight)}",
            ExitCode.MISMATCH,
        )
    if slight:
        changes = ", ".join(f"{name} {before} -> {now}" for name, before, now in slight)
        ledger.notices.append(f"{changes} since the job was planned: a few tokens of the rows to come may be others")
    try:
        ledger.retire_success()
    except OSError as error:
        raise output_error(path, error) from None
    if planned.rows_per_chunk != plan.rows_per_chunk:
        now, before = plan.rows_per_chunk, planned.rows_per_chunk
        ledger.notices.append(f"output.rows_per_chunk={now} has no effect: the job was planned with {before}")
    return ledger


def load_plan(path: str) -> Plan:
    """The plan of the job in the output folder ``path``, with all extensions. JobError(73) if there is none, or a
    damaged one."""
    plan = _read_plan(path, 1)
    if plan is None:
        raise JobError(f"{path} is no output folder of batchinfer: it has no {STATE}/{PLAN}", ExitCode.OUTPUT)
    while (longer := _read_plan(path, len(plan.extends) + 2)) is not None:
        if longer.extends != (*plan.extends, (plan.id, len(plan.chunks))):
            name = _plan_name(len(plan.extends) + 2)
            raise JobError(f"{path}/{STATE}/{name} does not continue the plan before it", ExitCode.OUTPUT)
        plan = longer
    return plan


def _plan_name(number: int) -> str:
    return PLAN if number == 1 else f"plan-{number}.json"


def _read_plan(path: str, number: int) -> Plan | None:
    file = os.path.join(path, STATE, _plan_name(number))
    try:
        return Plan.from_json(read_bytes(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise JobError(f"{file} cannot be used: {error}", ExitCode.OUTPUT) from None


def _plan_of_success(path: str) -> str | None:
    """The id that a _SUCCESS file names; None if it is absent or damaged."""
    try:
        plan = json.loads(read_bytes(path))["plan"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return plan if isinstance(plan, str) else None


def output_error(path: str, error: OSError) -> JobError:
    """The JobError of a failed write: 73 if the folder does not allow it, else 74 with the space that is left."""
    if error.errno in NOT_WRITABLE:
        return JobError(f"cannot write {path}: {error.strerror}", ExitCode.OUTPUT)
    try:
        info = os.statvfs(os.path.dirname(path))
        space = f"{info.f_bavail * info.f_frsize / 2**30:.1f} GiB and {info.f_favail} inodes are free there"
    except OSError as unknown:
        space = f"free space unknown: {unknown.strerror}"
    quota = ", so a quota may be used up" if error.errno == errno.EDQUOT else ""
    return JobError(f"cannot write {path}: {error.strerror or error} ({space}{quota})", ExitCode.IO)


def _is_there(path: str) -> bool:
    """os.path.exists() takes every error for an absence, and a full folder without a plan is somebody else's."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def in_threads(function: Callable[[A], T], items: Iterable[A]) -> list[T]:
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(function, items))


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
