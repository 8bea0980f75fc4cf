"""A rank that must stop: nothing is lost, and the next attempt goes on in the middle of a sample."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_job import configure, given_up, never, parts, prompts, rows_of, run

from batchinfer import job
from batchinfer.cluster.deadline import DRAIN_FILE
from batchinfer.data.audit import verify
from batchinfer.data.journal import journal_files
from batchinfer.types import Completion, ExitCode, JobError

STATE = "_batchinfer"


class Interrupted(FakeEngine):
    """Calls ``then`` after so many steps."""

    def __init__(self, after: int, then: Callable[[], object], **options: Any):
        super().__init__(**options)
        self._after, self._then = after, then

    def step(self) -> list[Completion]:
        done = super().step()
        if self._stats.steps == self._after:
            self._then()
        return done


class Signal:
    """What batchinfer.cluster.signals has received."""

    name: str | None = None

    def send(self) -> None:
        self.name = "SIGUSR1"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A file of 87 rows."""
    path = tmp_path / "in" / "a.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"prompt": prompts(87)}), path)
    return path.parent


@pytest.fixture
def signal(monkeypatch: pytest.MonkeyPatch) -> Signal:
    signal = Signal()
    monkeypatch.setattr(job.signals, "received", lambda: signal.name)
    return signal


def newest_attempt(output: Path) -> dict[str, Any]:
    return json.loads(max((output / STATE / "attempts").glob("*.end.json")).read_text())


