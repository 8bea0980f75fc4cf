"""SIGKILL at random times: whenever a job dies, what it published stays right, and the same command completes it."""

from __future__ import annotations

import time

import pytest
from faults.harness import Bench, side_by_side
from faults.oracle import Expected, Witness, allowed
from faults.sizes import generator, size, tally

KILLS = size(50, 1000)
BATCH = 10
STEP_SECONDS = 0.002


@pytest.mark.feature("job", "killed at any moment, it goes on with the same command: no row lost, none doubled")
def test_killed_at_random_times(bench: Bench, expected: Expected) -> None:
    whole = bench.seconds(step_seconds=STEP_SECONDS)

    def sequence(number: int) -> int:
        """Up to six kills of one job, then its end; the kills that hit."""
        rng = generator(f"kills {number}")
        output = bench.place()
        witness = Witness(output, expected)
        kills = 0
        for _ in range(rng.randint(1, 6)):
            job = bench.start(output, step_seconds=STEP_SECONDS)
            time.sleep(rng.uniform(0, whole))
            job.kill()
            code = job.wait()
            allowed(code, (0, -9), "SIGKILL")
            kills += code == -9
            witness.look()
        code, log = bench.run(output)
        assert code == 0, log
        witness.complete()
        bench.discard(output)
        return kills

    kills = sequences = 0
    while kills < KILLS:
        assert sequences < 10 * KILLS, "the jobs end before they are killed"
        kills += sum(side_by_side(sequence, range(sequences, sequences + BATCH)))
        sequences += BATCH
    tally["SIGKILL at a random time"] += kills
    tally["outputs completed after kills at random times"] += sequences
