"""MPI jobs that die and go on with another number of ranks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.oracle import Expected, Witness
from faults.sizes import generator, size, tally

import batchinfer

MPIEXEC = next((str(p) for p in [Path(sys.executable).with_name("mpiexec")] if p.exists()), shutil.which("mpiexec"))
RANK = Path(__file__).parents[1] / "mpi" / "rank.py"
OUTSIDE = ("PMI_", "PMIX_", "OMPI_", "SLURM_", "MPI_LOCAL", "HYDRA_")
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec: pip install 'batchinfer[mpi]'")]
pytest.importorskip("mpi4py", reason="pip install 'batchinfer[mpi]'")


def start(ranks: int, inputs: Path, output: Path, **environment: str) -> subprocess.Popen:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(OUTSIDE)}
    clean["PYTHONPATH"] = str(Path(batchinfer.__file__).parents[1])
    paths = ["model.path=fake", f"input.path={inputs}", f"output.path={output}", "output.rows_per_chunk=10"]
    settings = ["engine.max_slots=8", "sampling.max_tokens=16", "job.max_error_fraction=0.5"]
    launcher = [MPIEXEC, "-n", str(ranks)] if ranks > 1 else []
    command = [*launcher, sys.executable, str(RANK), "run", *paths, *settings]
    return subprocess.Popen(
        command, env=clean | environment, cwd=output.parent, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.feature("job", "MPI jobs: a rank or all of them killed, resumed with another number of ranks")
def test_another_number_of_ranks_at_every_resume(inputs: Path, expected: Expected, scratch: Path) -> None:
    for number in range(size(1, 12)):
        rng = generator(f"ranks {number}")
        output = scratch / f"place-{number}" / "out"
        output.parent.mkdir()
        witness = Witness(output, expected)
        for _ in range(2):
            ranks = rng.randint(2, 4)
            dying = {"FAIL_WHEN": "killed", "FAIL_RANK": str(rng.randrange(ranks))}
            job = start(ranks, inputs, output, STEP_SECONDS="0.01", **(dying if rng.random() < 0.5 else {}))
            time.sleep(rng.uniform(1, 2))
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)  # mpiexec's proxies end their ranks when it is gone
            job.communicate(timeout=60)
            witness.look()
        last = start(rng.choice([1, 2, 4]), inputs, output)
        _, log = last.communicate(timeout=120)
        assert last.returncode == 0, log
        witness.complete()
        tally["MPI jobs killed twice, completed with another number of ranks"] += 1
