"""A fault at every system call below the output folder, one at a time, from the plan to _SUCCESS.

The calls are counted by a shim in the job's process (shim.c), so no narrow window is left to chance. After each fault
the same command must complete the job.
"""

from __future__ import annotations

import errno
import itertools
import shutil
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
    return write_inputs(tmp_path_factory.mktemp("calls") / "in", rows=(6,))


@pytest.fixture(scope="module")
def expected(inputs: Path) -> Expected:
    return expect(inputs)


PARTS = 2 if LONG else 1
CHANGES = {"output.rows_per_chunk": 6 // PARTS}


def stopped(bench: Bench, where: str) -> Path:
    """An output that a job left: "": none; "part": its first part is there; "parts": all but _SUCCESS."""
    if not where:
        return bench.place()
    for link in itertools.count(1):
        output = bench.place()
        code, log = bench.run(output, CHANGES, fault=Fault("kill after", link, link, call="link"))
        assert code == -9, log
        if len(list(output.glob("part-*"))) == {"part": 1, "parts": PARTS}[where]:
            return output
        bench.discard(output)


def at_every_call(
    bench: Bench,
    expected: Expected,
    fault: Fault,
    codes: tuple[int, ...],
    errors: Sequence[str] = ("EIO",),
    start: str = "",
) -> list[Call]:
    """``fault`` at each call in turn of a job that begins at ``start`` (see ``stopped``), with these errors in turn,
    and then the job again without one. The calls."""
    first = stopped(bench, start)

    def copy() -> Path:
        output = bench.place()
        if start:
            shutil.copytree(first, output)
        return output

    def observed(fault: Fault) -> tuple[Path, int, str, list[Call]]:
        """A run: its output, exit code, messages and calls."""
        output = copy()
        file = output.parent.with_suffix(".record")
        code, log = bench.run(output, CHANGES, fault=replace(fault, record=str(file)))
        return output, code, log, read_record(file, output)

    def one(number: int) -> tuple[Call | None, str]:
        """The call that was struck, None if the run had fewer calls; and what went wrong."""
        name = errors[number % len(errors)]
        now = replace(fault, first=number, last=fault.last or number, error=getattr(errno, name))
        output, code, log, calls = observed(now)
        struck = next((call for call in calls if call.number == number), None)
        witness = Witness(output, expected)
        try:
            allowed(code, codes if struck else (0,), "it")
            witness.look()
            if code == 0:
                witness.complete()
            code, log = bench.run(output, CHANGES)
            assert code == 0
            witness.complete()
        except AssertionError as error:
            return struck, f"{fault.kind} ({name}) at call {number}, {struck}: {error}\n{log}"
        bench.discard(output)
        return struck, ""

    outcomes: list[tuple[Call | None, str]] = []
    while not outcomes or outcomes[-1][0]:  # what the journal writes depends on time: runs differ by a few calls
        outcomes += side_by_side(one, range(len(outcomes) + 1, len(outcomes) + 11))
    failures = [failure for _, failure in outcomes if failure]
    assert not failures, f"{len(failures)} of {len(outcomes)}\n" + "\n".join(failures)
    return [struck for struck, _ in outcomes if struck]


def count(kind: str, calls: list[Call]) -> None:
    tally[f"system calls, each once: {kind}"] += len(calls)


@pytest.mark.parametrize("kind", ["kill before", "kill after"] if LONG else ["kill after"])
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
@pytest.mark.parametrize("start", ["", "part", "parts"] if LONG else ["part"])
def test_an_error_at_every_call_that_reads_too(start: str, errors: list[str], bench: Bench, expected: Expected) -> None:
    """Of a job that goes on from a part, or from all of them, as well."""
    calls = at_every_call(bench, expected, Fault("refused", reads=True), ANY_IO, errors, start)
    assert {call.name for call in calls} >= {"read", "stat", "opendir"}
    count(f"{' or '.join(errors)}, reading calls too", calls)


@pytest.mark.parametrize("start", ["part", "parts"])
@pytest.mark.skipif(not LONG, reason="make faults")
def test_killed_again_at_every_call_of_a_resume(start: str, bench: Bench, expected: Expected) -> None:
    count(
        "SIGKILL before it, in a resumed job", at_every_call(bench, expected, Fault("kill before"), (-9,), start=start)
    )


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
