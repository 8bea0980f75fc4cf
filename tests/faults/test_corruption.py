"""Damage to parts, to the plan, to all else in the state folder: `verify` tells, or it does not matter."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.harness import Bench, side_by_side
from faults.oracle import Expected, Witness
from faults.shim import Fault
from faults.sizes import generator, size, tally

from batchinfer.data.audit import verify
from batchinfer.data.ledger import load_plan
from batchinfer.data.plan import Plan
from batchinfer.types import ExitCode, JobError


@pytest.fixture
def done(bench: Bench) -> Path:
    """The output of a complete job."""
    output = bench.place()
    code, log = bench.run(output)
    assert code == 0, log
    return output


def flip_a_bit(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def zero_a_block(data: bytes, rng: random.Random) -> bytes:
    """What a file system does that lost a page."""
    length = rng.choice([1, 16, 512, 4096])
    start = rng.randrange(len(data))
    damaged = data[:start] + bytes(len(data[start : start + length])) + data[start + length :]
    return damaged if damaged != data else flip_a_bit(data, rng)


def zero_the_tail(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) - 4)
    return data[:start] + bytes(len(data) - start)


def repeat_a_block(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) - 1)
    stop = rng.randrange(start + 1, len(data))
    return data[:stop] + data[start:]


def append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice([1, 8, 100]))


def replace_bytes(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    damaged = data[:start] + rng.randbytes(rng.randint(1, 8)) + data[start + 8 :]
    return damaged if damaged != data else flip_a_bit(data, rng)


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    flip_a_bit,
    truncate,
    zero_a_block,
    zero_the_tail,
    repeat_a_block,
    append,
    replace_bytes,
]


@pytest.mark.feature("commands", "verify: finds every flipped bit, cut, swap or foreign file among the parts")
def test_damaged_parts_are_found(done: Path) -> None:
    rng = generator("parts")
    parts = sorted(done.glob("part-*"))
    for number in range(size(70, 500)):
        path = rng.choice(parts)
        good = path.read_bytes()
        damage = DAMAGES[number % len(DAMAGES)]
        path.write_bytes(damage(good, rng))
        report = verify(str(done))
        assert not report.ok, damage.__name__
        assert path.name in str(report)
        path.write_bytes(good)
        tally["damaged parts, found by verify"] += 1
    assert verify(str(done)).ok


def test_exchanged_parts_are_found(done: Path, bench: Bench) -> None:
    """Whole files, at the wrong place: of another chunk, of another job, twice, none."""
    other = bench.place()
    assert bench.run(other, {"sampling.seed": 1})[0] == 0
    parts, foreign = sorted(done.glob("part-*")), sorted(other.glob("part-*"))
    rng = generator("swaps")
    for number in range(size(20, 150)):
        one, two = rng.sample(parts, 2)
        before = one.read_bytes(), two.read_bytes()
        kind = number % 5
        extra = done / f"part-{rng.randrange(100, 999):06d}.parquet"
        if kind == 0:  # exchanged
            one.write_bytes(before[1])
            two.write_bytes(before[0])
        elif kind == 1:  # one twice, the other gone
            one.write_bytes(before[1])
        elif kind == 2:  # of a job with another seed
            one.write_bytes(foreign[parts.index(one)].read_bytes())
        elif kind == 3:
            one.unlink()
        else:
            extra.write_bytes(before[0])
        report = verify(str(done))
        assert not report.ok
        one.write_bytes(before[0])
        two.write_bytes(before[1])
        extra.unlink(missing_ok=True)
        tally["exchanged, doubled, foreign or missing parts, found by verify"] += 1
    assert verify(str(done)).ok


def test_a_damaged_success_file_is_found(done: Path) -> None:
    """Bytes of what it says about the attempt ("run") are no promise about the output."""
    rng = generator("success")
    path = done / "_SUCCESS"
    good = path.read_bytes()
    told = {key: value for key, value in json.loads(good).items() if key != "run"}
    for number in range(size(30, 300)):
        path.write_bytes(DAMAGES[number % len(DAMAGES)](good, rng))
        try:
            same = {key: value for key, value in json.loads(path.read_bytes()).items() if key != "run"} == told
        except (ValueError, AttributeError):
            same = False
        assert same or not verify(str(done)).ok, path.read_bytes()
        tally["damaged _SUCCESS, found by verify or the same"] += 1


def odd_values(rng: random.Random) -> Any:
    return rng.choice([None, -1, 0, 2**70, 1e308, float("inf"), float("nan"), "", "x", [], [[]], {}, True, [1e999]])


def change_a_value(data: bytes, rng: random.Random) -> bytes:
    """Another value somewhere in a JSON text: valid, and not what was written."""
    content = json.loads(data)
    here: Any = content
    while True:
        key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        if not isinstance(here[key], (dict, list)) or not here[key] or rng.random() < 0.3:
            break
        here = here[key]
    here[key] = odd_values(rng)
    return json.dumps(content).encode()


def loaded(output: Path) -> Plan | None:
    """The plan, or None if it is refused as damaged."""
    try:
        return load_plan(str(output))
    except JobError as error:
        if error.exit_code != ExitCode.OUTPUT:
            raise
        return None


def test_a_damaged_plan_is_refused_or_the_same(done: Path, bench: Bench, expected: Expected) -> None:
    rng = generator("plan")
    path = done / "_batchinfer" / "plan.json"
    good = path.read_bytes()
    plan = load_plan(str(done))
    for number in range(size(60, 600)):
        damage = [*DAMAGES, change_a_value, change_a_value][number % (len(DAMAGES) + 2)]
        path.write_bytes(damage(good, rng))
        same = loaded(done)
        if same is None:
            with pytest.raises(JobError):
                verify(str(done))
        else:  # what changed is not part of the job's identity: where the input lay, what is on record
            assert (same.id, same.chunks, same.fingerprint) == (plan.id, plan.chunks, plan.fingerprint)
            assert [f.digest for f in same.files] == [f.digest for f in plan.files]
            assert verify(str(done)).ok
        if number % 10 == 0:
            code, log = bench.run(done)
            assert code in (0, ExitCode.OUTPUT), log
        tally["damaged plans, refused or the same"] += 1


def stopped(bench: Bench) -> Path:
    """An output whose job was killed when some parts were there."""
    output = bench.place()
    code, log = bench.run(output, fault=Fault("kill after", 7, 7, call="link"), step_seconds=0.002)
    assert code == -9, log
    assert list(output.glob("part-*"))
    return output


def test_what_else_the_state_folder_holds_is_a_cache(bench: Bench, expected: Expected) -> None:
    """Journals, records of attempts: damaged or gone, the job completes with the same rows."""
    first = stopped(bench)
    state = [p for p in (first / "_batchinfer").rglob("*") if p.is_file() and p.name != "plan.json"]

    def spoil(number: int) -> int:
        rng = generator(f"state {number}")
        output = bench.place()
        shutil.copytree(first, output)
        witness = Witness(output, expected)
        for path in state:
            copy = output / path.relative_to(first)
            data = copy.read_bytes()
            if len(data) > 8:
                copy.write_bytes(rng.choice(DAMAGES)(data, rng))
        scrap = output / "_batchinfer" / rng.choice(["attempts", "journal", "partial"])
        scrap.mkdir(exist_ok=True)
        (scrap / "scrap").write_bytes(rng.randbytes(200))
        (output / ".part-000001.0123-0.tmp").write_bytes(rng.randbytes(rng.randrange(200)))
        code, log = bench.run(output)
        assert code == 0, log
        witness.complete()
        bench.discard(output)
        return len(state)

    tally["state folders with damaged files, completed"] += len(side_by_side(spoil, range(size(6, 60))))


def test_a_part_damaged_before_the_job_ends(bench: Bench, expected: Expected) -> None:
    """The end of the job reads footers only: it refuses a damaged one, comes back from any, and `verify` has the
    rest."""
    first = stopped(bench)
    names = sorted(path.name for path in first.glob("part-*"))

    def spoil(number: int) -> str:
        rng = generator(f"footer {number}")
        output = bench.place()
        shutil.copytree(first, output)
        path = output / rng.choice(names)
        data = path.read_bytes()
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        damage = DAMAGES[number % len(DAMAGES)]
        path.write_bytes(data[:footer] + damage(data[footer:], rng))
        code, log = bench.run(output)
        assert code in (0, ExitCode.IO), log
        if code == ExitCode.IO:
            assert path.name in log, log
        assert not verify(str(output)).ok
        bench.discard(output)
        return "refused at the end" if code else "found by verify"

    for outcome in side_by_side(spoil, range(size(20, 300))):
        tally[f"parts damaged under way, {outcome}"] += 1
