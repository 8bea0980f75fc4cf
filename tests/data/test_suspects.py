"""Which rows are to blame for a crash, by the logs that the ranks leave."""

from __future__ import annotations

import faulthandler
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from batchinfer.data.suspects import (
    SUSPECTS,
    SuspectLog,
    clear_suspects,
    condemn,
    read_suspicion,
    rows_in_crash,
)
from batchinfer.types import Completion, ErrorCode, Request, SamplingParams


def test_the_rows_in_the_engine_at_the_crash() -> None:
    assert rows_in_crash("+ 1 2\n+ 3\n- 2\n! RuntimeError: no\n") == {1, 3}
    assert rows_in_crash("+ 1 2\n- 1\nFatal Python error: Segmentation fault\n\n+ 9 not a line of ours\n") == {2}
    assert rows_in_crash("+ 1 2\n- 1\n") == set()  # killed from outside, or running
    assert rows_in_crash("") == set()
    assert rows_in_crash("garbage \ufffd\n+ x 4\n!") == {4}


def crash(state: Path, *rows: int) -> None:
    log = SuspectLog(str(state))
    log.went_in(rows)
    log.crashed("RuntimeError: the device\nwent away")
    log.close(in_order=False)


def test_a_row_is_given_up_after_two_crashes_one_of_them_alone(tmp_path: Path) -> None:
    assert not read_suspicion(str(tmp_path)).falls_on(1)
    crash(tmp_path, 1, 2)
    suspicion = read_suspicion(str(tmp_path))
    assert [suspicion.falls_on(row) for row in (1, 2, 3)] == [True, True, False]
    assert not any(map(suspicion.condemns, (1, 2, 3)))
    crash(tmp_path, 2)
    crash(tmp_path, 3)  # alone by chance, and for the first time
    suspicion = read_suspicion(str(tmp_path))
    assert [suspicion.condemns(row) for row in (1, 2, 3)] == [False, True, False]

    rows = [Request(row, np.array([1, 2], np.int32), SamplingParams()) for row in (1, 2)]
    kept, error = condemn([*rows], suspicion)
    assert kept is rows[0]
    assert isinstance(error, Completion)
    assert (error.id, error.prompt_tokens, error.error and error.error.code) == (2, 2, ErrorCode.ENGINE_CRASH)
    finished = Completion(2, 2)
    assert condemn([finished], suspicion) == [finished]


def test_a_rank_that_ends_in_order_leaves_nothing(tmp_path: Path) -> None:
    log = SuspectLog(str(tmp_path))
    log.went_in([1, 2])
    log.came_out([1])
    assert [path.read_text() for path in (tmp_path / SUSPECTS).iterdir()] == ["+ 1 2\n- 1\n"]
    log.close(in_order=True)
    assert list((tmp_path / SUSPECTS).iterdir()) == []
    crash(tmp_path, 1)
    clear_suspects(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    clear_suspects(str(tmp_path))


def test_faulthandler_is_as_it_was_before(tmp_path: Path) -> None:
    before = faulthandler.is_enabled()
    SuspectLog(str(tmp_path)).close(in_order=True)
    assert faulthandler.is_enabled() == before


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS"])
def test_a_fatal_signal_leaves_its_mark(name: str, tmp_path: Path) -> None:
    code = f"""
import os, signal
from batchinfer.data.suspects import SuspectLog
log = SuspectLog({str(tmp_path)!r})
log.went_in([7, 8])
log.came_out([7])
os.kill(os.getpid(), signal.{name})
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode < 0
    assert read_suspicion(str(tmp_path)).alone == {8}


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / SUSPECTS).write_text("a file where the folder should be")
    crash(tmp_path, 1)
    with pytest.raises(NotADirectoryError):
        list((tmp_path / SUSPECTS).iterdir())
