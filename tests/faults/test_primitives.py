"""File systems that lack what the commit protocol likes best: without hard links, and without renameat2 either."""

from __future__ import annotations

import errno
import time
from dataclasses import replace
from pathlib import Path

import pytest
from faults.harness import Bench, side_by_side
from faults.oracle import ANY_IO, Expected, Witness, allowed, expect, write_inputs
from faults.shim import Fault, read_record
from faults.sizes import LONG, generator, size, tally

LACKING = {
    "no link": Fault(denied=("link",)),
    "no link, no renameat2": Fault(denied=("link", "renameat2"), denied_error=errno.EINVAL),
}
CHANGES = {"output.rows_per_chunk": 6, "job.journal_seconds": 60.0}
NEITHER = Fault(denied=("link", "renameat2"))


@pytest.mark.parametrize("name", ["no link", "no link, no renameat2"])
@pytest.mark.feature("job", "file systems without hard links, or without links and renameat2: symlink claims")
def test_racing_jobs(name: str, bench: Bench, expected: Expected) -> None:
    for number in range(size(3, 25)):
        rng = generator(f"{name} {number}")
        output = bench.place()
        witness = Witness(output, expected)
        jobs = []
        for _ in range(rng.randint(2, 4)):
            jobs.append(bench.start(output, fault=LACKING[name], step_seconds=rng.choice([0.0, 0.001])))
            time.sleep(rng.choice([0, 0.01, 0.05]))
        killed = rng.random() < 0.5
        if killed:
            time.sleep(rng.uniform(0, 0.2))
            jobs[0].kill()
        codes = [job.wait() for job in jobs]
        allowed(codes[0], (0, -9) if killed else (0,), "")
        assert codes[1:] == [0] * len(codes[1:]), "\n".join(job.log() for job in jobs)
        witness.complete()
        assert not [path for path in output.iterdir() if path.name.startswith(".")]
        bench.discard(output)
        tally[f"races, {name}"] += 1


KINDS = ["kill before", "kill after", "refused", "lost", "replayed"] if LONG else ["kill after", "replayed"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_every_call_with_claims(kind: str, bench: Bench, tmp_path: Path) -> None:
    """As test_calls.py does, on a file system that leaves symbolic links alone."""
    bench.inputs = write_inputs(tmp_path / "in", rows=(6,))
    expected = expect(bench.inputs)
    output = bench.place()
    record = tmp_path / "record"
    assert bench.run(output, CHANGES, fault=replace(NEITHER, record=str(record)))[0] == 0
    calls = read_record(record, output)
    assert {call.name for call in calls} >= {"symlink", "rename"}
    numbers = [i + 1 for i, call in enumerate(calls) if LONG or call.name in ("symlink", "rename", "unlink", "fsync")]

    def one(number: int) -> str:
        place = bench.place()
        witness = Witness(place, expected)
        fault = replace(NEITHER, kind=kind, first=number, last=number)
        code, log = bench.run(place, CHANGES, fault=fault)
        try:
            allowed(code, (-9,) if kind.startswith("kill") else ANY_IO, "it")
            witness.look()
            code, log = bench.run(place, CHANGES, fault=NEITHER)
            assert code == 0
            witness.complete()
        except AssertionError as error:
            return f"{kind} at call {number}, {calls[number - 1]}: {error}\n{log}"
        bench.discard(place)
        return ""

    failures = [failure for failure in side_by_side(one, numbers) if failure]
    assert not failures, f"{len(failures)} of {len(numbers)}\n" + "\n".join(failures)
    tally[f"system calls with symlink claims, each once: {kind}"] += len(numbers)


def test_a_file_system_with_none_of_them_is_refused(bench: Bench, expected: Expected) -> None:
    output = bench.place()
    code, log = bench.run(output, fault=Fault(denied=("link", "renameat2", "symlink")))
    assert code == 73
    assert "choose an output.path on another file system" in log
    assert not list(output.glob("part-*"))
