"""Only the error rows of an earlier output are computed again; its good rows are taken over as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engine import FakeEngine, identify_fake

from batchinfer import job
from batchinfer.cluster.world import World
from batchinfer.config import Config, from_dict, to_dict
from batchinfer.data.audit import verify
from batchinfer.types import ExitCode, JobError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """30 rows, two of which are too long for a short model."""
    texts = [f"row {i}" + " and more" * 30 * (i in (4, 17)) for i in range(30)]
    pq.write_table(pa.table({"i": range(30), "prompt": texts}), tmp_path / "in.parquet", row_group_size=8)
    return tmp_path / "in.parquet"


def run(source: Path, output: Path, max_len: int, **changes: Any) -> FakeEngine | None:
    """A job whose engine takes so many tokens; the engine, if one was loaded."""
    values = to_dict(Config())
    given = {"model__path": "m", "input__path": str(source), "output__path": str(output), "sampling__max_tokens": 16}
    given |= {"output__rows_per_chunk": 7, "job__max_error_fraction": 1.0, **changes}
    for key, value in given.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    engines: list[FakeEngine] = []

    def load(*_: object, **__: object) -> FakeEngine:
        engines.append(FakeEngine(max_seq_len=max_len))
        return engines[0]

    assert job.run(from_dict(values), World(), load, identify_fake) == 0
    return engines[0] if engines else None


def rows(output: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(output.glob("part-*")) for row in pq.read_table(part).to_pylist()]


@pytest.mark.feature("job", "input.retry_errors_of: only the error rows of a finished output again, into a new one")
@pytest.mark.parametrize(
    "settings", [{}, {"output__token_ids": True}, {"sampling__n": 3}, {"sampling__n": 2, "output__prefix": "x_"}]
)
def test_only_error_rows_are_computed(source: Path, tmp_path: Path, settings: dict[str, Any]):
    run(source, tmp_path / "short", 100, **settings)
    run(source, tmp_path / "long", 1000, **settings)
    before = {path: path.read_bytes() for path in (tmp_path / "short").rglob("*") if path.is_file()}
    again = {"input__retry_errors_of": str(tmp_path / "short"), "output__rows_per_chunk": 1000}
    engine = run(source, tmp_path / "again", 1000, **settings, **again)
    assert engine.added == 2
    assert rows(tmp_path / "again") == rows(tmp_path / "long")
    status = settings.get("output__prefix", "") + "status"
    assert [row["i"] for row in rows(tmp_path / "short") if row[status] == "error"] == [4, 17]
    assert verify(str(tmp_path / "again")).ok
    assert before == {path: path.read_bytes() for path in (tmp_path / "short").rglob("*") if path.is_file()}
    assert run(source, tmp_path / "again", 1000, **settings, **again) is None  # complete


def test_what_is_refused(source: Path, tmp_path: Path):
    def refused(output: str, **changes: Any) -> JobError:
        given = {"input__retry_errors_of": str(tmp_path / "short"), **changes}
        with pytest.raises(JobError) as caught:
            run(source, tmp_path / output, 1000, **given)
        return caught.value

    assert refused("a").exit_code == ExitCode.OUTPUT  # there is no such output
    run(source, tmp_path / "short", 100)
    error = refused("b", output__token_ids=True)
    assert error.exit_code == ExitCode.USAGE
    assert "token_ids" in str(error)
    run(source, tmp_path / "plain", 1000)
    error = refused("plain")
    assert error.exit_code == ExitCode.MISMATCH  # with and without it, it is another job
    assert "input.retry_errors_of" in str(error)
    (tmp_path / "short" / "_SUCCESS").rename(tmp_path / "success")
    assert refused("c").exit_code == ExitCode.INCOMPLETE
    (tmp_path / "success").rename(tmp_path / "short" / "_SUCCESS")
    pq.write_table(pq.read_table(source).slice(1), source)
    error = refused("d")
    assert error.exit_code == ExitCode.MISMATCH
    assert "in.parquet" in str(error)
