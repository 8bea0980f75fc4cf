"""The attempts at a job: each writes a record when it begins, and one when it ends. A launcher decides by them.

    OUT/_batchinfer/attempts/000003.begin.json    who, where, how many rows were done by then
    OUT/_batchinfer/attempts/000003.weights.json  what rank 0 loaded, and how fast
    OUT/_batchinfer/attempts/000003.end.json      exit code and counters; absent if the attempt died, or goes on

Attempts are numbered in the order in which they began, without a clock: a number belongs to whoever publishes its
record first. The records are no part of the job's state: a job goes on without them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchinfer.data.commit import publish_bytes, read_bytes
from batchinfer.data.journal import journal_files
from batchinfer.data.ledger import STATE, Ledger, output_error
from batchinfer.types import ExitCode

FOLDER = "attempts"
BEGIN, WEIGHTS, END = ".begin.json", ".weights.json", ".end.json"

FUTILE = 3
"""Attempts in a row that left nothing new, after which the job is not started again."""

RESUMABLE = (ExitCode.LOST_RANK, ExitCode.INCOMPLETE)


@dataclass(frozen=True)
class Attempt:
    """One attempt. ``done``: what was done when it began, see :func:`work_done`. ``code``: its exit code, None if it
    has not ended. ``launch`` names the start by a launcher (slurm/run.sh) that it came from, ``task`` its place in a
    job array. ``name`` is what its parts call it, ``began`` when its record was written, by the file system's clock in
    seconds: good for a person's eyes, and for nothing else."""

    number: int
    done: tuple[int, int]
    code: int | None = None
    launch: str | None = None
    task: int | None = None
    name: str = ""
    began: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Commit:
    """A part: the attempt and rank that committed it, its rows, and when, by the clock of ``Attempt.began``."""

    attempt: str
    rank: int
    rows: int
    time: float


def begin(path: str, record: Mapping[str, Any]) -> int:
    """Record that an attempt begins at the job in the output folder ``path``; its number. ``record``: JSON values,
    among them those of Attempt's fields ``done``, ``launch`` and ``task``. JobError(73 | 74) if it can't be written."""
    folder = os.path.join(path, STATE, FOLDER)
    try:
        os.makedirs(folder, exist_ok=True)
        number = max((_number(name) for name in os.listdir(folder) if name.endswith(BEGIN)), default=0) + 1
        while not publish_bytes(folder, f"{number:06}{BEGIN}", _encode(record)):
            number += 1
    except OSError as error:
        raise output_error(folder, error) from None
    return number


def end(path: str, number: int, record: Mapping[str, Any]) -> None:
    """Record how attempt ``number`` ended, with its "exit_code"; of several ranks that do so the first counts. A record
    that can't be written is left out: the launcher then takes the attempt for dead, which is safe."""
    with contextlib.suppress(OSError):
        publish_bytes(os.path.join(path, STATE, FOLDER), f"{number:06}{END}", _encode(record))


def note_weights(path: str, number: int, record: Mapping[str, Any]) -> int | None:
    """Record what attempt ``number`` has loaded, with its "digest". The newest other attempt that noted another one,
    None if there is none. A record that can't be written is left out."""
    folder = os.path.join(path, STATE, FOLDER)
    with contextlib.suppress(OSError):
        publish_bytes(folder, f"{number:06}{WEIGHTS}", _encode(record))
    for name in sorted(os.listdir(folder), reverse=True):
        if name.endswith(WEIGHTS) and _read(os.path.join(folder, name)).get("digest") not in (None, record["digest"]):
            return _number(name)
    return None


def attempts(path: str) -> list[Attempt]:
    """All attempts at the job in ``path``, oldest first. Records that can't be read are passed over."""
    folder = os.path.join(path, STATE, FOLDER)
    found = []
    for name in sorted(os.listdir(folder) if os.path.isdir(folder) else []):
        if name.endswith(BEGIN):
            began = _read(os.path.join(folder, name))
            code = _read(os.path.join(folder, name.replace(BEGIN, END))).get("exit_code")
            done = tuple(began.get("done", (0, 0)))
            placed = began.get("launch"), began.get("task"), began.get("attempt", "")
            found.append(Attempt(_number(name), done, code, *placed, began=_mtime(os.path.join(folder, name))))
    return found


