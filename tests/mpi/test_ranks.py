"""Real MPI ranks with the fake engine: the same output for any number of them, and an end when one fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.data.audit import verify

MPIEXEC = next((str(p) for p in [Path(sys.executable).with_name("mpiexec")] if p.exists()), shutil.which("mpiexec"))
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec: pip install 'batchinfer[mpi]'")]
pytest.importorskip("mpi4py", reason="pip install 'batchinfer[mpi]'")

RANK = Path(__file__).with_name("rank.py")
HANGS = 120  # seconds after which a job counts as one that does not end; a start takes one or two
OUTSIDE = ("PMI_", "PMIX_", "OMPI_", "SLURM_", "MPI_LOCAL", "HYDRA_")


def mpiexec(ranks: int, script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """``ranks`` 0: without mpiexec."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(OUTSIDE)}
    start = [MPIEXEC, "-n", str(ranks)] if ranks else []
    command = [*start, sys.executable, str(script), *arguments]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=HANGS)


def launch(ranks: int, inputs: Path, output: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess:
    paths = ["model.path=fake", f"input.path={inputs}", f"output.path={output}", "output.rows_per_chunk=10"]
    return mpiexec(ranks, RANK, "run", *paths, "engine.max_slots=8", *overrides, **environment)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files with 300 rows, one of them bad."""
    folder = tmp_path_factory.mktemp("in")
    for name, rows in (("a", 180), ("b", 120)):
        texts = [f"{name} {i} {'y' * (i % 11)}" for i in range(rows)]
        texts[7] = None if name == "b" else texts[7]
        pq.write_table(pa.table({"prompt": texts}), folder / f"{name}.parquet", row_group_size=60)
    return folder


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a plain run, without launcher."""
    output = tmp_path_factory.mktemp("alone") / "out"
    result = launch(0, inputs, output, "sampling.temperature=1", "cluster.mpi=auto")
    assert result.returncode == 0, result.stderr
    return output


def tables(output: Path) -> dict[str, list]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted(output.glob("part-*.parquet"))}


