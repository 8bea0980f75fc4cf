"""Questions about an output folder: how far is it, and is it right?"""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from data.fakes import rows_of, small_plan

from batchinfer.data.audit import status, verify
from batchinfer.data.ledger import Ledger, open_job
from batchinfer.data.part import part_name
from batchinfer.types import ExitCode, JobError


@pytest.fixture
def job(tmp_path: Path) -> Ledger:
    """A complete job of 10 rows in parts of 3, 3 and 4."""
    job = open_job(str(tmp_path / "out"), small_plan(tmp_path / "input"))
    for chunk in job.plan.chunks:
        job.commit(chunk, rows_of(chunk), {"counts": {"ok": chunk.rows - 1, "error": 1}})
    job.finish()
    return job


def part(job: Ledger, index: int) -> Path:
    return Path(job.path) / part_name(job.plan.chunks[index])


@pytest.mark.feature("commands", "status: progress of a job from its output folder alone")
def test_status_on_the_way(tmp_path: Path):
    job = open_job(str(tmp_path / "out"), small_plan(tmp_path / "input"))
    assert status(job.path).chunks_done == 0
    job.commit(job.plan.chunks[2], rows_of(job.plan.chunks[2]), {"counts": {"ok": 3, "error": 1}})
    found = status(job.path)
    assert (found.chunks, found.chunks_done, found.rows, found.rows_done) == (3, 1, 10, 4)
    assert found.counts == {"ok": 3, "error": 1}
    assert not found.complete
    report = verify(job.path)
    assert report.ok
    assert (report.parts_good, report.rows_missing, report.rows_doubled) == (1, 6, 0)
    assert report.missing == ["part-000000.parquet", "part-000001.parquet"]


def test_a_complete_job(job: Ledger):
    found = status(job.path)
    assert (found.chunks_done, found.rows_done, found.counts, found.complete) == (3, 10, {"ok": 7, "error": 3}, True)
    report = verify(job.path)
    assert report.ok
    assert (report.parts_good, report.missing, report.bad) == (3, [], {})
    assert "complete: 3 of 3 parts are whole" in str(report)


def test_no_output_folder(tmp_path: Path):
    for ask in (status, verify):
        with pytest.raises(JobError, match="is no output folder") as caught:
            ask(str(tmp_path))
        assert caught.value.exit_code == ExitCode.OUTPUT


def test_nothing_is_changed(job: Ledger):
    def state() -> dict[str, tuple[str, int]]:
        files = [path for path in Path(job.path).rglob("*") if path.is_file()]
        return {str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}

    part(job, 1).write_bytes(b"broken")
    before = state()
    verify(job.path)
    status(job.path)
    assert state() == before


@pytest.mark.feature("commands", "verify: flipped bits, truncated, swapped, doubled and missing parts are found")
def test_a_flipped_bit_anywhere(job: Ledger):
    rng = random.Random(5)
    for _ in range(100):
        path = part(job, rng.randrange(3))
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(bad))
        report = verify(job.path)
        assert not report.ok
        assert list(report.bad) == [path.name]
        assert f"BAD {path.name}" in str(report)
        path.write_bytes(good)
    assert verify(job.path).ok


@pytest.mark.parametrize("keep", [0, 10, -1])
def test_a_truncated_part(job: Ledger, keep: int):
    part(job, 0).write_bytes(part(job, 0).read_bytes()[:keep])
    assert list(verify(job.path).bad) == ["part-000000.parquet"]


@pytest.mark.feature("commands", "verify: flipped bits, truncated, swapped, doubled and missing parts are found")
def test_parts_that_changed_places(job: Ledger):
    one, two = part(job, 0).read_bytes(), part(job, 1).read_bytes()
    part(job, 0).write_bytes(two)
    part(job, 1).write_bytes(one)
    report = verify(job.path)
    assert sorted(report.bad) == ["part-000000.parquet", "part-000001.parquet"]
    assert (report.rows_missing, report.rows_doubled) == (0, 0)


def test_a_part_that_is_there_twice(job: Ledger):
    (Path(job.path) / "part-000099.parquet").write_bytes(part(job, 2).read_bytes())
    report = verify(job.path)
    assert not report.ok
    assert "no such part" in report.bad["part-000099.parquet"]
    assert (report.rows_missing, report.rows_doubled) == (0, 4)


def test_a_part_in_the_place_of_another(job: Ledger):
    part(job, 1).write_bytes(part(job, 0).read_bytes())
    report = verify(job.path)
    assert "it is chunk 0" in report.bad["part-000001.parquet"]
    assert (report.rows_missing, report.rows_doubled) == (3, 3)


def test_a_part_missing_from_a_complete_job(job: Ledger):
    os.unlink(part(job, 2))
    report = verify(job.path)
    assert not report.ok
    assert report.missing == ["part-000002.parquet"]
    assert report.rows_missing == 4


def test_parts_of_other_programs_and_other_jobs(job: Ledger, tmp_path: Path):
    other = open_job(str(tmp_path / "other"), small_plan(tmp_path / "input", seed=1))
    other.commit(other.plan.chunks[0], rows_of(other.plan.chunks[0]))
    part(job, 0).write_bytes(part(other, 0).read_bytes())
    pq.write_table(rows_of(job.plan.chunks[1]), part(job, 1))
    report = verify(job.path)
    assert "belongs to plan" in report.bad["part-000000.parquet"]
    assert "not written by batchinfer" in report.bad["part-000001.parquet"]


def test_a_part_made_anew_after_success(job: Ledger):
    """Whole and of the right rows, but not the file that was there when the job ended."""
    chunk = job.plan.chunks[0]
    os.unlink(part(job, 0))
    Ledger.attach(job.path).commit(chunk, rows_of(chunk))
    assert verify(job.path).bad == {"part-000000.parquet": "it is not the file that _SUCCESS lists"}


@pytest.mark.parametrize("content", ["", "[]", '{"plan": "f", "parts": []}', '{"plan": 1}'])
def test_a_damaged_success_file(job: Ledger, content: str):
    (Path(job.path) / "_SUCCESS").write_text(content)
    report = verify(job.path)
    assert "_SUCCESS" in report.bad
    assert not report.ok


def test_a_damaged_plan(job: Ledger):
    path = Path(job.path) / "_batchinfer" / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows_per_chunk": 5, "chunks": [[0, 0, 10]]}))
    with pytest.raises(JobError, match="damaged"):
        verify(job.path)
