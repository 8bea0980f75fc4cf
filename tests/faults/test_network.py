"""A job needs no network: it runs where there is none, and opens no socket of an Internet family."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults.oracle import Witness, expect

import batchinfer

RANK = Path(__file__).parents[1] / "mpi" / "rank.py"
TESTS = Path(__file__).parents[1]


def job(inputs: Path, output: Path) -> list[str]:
    paths = ["model.path=fake", f"input.path={inputs}", f"output.path={output}", "output.rows_per_chunk=10"]
    return [sys.executable, str(RANK), "run", *paths, "sampling.max_tokens=16", "job.max_error_fraction=0.5"]


def environment() -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PMI", "OMPI_", "SLURM_"))}
    return clean | {"PYTHONPATH": str(Path(batchinfer.__file__).parents[1])}


def can(*command: str) -> bool:
    return (
        shutil.which(command[0]) is not None and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    )


@pytest.mark.feature("safety", "no network: a job runs in a network namespace without any interface")
@pytest.mark.skipif(not can("unshare", "-rn"), reason="needs unshare and user namespaces")
def test_a_job_without_a_network(inputs: Path, scratch: Path) -> None:
    witness = Witness(scratch / "out", expect(inputs))
    command = ["unshare", "-rn", *job(inputs, scratch / "out")]
    done = subprocess.run(command, env=environment(), cwd=scratch, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    witness.complete()


@pytest.mark.skipif(not can("strace", "-f"), reason="needs strace")
def test_no_internet_socket(inputs: Path, scratch: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-o", str(trace), "-e", "trace=%network,execve", *job(inputs, scratch / "out")]
    done = subprocess.run(command, env=environment(), cwd=scratch, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    calls = trace.read_text()
    assert "execve(" in calls  # the trace has seen something
    assert not re.findall(r"AF_INET6?", calls)
    assert calls.count("execve(") == 1  # the job itself starts no other program
