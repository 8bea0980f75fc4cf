"""A finished job's parts as fewer, larger files in a folder of their own: the same rows in the same order.

    TARGET/data-00000.parquet    consecutive parts, published whole (commit.py); its footer says which, and of what plan
    TARGET/_SUCCESS              JSON, last of all

The parts are read and stay as they are. The same call again goes on with what is missing: which parts make a file
follows from the plan and ``rows_per_file`` alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.data.commit import new_file, probe, publish, publish_bytes, read_bytes, remove
from batchinfer.data.digest import content_digest
from batchinfer.data.ledger import SUCCESS, Ledger, output_error
from batchinfer.data.part import part_name, read_part
from batchinfer.data.plan import Plan
from batchinfer.types import Chunk, ExitCode, JobError

META_KEY = b"batchinfer.compact"
ROW_GROUP_ROWS = 1 << 16
"""Parts are gathered up to this many rows for a row group, so that readers need few of them."""


def compact(source: str, target: str, rows_per_file: int) -> dict[str, Any]:
    """Make the files; what _SUCCESS of ``target`` says. ``rows_per_file``: a file ends with the part that reaches it.

    JobError(75): the job in ``source`` is not complete; (74): a part is damaged, or an I/O error; (73): ``target`` has
    other content, or cannot be written.
    """
    ledger = Ledger.attach(source)
    success = ledger.success()
    if success is None:
        raise JobError(
            f"the job in {source} is not complete: batchinfer status output.path={source}", ExitCode.INCOMPLETE
        )
    target = os.path.abspath(os.path.expanduser(target))
    groups = list(_groups(ledger.plan, rows_per_file))
    names = [f"data-{number:05d}.parquet" for number in range(len(groups))]
    try:
        os.makedirs(target, exist_ok=True)
        there = sorted(name for name in os.listdir(target) if name not in (*names, SUCCESS) and name[0] != ".")
        if there:
            reason = "give a new folder, and the same compact.rows_per_file as before in a folder of its own files"
            raise JobError(f"compact.path={target} holds other files ({there[0]}): {reason}", ExitCode.OUTPUT)
        probe(target)
        files = [_file(ledger, group, os.path.join(target, name)) for group, name in zip(groups, names, strict=True)]
        totals = {"plan": ledger.plan.id, "rows": ledger.plan.rows, "counts": success["counts"]}
        publish_bytes(target, SUCCESS, json.dumps({**totals, "files": files}, indent=1).encode())
        return json.loads(read_bytes(os.path.join(target, SUCCESS)))
    except OSError as error:
        raise output_error(target, error) from None


def _groups(plan: Plan, rows_per_file: int) -> Iterator[list[Chunk]]:
    group: list[Chunk] = []
    for chunk in plan.chunks:
        group.append(chunk)
        if sum(chunk.rows for chunk in group) >= rows_per_file:
            yield group
            group = []
    if group:
        yield group


def _file(ledger: Ledger, group: Sequence[Chunk], final: str) -> dict[str, Any]:
    """Make one file, unless it is there; its entry in _SUCCESS."""
    says = {"plan": ledger.plan.id, "chunks": [group[0].index, group[-1].index], "rows": sum(c.rows for c in group)}
    if not os.path.exists(final):
        temporary = os.path.join(os.path.dirname(final), f".{os.path.basename(final)}.{secrets.token_hex(16)}.tmp")
        try:
            contents = _write(ledger, group, temporary, says)
            _check(temporary, group, contents)
            publish(temporary, final)
        finally:
            remove(temporary)
    found = json.loads((pq.read_metadata(final).metadata or {}).get(META_KEY, b"null"))
    if found != says:
        raise JobError(f"{final} is of another job, or was made with another compact.rows_per_file", ExitCode.OUTPUT)
    with open(final, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)
    return {"name": os.path.basename(final), **says, "bytes": os.path.getsize(final), "sha256": digest}


def _sha256(file: Any) -> str:
    """hashlib.file_digest of Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _write(ledger: Ledger, group: Sequence[Chunk], path: str, says: dict[str, Any]) -> list[str]:
    """The parts' rows into a new file; the content digest of each part."""
    contents: list[str] = []
    waiting: list[pa.Table] = []
    parts = (read_part(ledger.path, ledger.plan, chunk) for chunk in group)
    first = next(parts)
    options = {"compression": "zstd", "write_page_checksum": True}
    with new_file(path) as fd, open(fd, "wb", closefd=False) as file:
        with pq.ParquetWriter(file, first[1].schema, **options) as writer:
            for info, table in itertools.chain([first], parts):
                contents.append(info.content)
                waiting.append(table)
                if sum(table.num_rows for table in waiting) >= ROW_GROUP_ROWS or len(contents) == len(group):
                    rows = pa.concat_tables(waiting)
                    writer.write_table(rows, row_group_size=rows.num_rows)
                    waiting = []
            writer.add_key_value_metadata({META_KEY: json.dumps(says)})
    return contents


def _check(path: str, group: Sequence[Chunk], contents: Sequence[str]) -> None:
    """Read the new file back: row groups are whole parts, and each has the values that its part has."""
    todo = list(zip(group, contents, strict=True))
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for number in range(file.num_row_groups):
            rows = file.read_row_group(number)
            start = 0
            while start < rows.num_rows:
                chunk, content = todo.pop(0)
                if content_digest(rows.slice(start, chunk.rows)) != content:
                    raise JobError(f"{path} was read back with other values than {part_name(chunk)}", ExitCode.IO)
                start += chunk.rows
    if todo:
        raise JobError(f"{path} was read back without {part_name(todo[0][0])}", ExitCode.IO)
