"""Records of attempts, and what a launcher concludes from them."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from data.fakes import rows_of, small_plan

from batchinfer.data.attempts import Attempt, Commit, attempts, begin, code_of_job, end, speeds, verdict
from batchinfer.data.ledger import Ledger, open_job
from batchinfer.types import ExitCode, JobError


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A job of three chunks, 4 + 4 + 2 rows, none done."""
    return open_job(str(tmp_path / "out"), small_plan(tmp_path))


def test_what_is_written_is_read(ledger: Ledger) -> None:
    assert attempts(ledger.path) == []
    assert begin(ledger.path, {"done": [0, 0], "launch": "job 7", "task": 3}) == 1
    assert begin(ledger.path, {"done": [4, 100]}) == 2
    end(ledger.path, 1, {"exit_code": 75})
    end(ledger.path, 1, {"exit_code": 71})  # a second rank that ends it changes nothing
    assert attempts(ledger.path) == [Attempt(1, (0, 0), 75, "job 7", 3), Attempt(2, (4, 100))]


def test_attempts_that_begin_together_get_numbers_of_their_own(ledger: Ledger) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda task: begin(ledger.path, {"done": [0, 0], "task": task}), range(24)))
    assert sorted(numbers) == list(range(1, 25))
    assert {(a.number, a.task) for a in attempts(ledger.path)} == set(zip(numbers, range(24), strict=True))


def test_damaged_records_do_no_harm(ledger: Ledger) -> None:
    folder = Path(ledger.path) / "_batchinfer" / "attempts"
    number = begin(ledger.path, {"done": [0, 0]})
    (folder / "junk.begin.json").write_text("[]")
    (folder / f"{number:06}.end.json").write_text("{")
    assert Attempt(number, (0, 0)) in attempts(ledger.path)
    assert begin(ledger.path, {"done": [0, 0]}) == number + 1


def test_a_folder_that_cannot_be_written_is_an_error_at_the_start_only(tmp_path: Path, ledger: Ledger) -> None:
    (Path(ledger.path) / "_batchinfer" / "attempts").write_text("a file")
    with pytest.raises(JobError) as caught:
        begin(ledger.path, {"done": [0, 0]})
    assert caught.value.exit_code in (ExitCode.OUTPUT, ExitCode.IO)
    end(ledger.path, 1, {"exit_code": 0})


@pytest.mark.parametrize(
    ("tried", "rows", "expected"),
    [
        ([], 0, 71),
        ([(0, 75)], 0, 75),
        ([(0, 75)], 4, 75),
        ([(0, 75), (4, None)], 4, 71),
        ([(0, None), (0, None), (0, None)], 4, 71),  # the third one left rows
        ([(0, None), (0, 75), (0, None)], 0, 70),
        ([(0, 75), (0, 75), (4, 75)], 4, 75),
        ([(0, 75), (4, 75), (4, 75), (4, 75)], 4, 70),
        ([(0, 75), (0, 75), (0, 74)], 0, 74),  # stops anyway, and says why
    ],
)
def test_the_code_of_an_incomplete_job(tried: list[tuple[int, int | None]], rows: int, expected: int) -> None:
    attempts = [Attempt(i + 1, (before, 0), code) for i, (before, code) in enumerate(tried)]
    assert verdict(attempts, (rows, 0)) == expected


def test_rows_in_the_journal_are_something_new() -> None:
    """A chunk may take longer than an allocation lasts."""
    tried = [Attempt(1, (0, 0), 75), Attempt(2, (0, 500), 75), Attempt(3, (0, 900), 75)]
    assert verdict(tried, (0, 1200)) == 75
    assert verdict([*tried, Attempt(4, (0, 900), 75), Attempt(5, (0, 900), 75)], (0, 900)) == 70


def test_a_launch_that_came_to_no_attempt_is_not_judged_by_an_older_one() -> None:
    older = [Attempt(1, (0, 0), 75, launch="first")]
    assert verdict(older, (4, 0), launch="first") == 75
    assert verdict(older, (4, 0), launch="second") == 71


