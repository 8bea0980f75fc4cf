"""The order of calls that makes a published file durable: what a killed process can't show, because its pages survive.

A file is published only after it was written, synced, closed and read back; its folder is synced after that.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from faults.harness import Bench
from faults.shim import Call, Fault, read_record

PUBLISHED = ("_batchinfer/plan.json", "part-000000.parquet", "part-000006.parquet", "_SUCCESS")
METADATA = ("open", "link", "symlink", "rename", "renameat2", "unlink", "mkdir", "stat", "opendir")


@pytest.fixture
def record(bench: Bench) -> list[Call]:
    output = bench.place()
    file = output.parent.with_suffix(".record")
    code, log = bench.run(output, {"job.journal_seconds": 60.0}, fault=Fault(reads=True, record=str(file)))
    assert code == 0, log
    return read_record(file, output)


def index(record: list[Call], name: str, path: str, after: int = -1) -> int:
    """Where the first such call after another one is."""
    found = (i for i, call in enumerate(record) if i > after and call.name == name and path in (call.path, call.other))
    at = next(found, None)
    assert at is not None, f"no {name} of {path} after call {after}"
    return at


@pytest.mark.parametrize("final", PUBLISHED)
@pytest.mark.feature("job", "published files are synced before they get their name, their folder after it")
def test_a_file_is_synced_before_it_is_published_and_its_folder_after(final: str, record: list[Call]) -> None:
    link = index(record, "link", final)
    temporary = record[link].path
    opened = index(record, "open", temporary)
    written = max(i for i, call in enumerate(record) if call.name == "write" and call.path == temporary)
    synced = index(record, "fsync", temporary, written)
    closed = index(record, "close", temporary, synced)
    folder = os.path.dirname(final) or "."
    folder_synced = index(record, "fsync", folder, link)
    assert opened < written < synced < closed < link < folder_synced
    assert index(record, "unlink", temporary, folder_synced) > folder_synced
    assert os.path.dirname(temporary) == os.path.dirname(final)  # a rename elsewhere may fail with EXDEV
    assert os.path.basename(temporary).startswith(".")  # readers of Parquet folders pass these over
    assert not [call for call in record[link + 1 :] if call.name == "write" and call.path in (temporary, final)]


def test_a_part_is_read_back_before_it_is_published(record: list[Call]) -> None:
    link = index(record, "link", "part-000003.parquet")
    temporary = record[link].path
    closed = index(record, "close", temporary)
    assert closed < index(record, "open", temporary, closed) < index(record, "read", temporary, closed) < link


def test_nothing_is_ever_renamed_over_a_published_name(record: list[Call]) -> None:
    renamed = [call for call in record if call.name.startswith("rename")]
    assert all(Path(call.other).parts[:2] == ("_batchinfer", "attempts") for call in renamed)
    assert not [call for call in record if call.name == "unlink" and call.path in PUBLISHED]


def test_a_chunk_costs_few_metadata_operations(record: list[Call]) -> None:
    """Metadata servers are what a thousand ranks share."""
    first, second = (index(record, "link", f"part-{i:06d}.parquet") for i in (2, 3))
    assert len([call for call in record[first:second] if call.name in METADATA]) <= 12
