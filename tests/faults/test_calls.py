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
    return write_inputs(tmp_path_factory.mktemp("calls") / "in", rows=(18,))


@pytest.fixture(scope="module")
def expected(inputs: Path) -> Expected:
    return expect(inputs)


PARTS = 2 if LONG else 1
CHANGES = {"output.rows_per_chunk": 20 // PARTS}


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

    output = copy()
    record = output.parent.with_suffix(".record")
    code, log = bench.run(output, CHANGES, fault=Fault(call=fault.call, reads=fault.reads, record=str(record)))
    assert code == 0, log
    calls = read_record(record, output)

    def one(number: int) -> str:
        name = errors[number % len(errors)]
        last = fault.last or number
        output = copy()
        witness = Witness(output, expected)
        witness.look()
        now = replace(fault, first=number, last=last, error=getattr(errno, name))
        code, log = bench.run(output, CHANGES, fault=now)
        try:
            allowed(code, codes, "it")
            witness.look()
            if code == 0:
                witness.complete()
            code, log = bench.run(output, CHANGES)
            assert code == 0
            witness.complete()
        except AssertionError as error:
            return f"{fault.kind} ({name}) at call {number}, {calls[number - 1]}: {error}\n{log}"
        bench.discard(output)
        return ""

    failures = [failure for failure in side_by_side(one, range(1, len(calls) + 1)) if failure]
    assert not failures, f"{len(failures)} of {len(calls)}\n" + "\n".join(failures)
    return calls


def count(kind: str, calls: list[Call]) -> None:
    tally[f"system calls, each once: {kind}"] += len(calls)


@pytest.mark.parametrize("kind", ["kill before", "kill after"])
@pytest.mark.feature("job", "killed at each system call of plan, commit and _SUCCESS in turn")
def test_killed_at_every_call(kind: str, bench: Bench, expected: Expected) -> None:
    calls = at_every_call(bench, expected, Fault(kind), (-9,))
    assert {call.name for call in calls} >= {"open", "write", "fsync", "close", "link", "unlink", "mkdir"}
    count(f"SIGKILL {kind.split()[1]} it", calls)


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.feature("job", "an I/O error at each system call in turn: made good, or a clear exit code and a resume")
def test_an_error_at_every_call(name: str, bench: Bench, expected: Expected) -> None:
    count(name, at_every_call(bench, expected, Fault("refused"), ANY_IO, [name]))


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
