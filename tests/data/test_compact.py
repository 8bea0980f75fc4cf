"""Larger files out of a job's parts: the same rows, the parts as they were."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.fakes import rows_of, small_plan

from batchinfer.data import compact as module
from batchinfer.data.compact import compact
from batchinfer.data.ledger import Ledger, open_job
from batchinfer.data.part import PartInfo, part_name
from batchinfer.types import ExitCode, JobError


@pytest.fixture
def job(tmp_path: Path) -> Ledger:
    """A complete job of 100 rows in 25 parts."""
    job = open_job(str(tmp_path / "out"), small_plan(tmp_path / "input", rows=100))
    for chunk in job.plan.chunks:
        job.commit(chunk, rows_of(chunk), {"counts": {"ok": chunk.rows, "error": 0}})
    job.finish()
    return job


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("data-*.parquet"))


@pytest.mark.feature("commands", "compact: a finished job's parts merged into larger files elsewhere")
@pytest.mark.parametrize(("rows_per_file", "rows"), [(30, [32, 32, 32, 4]), (1, [4] * 25), (10**6, [100])])
def test_the_same_rows_in_larger_files(job: Ledger, tmp_path: Path, rows_per_file: int, rows: list[int]):
    parts = {path: path.read_bytes() for path in Path(job.path).rglob("*") if path.is_file()}
    target = tmp_path / "large"
    made = compact(job.path, str(target), rows_per_file)
    assert [pq.read_metadata(path).num_rows for path in files(target)] == rows
    everything = pa.concat_tables([pq.read_table(path) for path in files(target)])
    assert everything == pa.concat_tables([rows_of(chunk) for chunk in job.plan.chunks])
    assert json.loads((target / "_SUCCESS").read_text()) == made
    assert (made["rows"], made["counts"], made["plan"]) == (100, {"ok": 100, "error": 0}, job.plan.id)
    assert [file["rows"] for file in made["files"]] == rows
    assert parts == {path: path.read_bytes() for path in Path(job.path).rglob("*") if path.is_file()}
    assert sorted(os.listdir(target)) == sorted([*(path.name for path in files(target)), "_SUCCESS"])


def test_row_groups_are_gathered_of_whole_parts(job: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "ROW_GROUP_ROWS", 10)
    compact(job.path, str(tmp_path / "large"), 30)
    metadata = pq.read_metadata(files(tmp_path / "large")[0])
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [12, 12, 8]


def test_it_goes_on_where_it_was(job: Ledger, tmp_path: Path):
    target = tmp_path / "large"
    whole = compact(job.path, str(target), 30)
    kept = files(target)[0].stat()
    for path in (*files(target)[1:], target / "_SUCCESS"):
        path.unlink()
    (target / ".data-00001.parquet.0123.tmp").write_bytes(b"a scrap")
    assert compact(job.path, str(target), 30) == whole
    assert files(target)[0].stat() == kept


def test_what_is_refused(job: Ledger, tmp_path: Path):
    def refused(source: str, target: Path, rows: int = 30) -> JobError:
        with pytest.raises(JobError) as caught:
            compact(source, str(target), rows)
        return caught.value

    compact(job.path, str(tmp_path / "large"), 30)
    os.unlink(tmp_path / "large" / "_SUCCESS")
    error = refused(job.path, tmp_path / "large", 40)
    assert error.exit_code == ExitCode.OUTPUT
    assert "rows_per_file" in str(error)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("important")
    assert "thesis.txt" in str(refused(job.path, tmp_path / "mine"))
    assert refused(job.path, Path(job.path)).exit_code == ExitCode.OUTPUT
    assert refused(str(tmp_path), tmp_path / "a").exit_code == ExitCode.OUTPUT

    victim = Path(job.path) / part_name(job.plan.chunks[3])
    data = bytearray(victim.read_bytes())
    data[20] ^= 1
    victim.write_bytes(bytes(data))
    error = refused(job.path, tmp_path / "b")
    assert error.exit_code == ExitCode.IO
    assert victim.name in str(error)
    assert os.listdir(tmp_path / "b") == []

    os.unlink(Path(job.path) / "_SUCCESS")
    assert refused(job.path, tmp_path / "c").exit_code == ExitCode.INCOMPLETE


def test_what_is_read_back_must_be_what_the_parts_hold(job: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = module.read_part

    def other_rows(*part: Any) -> tuple[PartInfo, pa.Table]:
        info, table = real(*part)
        return info, table.slice(0, table.num_rows - 1)

    monkeypatch.setattr(module, "read_part", other_rows)
    with pytest.raises(JobError, match="read back"):
        compact(job.path, str(tmp_path / "large"), 30)
    assert os.listdir(tmp_path / "large") == []
