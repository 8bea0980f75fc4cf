"""A fault at every system call below the output folder, one at a time, from the plan to _SUCCESS.

The calls are counted by a shim in the job's process (shim.c), so no narrow window is left to chance. After each fault
the same command must complete the job.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from faults.harness import Bench, side_by_side
from faults.oracle import ANY_IO, Expected, Witness, allowed, expect, write_inputs
from faults.shim import FOR_EVER, Call, Fault, read_record
from faults.sizes import LONG, tally

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "ESTALE", "EINTR")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, one chunk (quick) or two: every kind of call is there, few are there often."""
    return write_inputs(tmp_path_factory.mktemp("calls") / "in", rows=(18,))


@pytest.fixture(scope="module")
def expected(inputs: Path) -> Expected:
    return expect(inputs)


CHANGES = {"output.rows_per_chunk": 10 if LONG else 20}


def record(bench: Bench, reads: bool) -> list[Call]:
    """The calls of an undisturbed run."""
    output = bench.place()
    file = output.parent.with_suffix(".record")
    code, log = bench.run(output, CHANGES, fault=Fault(reads=reads, record=str(file)))
    assert code == 0, log
    calls = read_record(file, output)
    bench.discard(output)
    return calls


def at_every_call(
    bench: Bench, expected: Expected, fault: Fault, codes: tuple[int, ...], errors: Sequence[str] = ("EIO",)
) -> list[Call]:
    """``fault`` at each call in turn, with these errors in turn, and then the job again without one. The calls."""
    calls = record(bench, fault.reads)

    def one(number: int) -> None:
        name = errors[number % len(errors)]
        last = fault.last or number
        output = bench.place()
        witness = Witness(output, expected)
        now = replace(fault, first=number, last=last, error=getattr(errno, name))
        code, log = bench.run(output, CHANGES, fault=now)
        what = f"{fault.kind} ({name}) at call {number}, {calls[number - 1]}\n{log}"
        allowed(code, codes, what)
        try:
            witness.look()
            if code == 0:
                witness.complete()
            code, log = bench.run(output, CHANGES)
            assert code == 0, log
            witness.complete()
        except AssertionError as error:
            raise AssertionError(f"{error}\nafter {what}") from error
        bench.discard(output)

    side_by_side(one, range(1, len(calls) + 1))
    return calls


def count(kind: str, calls: list[Call]) -> None:
    tally[f"system calls, each once: {kind}"] += len(calls)


@pytest.mark.parametrize("kind", ["kill before", "kill after"])
@pytest.mark.feature("job", "killed at each system call of plan, commit and _SUCCESS in turn")
def test_killed_at_every_call(kind: str, bench: Bench, expected: Expected) -> None:
    calls = at_every_call(bench, expected, Fault(kind), (-9,))
    assert {call.name for call in calls} >= {"open", "write", "fsync", "close", "link", "unlink", "mkdir"}
    count(f"SIGKILL {kind.split()[1]} it", calls)


@pytest.mark.parametrize("errors", [[name] for name in ERRORS] if LONG else [ERRORS[:1], ERRORS[1:]], ids="-".join)
@pytest.mark.feature("job", "an I/O error at each system call in turn: made good, or a clear exit code and a resume")
def test_an_error_at_every_call(errors: list[str], bench: Bench, expected: Expected) -> None:
    count(" or ".join(errors), at_every_call(bench, expected, Fault("refused"), ANY_IO, errors))


@pytest.mark.parametrize("errors", [["EIO"], ["ESTALE"]] if LONG else [["EIO", "ESTALE"]], ids="-".join)
def test_an_error_at_every_call_that_reads_too(errors: list[str], bench: Bench, expected: Expected) -> None:
    calls = at_every_call(bench, expected, Fault("refused", reads=True), ANY_IO, errors)
    assert {call.name for call in calls} >= {"read", "stat", "opendir"}
    count(f"{' or '.join(errors)}, reading calls too", calls)


@pytest.mark.parametrize(
    ("kind", "name"), [("lost", "done, reply lost"), ("replayed", "done twice by the server"), ("short", "short write")]
)
@pytest.mark.feature("job", "a file server's lost reply or a short write at each system call in turn")
def test_a_lost_reply_or_a_short_write(kind: str, name: str, bench: Bench, expected: Expected) -> None:
    count(name, at_every_call(bench, expected, Fault(kind, call="write" if kind == "short" else ""), ANY_IO))


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EDQUOT", "ESTALE"])
@pytest.mark.skipif(not LONG, reason="make faults")
def test_an_error_that_stays(name: str, bench: Bench, expected: Expected) -> None:
    """From some call on nothing works; there is space again at the next start."""
    calls = at_every_call(bench, expected, Fault("refused", last=FOR_EVER), ANY_IO, [name])
    count(f"{name} from it on", calls)