@pytest.mark.feature("job", "USR1, USR2, TERM, a file DRAIN or the end of the allocation: drain, exit 75, go on later")
def test_a_signal_stops_the_job_and_the_next_attempt_goes_on_in_the_middle(
    signal: Signal, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configure(inputs, tmp_path / "out", output__rows_per_chunk=40)
    first = Interrupted(5, signal.send)
    assert run(config, lambda *_, **__: first) == ExitCode.INCOMPLETE
    assert first.closed
    assert parts(tmp_path / "out") == []
    assert "stopped, signal SIGUSR1; 87 rows are not committed: the same command goes on" in capfd.readouterr().err
    assert newest_attempt(tmp_path / "out")["exit_code"] == ExitCode.INCOMPLETE
    assert journal_files(str(tmp_path / "out" / STATE))

    signal.name = None
    second = FakeEngine()
    assert run(config, lambda *_, **__: second) == 0
    assert second.resumed > 0
    finished_before = 87 - second.added
    assert finished_before > 0
    assert run(configure(inputs, tmp_path / "whole", output__rows_per_chunk=40)) == 0
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")
    assert verify(str(tmp_path / "out")).ok
    assert not (tmp_path / "out" / STATE / "journal").exists()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stops=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    kinds=st.lists(st.booleans(), min_size=4, max_size=4),
    journal_seconds=st.sampled_from([0.0, 60.0]),
    samples=st.integers(1, 3),
)
def test_any_drains_and_crashes_give_the_output_of_one_run(
    stops: list[int],
    kinds: list[bool],
    journal_seconds: float,
    samples: int,
    signal: Signal,
    inputs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    output = tmp_path_factory.mktemp("drain") / "out"
    whole = inputs.parent / f"whole{samples}"
    if not whole.exists():
        assert run(configure(inputs, whole, sampling__n=samples)) == 0
    changes = {"output__rows_per_chunk": 25, "sampling__n": samples, "job__journal_seconds": journal_seconds}
    config = configure(inputs, output, **changes)
    for step, drain in zip(stops, kinds, strict=False):
        signal.name = None
        then = signal.send if drain else crash
        with contextlib.suppress(JobError):
            run(config, lambda *_, step=step, then=then, **__: Interrupted(step, then))
    signal.name = None
    run(config)
    assert given_up(rows_of(output), rows_of(whole)) < max(1, kinds[: len(stops)].count(False))
    assert verify(str(output)).ok


def crash() -> None:
    raise RuntimeError("the device went away")


def test_a_crash_costs_only_the_rows_since_the_last_record(inputs: Path, tmp_path: Path) -> None:
    """With a record after each row, what had finished is not computed again."""

    class Engine(Interrupted):
        finished = 0

        def step(self) -> list[Completion]:
            done = super().step()  # raises in the last one: its rows have not come out
            self.finished += len(done)
            return done

    config = configure(inputs, tmp_path / "out", output__rows_per_chunk=100, job__journal_seconds=0.0)
    engine = Engine(12, crash)
    with pytest.raises(JobError, match="went away"):
        run(config, lambda *_, **__: engine)
    assert engine.finished > 0
    second = FakeEngine()
    assert run(config, lambda *_, **__: second) == 0
    assert second.added == 87 - engine.finished


def test_a_signal_before_the_engine_is_loaded_ends_the_job_without_it(
    signal: Signal, inputs: Path, tmp_path: Path
) -> None:
    signal.send()
    assert run(configure(inputs, tmp_path / "out"), never) == ExitCode.INCOMPLETE


def test_a_file_stops_the_job_until_it_is_removed(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configure(inputs, tmp_path / "out")
    file = tmp_path / "out" / STATE / DRAIN_FILE
    file.parent.mkdir(parents=True)
    file.touch()
    assert run(config, never) == ExitCode.INCOMPLETE
    assert f"{file} is there: remove it before the next run" in capfd.readouterr().err
    file.unlink()
    assert run(config) == 0


def test_an_allocation_that_ends_soon_is_not_begun(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    assert run(configure(inputs, tmp_path / "out"), never) == ExitCode.INCOMPLETE
    assert "the allocation ends soon" in capfd.readouterr().err
    assert run(configure(inputs, tmp_path / "out", job__margin_seconds=10.0)) == 0


def test_a_journal_that_cannot_be_written_is_told_and_costs_no_row(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("batchinfer.data.journal._append", full)
    assert run(configure(inputs, tmp_path / "out", job__journal_seconds=0.0)) == 0
    assert "the journal of rank 0" in capfd.readouterr().err
    assert verify(str(tmp_path / "out")).ok


class Fragile(FakeEngine):
    """Crashes when this row is in it, in the step after it came in."""

    def __init__(self, poison: int, seen: list[list[int]], **options: Any):
        super().__init__(**options)
        self._poison, self._seen = poison, seen
        self._inside: list[int] = []

    def add(self, request: Any) -> None:
        super().add(request)
        self._inside.append(request.id)

    def step(self) -> list[Completion]:
        if self._poison in self._inside:
            self._seen.append(self._inside)
            crash()
        done = super().step()
        self._inside = [row for row in self._inside if row not in {completion.id for completion in done}]
        return done


@pytest.mark.feature("job", "a row that crashes the engine twice, the second time alone, becomes an error row")
def test_a_row_that_crashes_the_engine_is_found_and_given_up(inputs: Path, tmp_path: Path) -> None:
    config = configure(inputs, tmp_path / "out", job__max_error_fraction=0.1)
    crashes: list[list[int]] = []
    for _ in range(2):
        with pytest.raises(JobError, match="lets these rows run alone, after all others") as caught:
            run(config, lambda *_, **__: Fragile(33, crashes))
        assert caught.value.exit_code == ExitCode.LOST_RANK
    assert len(crashes[0]) > 1
    assert crashes[1] == [33]
    held = {33 // 10} | {row // 10 for row in crashes[0]}
    assert len(parts(tmp_path / "out")) >= 9 - len(held)  # all others were computed before the suspects
    assert run(config, lambda *_, **__: Fragile(33, crashes)) == 0
    assert len(crashes) == 2
    rows = rows_of(tmp_path / "out")
    assert [row["error_code"] for row in rows] == ["ENGINE_CRASH" if i == 33 else None for i in range(87)]
    assert run(configure(inputs, tmp_path / "whole")) == 0
    whole = rows_of(tmp_path / "whole")
    assert [row for i, row in enumerate(rows) if i != 33] == [row for i, row in enumerate(whole) if i != 33]
    assert not (tmp_path / "out" / STATE / "suspects").exists()


@pytest.mark.feature("job", "a row that takes too long becomes an error row with the text so far")
def test_a_row_that_takes_too_long_is_an_error_with_the_text_so_far(inputs: Path, tmp_path: Path) -> None:
    class Stuck(FakeEngine):
        """Row 7 never ends."""

        def step(self) -> list[Completion]:
            for entry in self._running:
                entry[0] += entry[1].id == 7 and entry[0] == 1
            return super().step()

    config = configure(inputs, tmp_path / "out", job__row_seconds=0.5, job__max_error_fraction=0.1)
    assert run(config, lambda *_, **__: Stuck()) == 0
    rows = rows_of(tmp_path / "out")
    assert [i for i, row in enumerate(rows) if row["status"] == "error"] == [7]
    assert rows[7]["error_code"] == "TIMEOUT"
    assert rows[7]["error"] == "not finished after job.row_seconds=0.5"
    assert rows[7]["finish_reason"] is None
