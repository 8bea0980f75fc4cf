"""A job that is resumed in another shape each time: more or fewer processes, slots, look-ahead, other places."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from faults.harness import Bench, side_by_side
from faults.oracle import Expected, Witness, allowed
from faults.sizes import LONG, generator, size, tally

SEQUENCES = size(8, 60)
RESUMES = 5
STEP_SECONDS = 0.002
RUNNING = (0, -9, 75)


def shape(rng: random.Random, inputs: Path, moved: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(changes of the configuration that do not change results, constants of the job's own)."""
    changes = {
        "engine.max_slots": rng.choice([1, 2, 8, 64]),
        "engine.threads": rng.choice([0, 1, 3]),
        "engine.max_step_tokens": rng.choice([64, 1024]),
        "engine.num_pages": rng.choice([0, 100]),
        "engine.prefix_cache": rng.random() < 0.5,
        "output.rows_per_chunk": rng.choice([1, 10, 1000]),
        "output.compression": rng.choice(["zstd", "none", "snappy"]),
        "job.journal_seconds": rng.choice([0.0, 0.01, 60.0]),
        "job.progress_seconds": rng.choice([0.1, 60.0]),
        "input.path": str(rng.choice([inputs, moved])),
    }
    settings = {
        "batchinfer.loop.LOOK_AHEAD": rng.choice([1, 2, 5]),
        "batchinfer.pipeline.MAX_UNCOMMITTED": rng.choice([1, 2, 8]),
        "batchinfer.data.ledger.READERS": rng.choice([1, 16]),
    }
    return changes, settings


@pytest.mark.feature("job", "resumed in another shape each time, several plain processes at once among them")
def test_another_shape_at_every_resume(bench: Bench, expected: Expected, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(bench.inputs)
    whole = bench.seconds(step_seconds=STEP_SECONDS)

    def sequence(number: int) -> int:
        rng = generator(f"shapes {number}")
        output = bench.place()
        witness = Witness(output, expected)
        for _ in range(RESUMES):
            jobs = []
            for _ in range(rng.choice([1, 1, 2, 3])):
                changes, settings = shape(rng, bench.inputs, moved)
                jobs.append(bench.start(output, changes, settings=settings, step_seconds=STEP_SECONDS))
            time.sleep(rng.uniform(0.2, 0.7) * whole)
            for job in jobs:
                job.kill()
            for job in jobs:
                allowed(job.wait(), RUNNING, "SIGKILL")
            witness.look()
        code, log = bench.run(output, shape(rng, bench.inputs, moved)[0])
        assert code == 0, log
        witness.complete()
        bench.discard(output)
        return RESUMES

    resumes = side_by_side(sequence, range(SEQUENCES))
    tally["sequences of resumes in another shape each time"] += len(resumes)
    assert len(resumes) == (60 if LONG else 8)