def speeds(tried: Sequence[Attempt], commits: Sequence[Commit]) -> dict[str, float]:
    """Rows per second of each rank or task of the attempts that have not ended, or of the newest that committed
    anything if all have: from the attempt's beginning to its last part."""
    of = {attempt.name: attempt for attempt in tried if any(commit.attempt == attempt.name for commit in commits)}
    shown = [attempt for attempt in of.values() if attempt.code is None] or list(of.values())[-1:]
    found: dict[str, float] = {}
    for attempt in shown:
        mine = [commit for commit in commits if commit.attempt == attempt.name]
        seconds = max(commit.time for commit in mine) - attempt.began
        rows: Counter[str] = Counter()
        for commit in mine:
            rows[f"rank {commit.rank}" if attempt.task is None else f"task {attempt.task}"] += commit.rows
        found |= {label: count / seconds for label, count in rows.items() if seconds > 0}
    return found


def work_done(ledger: Ledger) -> tuple[int, int]:
    """(rows committed, bytes of journals): a number that stays the same is an attempt that came to nothing."""
    rows = ledger.plan.rows - sum(chunk.rows for chunk in ledger.missing())
    size = 0
    for paths in journal_files(os.path.join(ledger.path, STATE)).values():
        for path in paths:
            with contextlib.suppress(OSError):  # its chunk was committed just now, or it cannot be read
                size += os.path.getsize(path)
    return rows, size


def verdict(tried: Sequence[Attempt], done: tuple[int, int], launch: str | None = None) -> int:
    """The exit code that an incomplete job, with ``done`` of its work, has come to by its attempts (oldest first).

    Of the attempt that began with ``launch``, or of the newest. 71 (lost) if there is none, or it has not ended. 70 if
    that and the ``FUTILE - 1`` attempts before it, of the same task of a job array, left nothing new: another one would
    not either."""
    of_launch = [attempt for attempt in tried if launch in (None, attempt.launch)]
    if not of_launch:
        return ExitCode.LOST_RANK
    newest = of_launch[-1]
    code = ExitCode.LOST_RANK if newest.code is None else newest.code
    row = [attempt for attempt in tried if attempt.task == newest.task and attempt.number <= newest.number][-FUTILE:]
    futile = len(row) == FUTILE and row[0].done == done
    return ExitCode.INTERNAL if code in RESUMABLE and futile else code


def code_of_job(path: str, max_error_fraction: float, launch: str | None = None, noted: int | None = None) -> int:
    """The exit code of the job in the output folder ``path``: ``noted``, which ``launch`` left if it failed, unless it
    came so far as to begin an attempt; else 0 or 3 if the job is complete; else the :func:`verdict`. JobError(73) if
    the folder's plan can't be read."""
    path = os.path.abspath(os.path.expanduser(path))
    tried = attempts(path)
    if noted is not None and not any(attempt.launch == launch for attempt in tried):
        return noted
    if not os.path.exists(os.path.join(path, STATE)):
        return verdict(tried, (0, 0), launch)
    ledger = Ledger.attach(path)
    success = ledger.success()
    if success is not None:
        return code_of_counts(success["counts"], max_error_fraction)
    return verdict(tried, work_done(ledger), launch)


def code_of_counts(counts: Mapping[str, int], max_error_fraction: float) -> int:
    """0, or 3 if more rows failed than this share of all. ``counts``: the complete job's, see results.count_results."""
    ok, failed = counts.get("ok", 0), counts.get("error", 0)
    return ExitCode.TOO_MANY_ERRORS if failed > max_error_fraction * (ok + failed) else ExitCode.COMPLETE


def _mtime(file: str) -> float:
    try:
        return os.stat(file).st_mtime
    except OSError:
        return 0.0


def _number(name: str) -> int:
    digits = name.partition(".")[0]
    return int(digits) if digits.isdecimal() else 0


def _encode(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, indent=2).encode() + b"\n"


def _read(file: str) -> dict[str, Any]:
    try:
        record = json.loads(read_bytes(file))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
