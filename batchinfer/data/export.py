"""A finished job's rows as lines of JSON, in the order of the input: plain, or as OpenAI batch results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from batchinfer.data.commit import file_for
from batchinfer.data.ledger import SUCCESS, Ledger
from batchinfer.data.openai_batch import JobFacts, result_line
from batchinfer.data.part import read_part
from batchinfer.types import ExitCode, JobError


def export(source: str, target: str, layout: str) -> int:
    """Write ``target``; the number of lines. ``layout`` is "rows" (every column) or "openai".

    JobError(75): the job in ``source`` is not complete; (74): a part is damaged; (64): the layout needs a column that
    is not there; (73): ``target`` exists or cannot be written.
    """
    ledger = Ledger.attach(source)
    if ledger.success() is None:
        reason = f"is not complete: batchinfer status output.path={source}"
        raise JobError(f"the job in {source} {reason}", ExitCode.INCOMPLETE)
    count = 0
    lines = _results(ledger) if layout == "openai" else _rows(ledger)
    with file_for("export.path", os.path.expanduser(target)) as fd:
        with open(fd, "w", encoding="utf-8", newline="\n", closefd=False) as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
                count += 1
    return count


def _rows(ledger: Ledger) -> Iterator[dict[str, Any]]:
    for chunk in ledger.plan.chunks:
        yield from read_part(ledger.path, ledger.plan, chunk)[1].to_pylist()


def _results(ledger: Ledger) -> Iterator[dict[str, Any]]:
    created = int(os.stat(os.path.join(ledger.path, SUCCESS)).st_mtime)
    fingerprint = ledger.plan.fingerprint
    prefix = fingerprint["output"]["prefix"]
    number = 0
    for chunk in ledger.plan.chunks:
        info, table = read_part(ledger.path, ledger.plan, chunk)
        if "custom_id" not in table.column_names:
            known = ", ".join(table.column_names)
            raise JobError(
                f"export.format=openai needs a column custom_id, and the output has {known}: pass it through with "
                "input.columns=[custom_id], or use export.format=rows",
                ExitCode.USAGE,
            )
        model = os.path.basename(str(info.provenance.get("model", "")).rstrip("/"))
        job = JobFacts(ledger.plan.id, model, "messages_column" in fingerprint["input"], created, prefix)
        for row in table.to_pylist():
            yield result_line(row, number, job)
            number += 1
