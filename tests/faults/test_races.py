"""Several jobs at once on one output, without any word between them: first commit wins, nothing is lost or doubled."""

from __future__ import annotations

import time

import pytest
from faults.harness import Bench, Job
from faults.oracle import Expected, Witness
from faults.shim import Fault
from faults.sizes import generator, size, tally

RACES = size(5, 30)


@pytest.mark.feature("job", "two to four processes racing on one output, the plan included")
def test_racing_jobs(bench: Bench, expected: Expected) -> None:
    for number in range(RACES):
        rng = generator(f"race {number}")
        output = bench.place()
        witness = Witness(output, expected)
        jobs: list[Job] = []
        for _ in range(rng.randint(2, 4)):
            jobs.append(bench.start(output, step_seconds=rng.choice([0.0, 0.001, 0.003])))
            time.sleep(rng.choice([0, 0, 0.01, 0.1]))
        codes = [job.wait() for job in jobs]
        assert codes == [0] * len(jobs), "\n".join(job.log() for job in jobs)
        witness.complete()
        bench.discard(output)
        tally["races of 2 to 4 jobs on one output"] += 1


def test_a_commit_after_success_changes_nothing(bench: Bench, expected: Expected) -> None:
    """A zombie: it began before the others were done, was stopped, and wakes up when the job is complete."""
    output = bench.place()
    witness = Witness(output, expected)
    zombie = bench.start(output, step_seconds=0.05)
    while not (output / "_batchinfer" / "plan.json").exists():
        time.sleep(0.002)
    code, log = bench.run(output)
    assert code == 0, log
    witness.complete()
    assert zombie.wait() == 0, zombie.log()
    witness.complete()


def test_one_of_two_jobs_has_a_full_disk(bench: Bench, expected: Expected) -> None:
    """Whatever one of them meets, the other completes."""
    for call in ("open", "write", "fsync", "link", "unlink"):
        output = bench.place()
        witness = Witness(output, expected)
        broken = bench.start(output, fault=Fault("refused", 6, 10**9, error=28, call=call), step_seconds=0.002)
        code, log = bench.run(output, step_seconds=0.002)
        assert code == 0, log
        assert broken.wait() in (0, 73, 74), broken.log()
        witness.complete()