def test_tasks_of_an_array_are_judged_one_by_one() -> None:
    """Eight that begin together are not eight in a row."""
    tried = [Attempt(i + 1, (0, 0), 75, f"launch {i}", task=i) for i in range(8)]
    assert verdict(tried, (0, 0), "launch 7") == 75
    tried += [Attempt(9, (0, 0), 75, "again", task=7), Attempt(10, (0, 0), 75, "once more", task=7)]
    assert verdict(tried, (0, 0), "once more") == 70
    assert verdict(tried, (0, 0), "launch 2") == 75


def test_the_code_of_a_job_is_read_from_its_output(ledger: Ledger, tmp_path: Path) -> None:
    code = lambda: code_of_job(ledger.path, max_error_fraction=0.25)  # noqa: E731
    assert code_of_job(str(tmp_path / "nowhere"), 0.0) == 71
    for _ in range(2):
        begin(ledger.path, {"done": [0, 0]})
    assert code() == 71
    number = begin(ledger.path, {"done": [0, 0]})
    assert code() == 70
    journal = Path(ledger.path) / "_batchinfer" / "journal" / "chunk-000002.00.journal"
    journal.parent.mkdir()
    journal.write_bytes(b"a row")
    assert code() == 71
    journal.unlink()
    ledger.commit(ledger.plan.chunks[0], rows_of(ledger.plan.chunks[0]), {"counts": {"ok": 2, "error": 2}})
    assert code() == 71
    end(ledger.path, number, {"exit_code": 75})
    assert code() == 75
    for chunk in ledger.plan.chunks[1:]:
        ledger.commit(chunk, rows_of(chunk), {"counts": {"ok": chunk.rows, "error": 0}})
    assert code() == 75  # all there, but nobody has checked it
    ledger.finish()
    assert code() == 0
    assert code_of_job(ledger.path, max_error_fraction=0.1) == 3
    assert code_of_job(ledger.path, 0.25, launch="another", noted=65) == 65  # it was refused before it began
    assert code_of_job(str(tmp_path / "nowhere"), 0.25, launch="another", noted=66) == 66
    os.unlink(os.path.join(ledger.path, "_batchinfer", "plan.json"))
    with pytest.raises(JobError, match="no output folder"):
        code()


def test_the_records_are_json_with_what_was_given(ledger: Ledger) -> None:
    number = begin(ledger.path, {"done": [0, 0], "config": {"a": [1]}})
    text = (Path(ledger.path) / "_batchinfer" / "attempts" / f"{number:06}.begin.json").read_text()
    assert json.loads(text) == {"done": [0, 0], "config": {"a": [1]}}


@pytest.mark.feature("commands", "status: progress, attempts, speed of each rank and time left, from the files alone")
def test_speeds_are_those_of_the_attempts_that_run_or_of_the_newest() -> None:
    def attempt(number: int, code: int | None, task: int | None = None) -> Attempt:
        return Attempt(number, (0, 0), code, task=task, name=f"a{number}", began=100.0 * number)

    def commit(number: int, rank: int, rows: int, after: float) -> Commit:
        return Commit(f"a{number}", rank, rows, 100.0 * number + after)

    commits = [
        commit(1, 0, 10, 5),
        commit(1, 1, 30, 10),
        commit(2, 0, 40, 20),
        commit(2, 0, 40, 40),
        commit(9, 0, 1, 1),
    ]
    assert speeds([attempt(1, 75), attempt(2, 75)], commits) == {"rank 0": 2.0}
    assert speeds([attempt(1, None), attempt(2, 75)], commits) == {"rank 0": 1.0, "rank 1": 3.0}
    assert speeds([attempt(1, 75), attempt(2, 75), attempt(3, None)], commits) == {"rank 0": 2.0}
    tasks = [attempt(1, None, task=4), attempt(2, None, task=5)]
    assert speeds(tasks, commits) == {"task 4": 4.0, "task 5": 2.0}
    assert speeds([], commits) == {}
    assert speeds([attempt(1, 75)], []) == {}
    assert speeds([attempt(1, None)], [commit(1, 0, 10, 0)]) == {}  # a clock that stood still
