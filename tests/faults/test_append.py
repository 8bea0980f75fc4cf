"""input.allow_append: files that come later are further rows of the same job, exactly once as all others."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults.harness import Bench, side_by_side
from faults.oracle import Expected, Witness, allowed, expect, write_inputs
from faults.sizes import generator, size, tally

from batchinfer.data.audit import status, verify
from batchinfer.data.ledger import load_plan
from batchinfer.types import ROW_BITS

APPEND = {"input.allow_append": True}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three files, the third of which comes later."""
    return write_inputs(tmp_path / "in", rows=(20, 15, 12))


@pytest.fixture
def first(source: Path, tmp_path: Path) -> Path:
    """The same input without the third."""
    folder = tmp_path / "first"
    folder.mkdir()
    for name in ("0.parquet", "1.parquet"):
        shutil.copy(source / name, folder)
    return folder


def parts(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("part-*")}


@pytest.mark.feature(
    "job", "input.allow_append: files that come later are added to a job, parts there stay as they are"
)
@pytest.mark.parametrize("complete", [True, False])
def test_a_file_more(complete: bool, bench: Bench, source: Path, first: Path) -> None:
    output = bench.place()
    bench.inputs = first
    if complete:
        assert bench.run(output)[0] == 0
    else:
        job = bench.start(output, step_seconds=0.02)
        while not parts(output):
            time.sleep(0.001)
        job.kill()
        job.wait()
    before = parts(output)
    bench.inputs = source
    code, log = bench.run(output)
    assert code == 65
    assert "input file 2.parquet" in log
    assert "input.allow_append=true" in log
    code, log = bench.run(output, APPEND)
    assert code == 0, log
    Witness(output, expect(source)).complete()
    assert before.items() <= parts(output).items()
    assert status(str(output)).rows == 47
    code, log = bench.run(output)  # what was added belongs to the job from now on
    assert code == 0, log
    assert "nothing to do" in log


def test_a_name_before_the_others_gets_the_last_place(bench: Bench, source: Path, first: Path) -> None:
    """The order of the plan is that of arrival, and a row's identity never changes."""
    output = bench.place()
    bench.inputs = first
    assert bench.run(output)[0] == 0
    table = pq.read_table(source / "2.parquet")
    pq.write_table(table, first / "+early.parquet", row_group_size=15)
    code, log = bench.run(output, APPEND)
    assert code == 0, log
    plan = load_plan(str(output))
    assert [file.path for file in plan.files] == ["0.parquet", "1.parquet", "+early.parquet"]
    rows = [uid for part in sorted(output.glob("part-*")) for uid in pq.read_table(part)["uid"].to_pylist()]
    assert rows == [f << ROW_BITS | i for f, count in enumerate((20, 15, 12)) for i in range(count)]
    assert verify(str(output)).ok


def test_again_and_again(bench: Bench, source: Path, tmp_path: Path) -> None:
    output = bench.place()
    bench.inputs = tmp_path / "growing"
    bench.inputs.mkdir()
    for number in range(3):
        shutil.copy(source / f"{number}.parquet", bench.inputs)
        code, log = bench.run(output, APPEND)
        assert code == 0, log
    Witness(output, expect(source)).complete()
    names = {path.name for path in (output / "_batchinfer").iterdir()}
    assert {"plan.json", "plan-2.json", "plan-3.json"} <= names


def test_nothing_but_new_files_is_allowed(bench: Bench, source: Path, first: Path) -> None:
    output = bench.place()
    bench.inputs = first
    assert bench.run(output)[0] == 0
    bench.inputs = source
    assert bench.run(output, APPEND | {"sampling.seed": 1})[0] == 65
    (source / "1.parquet").unlink()
    code, log = bench.run(output, APPEND)
    assert code == 65
    assert "input file 1.parquet" in log
    table = pq.read_table(source / "2.parquet")
    pq.write_table(table.set_column(1, "prompt", pa.array(["x"] * len(table))), source / "1.parquet")
    assert bench.run(output, APPEND)[0] == 65
    assert not (output / "_batchinfer" / "plan-2.json").exists()


def test_a_plan_that_does_not_continue_the_one_before(bench: Bench, source: Path, first: Path) -> None:
    output, other = bench.place(), bench.place()
    bench.inputs = first
    assert bench.run(output)[0] == 0
    assert bench.run(other, {"sampling.seed": 1})[0] == 0
    bench.inputs = source
    assert bench.run(other, APPEND | {"sampling.seed": 1})[0] == 0
    shutil.copy(other / "_batchinfer" / "plan-2.json", output / "_batchinfer")
    code, log = bench.run(output, APPEND)
    assert code == 73
    assert "does not continue" in log


def test_killed_and_raced_while_it_is_extended(bench: Bench, source: Path, first: Path) -> None:
    """Jobs that see the new file, and jobs that began before it came, on one output."""
    expected: Expected = expect(source)

    def sequence(number: int) -> None:
        rng = generator(f"append {number}")
        output = bench.place()
        witness = Witness(output, expected)
        old = {"input.path": str(first)}
        new = APPEND | {"input.path": str(source)}
        assert bench.run(output, old)[0] == 0
        jobs = [bench.start(output, new, step_seconds=0.002) for _ in range(rng.randint(1, 3))]
        time.sleep(rng.uniform(0, 0.2))
        jobs[0].kill()
        for job in jobs:
            allowed(job.wait(), (0, -9), job.log())
        code, log = bench.run(output, new)
        assert code == 0, log
        witness.complete()
        bench.discard(output)

    tally["inputs extended under kills and races"] += len(side_by_side(sequence, range(size(5, 60))))
