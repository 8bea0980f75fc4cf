"""Walltime, the expected time of a row, and who else may stop a rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchinfer.cluster.deadline import DRAIN_FILE, ENOUGH, LOOK_SECONDS, WINDOW, Deadline, RowTimes, seconds_left
from batchinfer.types import ExitCode, JobError


class Clock:
    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


def test_the_end_is_read_from_the_environment() -> None:
    assert seconds_left({}, now=1000.0) is None
    assert seconds_left({"SLURM_JOB_END_TIME": ""}, now=1000.0) is None
    assert seconds_left({"SLURM_JOB_END_TIME": "1600", "BATCHINFER_END_TIME": "9999"}, now=1000.0) == 600
    assert seconds_left({"BATCHINFER_END_TIME": "900"}, now=1000.0) == -100
    with pytest.raises(
        JobError, match=r"BATCHINFER_END_TIME=12:00 is not allowed: it must be seconds since 1970"
    ) as error:
        seconds_left({"BATCHINFER_END_TIME": "12:00"})
    assert error.value.exit_code == ExitCode.USAGE


@pytest.mark.feature("job", "stops before its allocation ends: rows that would not end in time are not started")
def test_a_rank_stops_the_margin_before_the_end_and_starts_no_row_that_does_not_fit() -> None:
    clock = Clock()
    deadline = Deadline(600, margin=100, clock=clock)
    for _ in range(ENOUGH):
        deadline.row_took(50.0)
    clock.now += 449
    assert deadline.reason() is None
    assert deadline.allows_row()
    clock.now += 1
    assert deadline.reason() is None
    assert not deadline.allows_row()
    clock.now += 50
    assert deadline.reason() == "the allocation ends soon"
    clock.now -= 50
    assert deadline.reason() == "the allocation ends soon"  # once said, it stays


def test_without_an_end_nothing_stops_a_rank() -> None:
    deadline = Deadline(None, margin=100)
    deadline.row_took(1e9)
    assert deadline.reason() is None
    assert deadline.allows_row()


def test_a_signal_stops_a_rank() -> None:
    came: list[str] = []
    deadline = Deadline(None, margin=0, signal=lambda: came[0] if came else None)
    assert deadline.reason() is None
    came.append("SIGUSR1")
    assert deadline.reason() == "signal SIGUSR1"


def test_a_file_stops_a_rank_and_is_not_looked_for_all_the_time(tmp_path: Path) -> None:
    clock = Clock()
    deadline = Deadline(None, margin=0, state=str(tmp_path), clock=clock)
    assert deadline.reason() is None
    (tmp_path / DRAIN_FILE).touch()
    clock.now += LOOK_SECONDS - 0.1
    assert deadline.reason() is None
    clock.now += 0.1
    assert str(tmp_path / DRAIN_FILE) in str(deadline.reason())


def test_a_row_is_expected_to_take_as_long_as_the_slow_ones_of_late() -> None:
    times = RowTimes()
    for _ in range(ENOUGH - 1):
        times.add(1000.0)
    assert times.expected() == 0.0
    times.add(1000.0)
    assert times.expected() == 1000.0
    for value in range(WINDOW):  # the old ones are forgotten
        times.add(float(value))
    assert times.expected() == int(0.95 * WINDOW)