def test_messages_arrive_before_a_gather_that_follows_them() -> None:
    """MPI_Finalize with a message under way hangs now and then, so a job must end with none."""
    result = mpiexec(3, RANK.with_name("messages.py"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "all arrived 2\n"


@pytest.mark.feature("job", "same row, same tokens on any number of MPI ranks, sampled ones too")
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_output_does_not_depend_on_the_number_of_ranks(
    ranks: int, inputs: Path, alone: Path, tmp_path: Path
) -> None:
    result = launch(ranks, inputs, tmp_path / "out", "sampling.temperature=1", STEP_SECONDS="0.002")
    assert result.returncode == 0, result.stderr
    assert tables(tmp_path / "out") == tables(alone)
    assert verify(str(tmp_path / "out")).ok
    assert result.stderr.count("rows       300: 299 ok, 1 failed (NULL_PROMPT 1)") == 1
    assert f"on {ranks} rank" in result.stderr
    committed = {_committer(path) for path in (tmp_path / "out").glob("part-*.parquet")}
    assert len(committed) == ranks  # everybody had some of the 30 chunks

    again = launch(ranks, inputs, tmp_path / "out", "sampling.temperature=1", FAIL_WHEN="at the start", FAIL_RANK="0")
    assert again.returncode == 0, again.stderr  # nothing to do: no engine is loaded


def _committer(part: Path) -> int:
    return json.loads(pq.read_metadata(part).metadata[b"batchinfer"])["provenance"]["rank"]


def test_more_ranks_than_chunks(inputs: Path, tmp_path: Path) -> None:
    result = launch(4, inputs, tmp_path / "out", "output.rows_per_chunk=200", SHOW_SHARES="1")
    assert result.returncode == 0, result.stderr
    assert verify(str(tmp_path / "out")).ok
    shares = {line for line in result.stdout.splitlines() if line.startswith("rank")}
    cpus = max(1, len(os.sched_getaffinity(0)) // 4)
    assert shares == {f"rank {rank}: {cpus} threads, 4 ranks" for rank in range(2)}  # two chunks, two engines


@pytest.mark.feature("job", "a failing rank ends the job with its exit code")
@pytest.mark.parametrize(
    ("when", "rank", "code", "text"),
    [
        ("before MPI", 2, 69, "[rank 2 on {host}] a launcher started several ranks (PMI_SIZE), but"),
        ("importing", 2, 70, "no_such_module"),
        ("at the start", 3, 69, "[rank 3 on {host}] no device for this rank"),
        ("midway", 1, 71, "the device went away"),
        ("midway", 0, 71, "the device went away"),
        ("killed", 2, None, ""),
        ("at the end", 2, 74, "the last breath failed"),
    ],
)
def test_a_failing_rank_ends_the_job(
    when: str, rank: int, code: int | None, text: str, inputs: Path, alone: Path, tmp_path: Path
) -> None:
    result = launch(4, inputs, tmp_path / "out", "sampling.temperature=1", FAIL_WHEN=when, FAIL_RANK=str(rank))
    assert result.returncode == code if code is not None else result.returncode != 0
    assert text.format(host=os.uname().nodename) in result.stderr + result.stdout
    assert not (tmp_path / "out" / "_SUCCESS").exists()

    if when in ("midway", "killed"):
        finished = launch(0, inputs, tmp_path / "out", "sampling.temperature=1")
        assert finished.returncode == 0, finished.stderr
        assert tables(tmp_path / "out") == tables(alone)


@pytest.mark.parametrize("when", ["stopped", "stopped at the start", "stopped at the end"])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.feature("job", "ranks that hang are not waited for: the others finish the job and end it")
def test_a_hanging_rank_is_left_behind(when: str, rank: int, inputs: Path, alone: Path, tmp_path: Path) -> None:
    hang = {"FAIL_WHEN": when, "FAIL_RANK": str(rank), "SILENCE_SECONDS": "6", "STEP_SECONDS": "0.02"}
    result = launch(4, inputs, tmp_path / "out", "sampling.temperature=1", **hang)
    assert result.returncode == 0, result.stderr
    assert tables(tmp_path / "out") == tables(alone)
    assert (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.parametrize("dead", [None, 1])
@pytest.mark.feature("job", "job array without MPI: tasks that start at once share one plan and end with one _SUCCESS")
def test_the_tasks_of_an_array(dead: int | None, inputs: Path, alone: Path, tmp_path: Path) -> None:
    def task(number: int) -> subprocess.CompletedProcess:
        array = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_STEP_ID": "0"}
        fate = {"FAIL_WHEN": "killed", "FAIL_RANK": str(dead), "STEP_SECONDS": "0.01"}
        return launch(0, inputs, tmp_path / "out", "sampling.temperature=1", "cluster.mpi=off", **array, **fate)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(task, range(4)))
    for number, result in enumerate(results):
        assert result.returncode == (-9 if number == dead else 0), result.stderr
    assert tables(tmp_path / "out") == tables(alone)
    assert verify(str(tmp_path / "out")).ok
    records = (tmp_path / "out" / "_batchinfer" / "attempts").glob("*.begin.json")
    assert sorted(json.loads(path.read_text())["task"] for path in records) == [0, 1, 2, 3]


@pytest.mark.parametrize("when", ["killed at the start", "killed at the end"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_dead_rank_ends_the_job_under_mpiexec(when: str, rank: int, inputs: Path, tmp_path: Path) -> None:
    result = launch(4, inputs, tmp_path / "out", FAIL_WHEN=when, FAIL_RANK=str(rank), SILENCE_SECONDS="6")
    assert result.returncode != 0
    again = launch(4, inputs, tmp_path / "out")
    assert again.returncode == 0, again.stderr


def test_too_many_bad_rows_is_the_exit_code_of_the_whole_job(inputs: Path, tmp_path: Path) -> None:
    result = launch(3, inputs, tmp_path / "out", "job.max_error_fraction=0")
    assert result.returncode == 3, result.stderr
    assert (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.parametrize("when", ["silently", "stopped before MPI"])
def test_ranks_do_not_wait_for_ever_for_one_that_never_starts(when: str, inputs: Path, tmp_path: Path) -> None:
    """mpiexec says nothing about a process that ends before it has loaded MPI."""
    result = launch(3, inputs, tmp_path / "out", FAIL_WHEN=when, FAIL_RANK="1", START_SECONDS="3")
    assert result.returncode != 0
    assert "_wait_for_all_ranks_to_start" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_wrong_configuration_is_told_once(inputs: Path, tmp_path: Path) -> None:
    result = launch(4, inputs, tmp_path / "out", "sampling.temprature=1")
    assert result.returncode == 64
    assert result.stderr.count("no key 'sampling.temprature'") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.feature("job", "launcher and MPI library that do not fit are refused")
def test_ranks_that_do_not_see_each_other_are_refused(inputs: Path, tmp_path: Path) -> None:
    """What a launcher with the wrong PMI gives: singletons, each of which would do the whole job."""
    result = launch(0, inputs, tmp_path / "out", SLURM_PROCID="1", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="4")
    assert result.returncode == 69
    assert "SLURM_STEP_NUM_TASKS=4" in result.stderr
    assert "srun --mpi=pmi2" in result.stderr
    assert not (tmp_path / "out").exists()


def test_cfg_is_printed_by_one_rank(inputs: Path, tmp_path: Path) -> None:
    result = launch(2, inputs, tmp_path / "out", "--cfg", "job")
    assert result.returncode == 0
    assert result.stdout.count("max_tokens") == 1
