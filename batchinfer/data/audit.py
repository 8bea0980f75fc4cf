"""How far is a job, and is its output right? Answered from the files of the output folder alone, changing none."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from batchinfer.data.attempts import Attempt, Commit, attempts, speeds
from batchinfer.data.commit import read_bytes
from batchinfer.data.ledger import SUCCESS, Ledger, in_threads, load_plan, success_record
from batchinfer.data.part import BadPart, PartInfo, check_identity, decode_part, part_name, read_info
from batchinfer.data.plan import Plan
from batchinfer.types import Chunk

PART = re.compile(r"part-[0-9]{6,}\.parquet")


@dataclass(frozen=True)
class Status:
    """How far a job is. ``counts`` sums what the parts' footers say (see results.count_results). ``attempts``: oldest
    first. ``speeds``: rows per second by rank or task, see attempts.speeds."""

    plan: str
    chunks: int
    chunks_done: int
    rows: int
    rows_done: int
    counts: dict[str, int]
    complete: bool
    attempts: list[Attempt] = field(default_factory=list)
    speeds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found. ``bad``: part name -> what is wrong. ``missing``: parts that are not there yet, which
    is no fault in itself. ``rows_missing`` and ``rows_doubled`` count row identities over all readable parts."""

    plan: str
    parts: int
    parts_good: int
    rows: int
    rows_missing: int
    rows_doubled: int
    complete: bool
    missing: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether all that is there is right, and all is there if _SUCCESS says so."""
        return not self.bad and not self.rows_doubled and not (self.complete and self.missing)

    def __str__(self) -> str:
        state = "complete" if self.complete else "not complete"
        lines = [
            f"plan {self.plan[:12]}, {state}: {self.parts_good} of {self.parts} parts are whole, {len(self.missing)} "
            f"missing, {len(self.bad)} bad; of {self.rows} rows {self.rows_missing} are missing, "
            f"{self.rows_doubled} are there twice"
        ]
        return "\n".join(lines + [f"BAD {name}: {reason}" for name, reason in sorted(self.bad.items())])


def status(output_path: str) -> Status:
    """Reads the footers of the parts. JobError(73) if this is no output folder."""
    path = os.path.abspath(os.path.expanduser(output_path))
    plan = load_plan(path)

    def look(chunk: Chunk) -> tuple[PartInfo, float] | None:
        file = os.path.join(path, part_name(chunk))
        try:
            return read_info(file), os.stat(file).st_mtime
        except (OSError, BadPart):
            return None

    names = set(os.listdir(path))
    done = [chunk for chunk in plan.chunks if part_name(chunk) in names]
    counts: Counter[str] = Counter()
    commits = []
    for info, time in filter(None, in_threads(look, tuple(done))):
        counts.update(info.counts)
        made = info.provenance
        commits.append(Commit(str(made.get("attempt")), int(made.get("rank") or 0), info.rows, time))
    tried = attempts(path)
    return Status(
        plan=plan.id,
        chunks=len(plan.chunks),
        chunks_done=len(done),
        rows=plan.rows,
        rows_done=sum(chunk.rows for chunk in done),
        counts=dict(counts),
        complete=Ledger(path, plan).promises(),
        attempts=tried,
        speeds=speeds(tried, commits),
    )


def verify(output_path: str) -> Report:
    """Reads every byte of every part: checksums, digests, identity, and that no row is missing or there twice.

    JobError(73) if this is no output folder of batchinfer, or its plan is damaged.
    """
    path = os.path.abspath(os.path.expanduser(output_path))
    plan = load_plan(path)
    planned = {part_name(chunk): chunk for chunk in plan.chunks}
    strangers = [name for name in os.listdir(path) if PART.fullmatch(name) and name not in planned]
    bad: dict[str, str] = {}
    missing: list[str] = []

    def look(name: str) -> tuple[str, tuple[PartInfo, int]] | None:
        try:
            data = read_bytes(os.path.join(path, name))
            info, _ = decode_part(data)
        except FileNotFoundError:
            missing.append(name)
            return None
        except (OSError, BadPart) as error:
            bad[name] = str(error)
            return None
        try:
            if name not in planned:
                raise BadPart("the plan has no such part")
            check_identity(info, plan, planned[name])
        except BadPart as error:
            bad[name] = str(error)
        return name, (info, len(data))

    infos = dict(found for found in in_threads(look, [*planned, *strangers]) if found)
    complete = Ledger(path, plan).promises()
    if complete:
        bad = _against_success(path, plan, infos) | bad
    rows_missing, rows_doubled = _row_balance(plan, [info for info, _ in infos.values()])
    return Report(
        plan=plan.id,
        parts=len(planned),
        parts_good=len([name for name in planned if name in infos and name not in bad]),
        rows=plan.rows,
        rows_missing=rows_missing,
        rows_doubled=rows_doubled,
        complete=complete,
        missing=sorted(missing),
        bad=bad,
    )


def _against_success(path: str, plan: Plan, infos: dict[str, tuple[PartInfo, int]]) -> dict[str, str]:
    """Parts that are not those which _SUCCESS lists; _SUCCESS itself, if its sums are not theirs."""
    try:
        record = json.loads(read_bytes(os.path.join(path, SUCCESS)))
        listed = {part["name"]: part["sha256"] for part in record["parts"]}
        if record["plan"] != plan.id:
            return {SUCCESS: f"it belongs to plan {record['plan'][:12]}"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {SUCCESS: f"it cannot be read: {error}"}
    different = {
        name: f"it is not the file that {SUCCESS} lists"
        for name, (info, _) in infos.items()
        if listed.get(name) != info.sha256
    }
    if not different and len(infos) == len(plan.chunks):
        found = success_record(plan, [infos[part_name(chunk)] for chunk in plan.chunks])
        wrong = [key for key, value in found.items() if record.get(key) != value]
        if wrong:
            return {SUCCESS: f"its {', '.join(wrong)} are not those of the parts"}
    return different


def _row_balance(plan: Plan, infos: Iterable[PartInfo]) -> tuple[int, int]:
    """(rows of the plan that no part has, rows that a second part has, counted once for every further one)."""
    ids = {plan.id, *plan.earlier}
    covered = doubled = 0
    reached = (0, 0)  # file ordinal, and the first row after those seen
    for ordinal, start, rows in sorted((i.ordinal, i.start, i.rows) for i in infos if i.plan in ids):
        seen_up_to = reached[1] if reached[0] == ordinal else 0
        fresh = max(0, start + rows - max(start, seen_up_to))
        covered += fresh
        doubled += rows - fresh
        reached = (ordinal, max(seen_up_to, start + rows))
    return plan.rows - covered, doubled
