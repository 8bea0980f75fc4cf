"""slurm/run.sh on a real Slurm of three virtual nodes, with the fake engine: whatever happens, every row once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from slurm.cluster import Cluster, why_not

from batchinfer.data.audit import verify

ROOT = Path(__file__).parents[2]
RUN = ROOT / "slurm" / "run.sh"
PROGRAM = ROOT / "tests" / "mpi" / "rank.py"

REQUIRED = os.environ.get("BATCHINFER_TEST_SLURM") == "1"  # as in .ci/run: then a missing Slurm is a failure
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(not REQUIRED and why_not() is not None, reason=str(why_not()))]
pytest.importorskip("mpi4py", reason="pip install 'batchinfer[mpi]'")

ROWS = 300
SLOW = {"STEP_SECONDS": "0.1", "SILENCE_SECONDS": "4"}
"""About 30 s of work for one rank: time enough for a test to interfere."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("in") / "prompts.parquet"
    pq.write_table(pa.table({"id": range(ROWS), "prompt": [f"row {i} {'y' * (i % 11)}" for i in range(ROWS)]}), path)
    return path


class Job:
    """One output folder, the jobs submitted for it, and what became of them."""

    def __init__(self, cluster: Cluster, folder: Path, inputs: Path):
        self.cluster, self.folder, self.output = cluster, folder, folder / "out"
        program = folder / "bin" / "batchinfer"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {PROGRAM} "$@"\n')
        program.chmod(0o755)
        self.environment = {"PATH": f"{program.parent}:{cluster.environment['PATH']}", "TMPDIR": str(folder / "tmp")}
        paths = ["model.path=fake", f"input.path={inputs}", f"output.path={self.output}", "output.rows_per_chunk=10"]
        self.settings = [*paths, "engine.max_slots=8", "sampling.temperature=1"]

    def submit(self, *arguments: str, settings: tuple[str, ...] = (), **environment: str) -> str:
        """The id of a new job of three nodes, unless ``arguments`` of sbatch say otherwise."""
        options = ["--parsable", "-N3", "--time=10", "-o", str(self.folder / "log"), "-D", str(self.folder), *arguments]
        command = ["sbatch", *options, str(RUN), *self.settings, *settings]
        return self.cluster.call(*command, **self.environment, **environment)

    def wait_for_parts(self, count: int) -> None:
        self.cluster.wait(lambda: len(self.parts()) >= count, 60, f"{count} parts\n{self.log()}")

    def parts(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.output.glob("part-*.parquet"))}

    def end(self, job: str) -> dict[str, str]:
        """Wait until the job is over; what Slurm says of it."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
        try:
            return self.cluster.wait_for_job(job, *over, timeout=120)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{self.log()}") from None

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("log*")))

    def check(self) -> None:
        """Every row once, with the answer that it gets anywhere, and nothing left beside the output."""
        assert (self.output / "_SUCCESS").exists(), self.log()
        assert verify(str(self.output)).ok
        rows = [row for name in self.parts() for row in pq.read_table(self.output / name).to_pylist()]
        assert [row["id"] for row in rows] == list(range(ROWS))
        assert all(row["status"] == "ok" for row in rows)
        assert not list(self.folder.glob(".batchinfer-*"))

    def committers(self) -> set[object]:
        records = [pq.read_metadata(self.output / name).metadata[b"batchinfer"] for name in self.parts()]
        provenance = [json.loads(record)["provenance"] for record in records]
        return {(of["attempt"].split("-")[1], of["rank"]) for of in provenance}


@pytest.fixture
def job(cluster: Cluster, inputs: Path, tmp_path: Path) -> Iterator[Job]:
    job = Job(cluster, tmp_path, inputs)
    yield job
    subprocess.run(["scancel", "--user=root"], env=cluster.environment, timeout=60)
    for node, state in cluster.states().items():
        if state.rstrip("*") == "down":
            cluster.start_node(node)
    cluster.wait(lambda: set(cluster.states().values()) == {"idle"}, 60, "idle nodes")


@pytest.mark.feature("slurm", "sbatch slurm/run.sh: ranks on all nodes, the job's exit code from its output")
def test_a_job_on_three_nodes(job: Job) -> None:
    ended = job.end(job.submit("--ntasks-per-node=2", STEP_SECONDS="0.02"))
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "0"), job.log()
    job.check()
    assert {rank for _, rank in job.committers()} == set(range(6))
    log = job.log()
    assert "start 1 on node[1-3]: 2 ranks per node, --mpi=pmi2" in log
    table = [line.split()[:2] for line in log.splitlines() if "  node" in line]
    assert table == [[str(rank), f"node{1 + rank // 2}"] for rank in range(6)]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("when", ["killed", "stopped", "killed at the start", "killed at the end"])
@pytest.mark.feature("slurm", "ranks that die or hang under srun, rank 0 too: the others finish, or are started again")
def test_the_survivors_finish(when: str, rank: int, job: Job) -> None:
    """A message that is under way to a rank when it dies can be fatal to the sender in MPICH: then they start again."""
    once = job.folder / "once"
    once.touch()
    failing = {"FAIL_WHEN": when, "FAIL_RANK": str(rank), "FAIL_ONCE": str(once)}
    ended = job.end(job.submit(**failing, **(SLOW | {"STEP_SECONDS": "0.02"})))
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), job.log()
    if when == "stopped":
        assert "start 2" not in job.log()
    else:
        assert "start 3" not in job.log()
    job.check()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.feature("slurm", "a rank whose MPI library gives up goes on without it, and the others with it")
def test_the_library_ends_the_process(rank: int, job: Job) -> None:
    once = job.folder / "once"
    once.touch()
    failing = {"FAIL_WHEN": "ended by its library", "FAIL_RANK": str(rank), "FAIL_ONCE": str(once)}
    ended = job.end(job.submit(**failing, **(SLOW | {"STEP_SECONDS": "0.02"})))
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), job.log()
    assert "a library ends the process" in job.log()
    assert "start 2" not in job.log()
    job.check()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("when", ["killed", "killed at the start", "killed at the end"])
@pytest.mark.feature("slurm", "ranks without MPI (cluster.mpi=off): the others always finish")
def test_the_survivors_without_mpi_finish(when: str, rank: int, job: Job) -> None:
    failing = {"FAIL_WHEN": when, "FAIL_RANK": str(rank), "STEP_SECONDS": "0.05"}
    ended = job.end(job.submit("--ntasks-per-node=2", settings=("cluster.mpi=off",), **failing))
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), job.log()
    assert "start 2" not in job.log()
    job.check()
    records = (job.output / "_batchinfer" / "attempts").glob("*.begin.json")
    assert sorted(json.loads(path.read_text())["task"] for path in records) == list(range(6))


@pytest.mark.feature("slurm", "a rank that dies before the others have met it: started again on the same nodes")
def test_a_rank_that_dies_while_starting(job: Job) -> None:
    once = job.folder / "once"
    once.touch()
    ended = job.end(job.submit(FAIL_WHEN="silently", FAIL_RANK="1", FAIL_ONCE=str(once), START_SECONDS="5"))
    assert ended["JobState"] == "COMPLETED", job.log()
    assert "code 71" in job.log()
    assert "start 2 on node[1-3]" in job.log()
    job.check()


@pytest.mark.feature("slurm", "a row that kills its rank: started again, it runs alone, and then is an error row")
def test_a_row_that_kills(job: Job) -> None:
    job.settings.append("job.max_error_fraction=0.1")
    ended = job.end(job.submit("--ntasks-per-node=2", FAIL_WHEN="a row", SILENCE_SECONDS="4"))
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), job.log()
    # It kills in the batch and then alone; a rank that outlives its MPI library may find it before another start does.
    assert "start 4" not in job.log()
    assert verify(str(job.output)).ok
    rows = [row for name in job.parts() for row in pq.read_table(job.output / name).to_pylist()]
    assert [row["id"] for row in rows if row["status"] == "error"] == [123]
    assert len(rows) == ROWS


@pytest.mark.feature("slurm", "a node is lost: the job is requeued, and goes on where it was")
def test_a_lost_node_requeues_the_job(job: Job) -> None:
    number = job.submit(**SLOW)
    job.wait_for_parts(4)
    job.cluster.crash_node("node2")
    before = job.parts()
    job.cluster.start_node("node2")
    ended = job.end(number)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.log()
    job.check()
    after = job.parts()
    assert all(after[name] == data for name, data in before.items())


@pytest.mark.feature("slurm", "a node is lost with sbatch --no-kill: the ranks on the others finish at once")
def test_a_lost_node_of_an_allocation_that_stays(job: Job) -> None:
    number = job.submit("--no-kill", **SLOW)
    job.wait_for_parts(4)
    job.cluster.crash_node("node3")
    ended = job.end(number)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), job.log()
    job.check()


def test_the_first_node_is_lost_of_an_allocation_that_stays(job: Job) -> None:
    """With it go rank 0, srun and the job's script. The others finish the work; nobody is left to end the job."""
    number = job.submit("--no-kill", **SLOW)
    job.wait_for_parts(4)
    job.cluster.crash_node(job.cluster.job(number)["BatchHost"])
    job.cluster.wait((job.output / "_SUCCESS").exists, 90, f"end of the work\n{job.log()}")
    job.cluster.call("scancel", number)
    assert verify(str(job.output)).ok


@pytest.mark.feature("slurm", "a cancelled job goes on when it is submitted again")
def test_scancel_and_submit_again(job: Job) -> None:
    first = job.submit(**SLOW)
    job.wait_for_parts(4)
    job.cluster.call("scancel", first)
    assert job.end(first)["JobState"] == "CANCELLED"
    before = job.parts()
    assert 4 <= len(before) < 30
    second = job.end(job.submit("-N2"))
    assert second["JobState"] == "COMPLETED", job.log()
    job.check()
    after = job.parts()
    assert all(after[name] == data for name, data in before.items())


@pytest.mark.feature("slurm", "before the time limit the job drains and requeues itself, also while it still starts")
@pytest.mark.parametrize("imports", ["0", "8"])
def test_drained_and_requeued(imports: str, job: Job) -> None:
    number = job.submit(IMPORT_SECONDS=imports, **SLOW)
    if imports == "0":
        job.wait_for_parts(4)
    else:
        job.cluster.wait(lambda: "start 1" in job.log(), 30, "start of the ranks")
    job.cluster.call("scancel", "--batch", "--signal=USR1", number)
    ended = job.end(number)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.log()
    assert "code 75, asked to requeue" in job.log()
    assert "Killed" not in job.log()
    job.check()


@pytest.mark.feature("slurm", "the time limit: Slurm's signal, or without one the program's own clock")
@pytest.mark.parametrize(
    ("signal", "margin", "reason"), [("B:USR1@30", 1, "signal SIGUSR1"), ("B:USR1@0", 45, "the allocation ends soon")]
)
def test_the_time_limit(signal: str, margin: int, reason: str, job: Job) -> None:
    """Slurm acts on limits and signals on a grid of 30 s: this signal comes after about 15 s of the minute."""
    work = {"STEP_SECONDS": "0.5" if "30" in signal else "0.2"}
    number = job.submit("--time=1", f"--signal={signal}", settings=(f"job.margin_seconds={margin}",), **work)
    job.cluster.wait(lambda: "code 75" in job.log(), 60, f"a drain\n{job.log()}")
    assert f"stopped, {reason}" in job.log()
    job.cluster.call("scontrol", "update", f"JobId={number}", "TimeLimit=10")
    ended = job.end(number)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.log()
    job.check()


@pytest.mark.feature("slurm", "job array without MPI: tasks take their share, then steal; the first commit wins")
def test_a_job_array(job: Job) -> None:
    number = job.submit("-N1", "--array=0-3", "-n1", "-o", str(job.folder / "log-%a"), STEP_SECONDS="0.05")
    for task in range(4):
        assert job.end(f"{number}_{task}")["JobState"] == "COMPLETED", job.log()
    job.check()
    records = list((job.output / "_batchinfer" / "attempts").glob("*.begin.json"))
    assert sorted(json.loads(path.read_text())["task"] for path in records)[:2] == [0, 1]
    assert "--mpi=none" in job.log()


@pytest.mark.feature("slurm", "a task of a job array that fails leaves its share to the others")
def test_a_job_array_with_a_dead_task(job: Job) -> None:
    failing = {"FAIL_WHEN": "killed", "FAIL_RANK": "1", "STEP_SECONDS": "0.05"}
    number = job.submit("-N1", "--array=0-2", "-n1", "-o", str(job.folder / "log-%a"), **failing)
    states = [job.end(f"{number}_{task}")["JobState"] for task in range(3)]
    assert (states[0], states[2]) == ("COMPLETED", "COMPLETED"), job.log()
    job.check()


@pytest.mark.feature("slurm", "a drained task of a job array requeues itself, without the others")
def test_a_task_of_an_array_is_requeued(job: Job) -> None:
    number = job.submit("-N1", "--array=0-1", "-n1", "-o", str(job.folder / "log-%a"), **SLOW)
    job.wait_for_parts(2)
    job.cluster.call("scancel", "--batch", "--signal=USR1", f"{number}_1")
    ended = [job.end(f"{number}_{task}") for task in range(2)]
    assert [of["JobState"] for of in ended] == ["COMPLETED", "COMPLETED"], job.log()
    assert [of["Restarts"] for of in ended] == ["0", "1"], job.log()
    job.check()


@pytest.mark.feature("slurm", "a file DRAIN stops a job and keeps it from being requeued")
def test_a_file_stops_the_job(job: Job) -> None:
    number = job.submit(**SLOW)
    job.wait_for_parts(4)
    file = job.output / "_batchinfer" / "DRAIN"
    file.touch()
    ended = job.end(number)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0"), job.log()
    assert f"{file} is there" in job.log()
    file.unlink()
    assert job.end(job.submit())["JobState"] == "COMPLETED", job.log()
    job.check()


def test_a_refused_job_is_not_started_again(job: Job) -> None:
    assert job.end(job.submit())["JobState"] == "COMPLETED", job.log()
    ended = job.end(job.submit(settings=("sampling.seed=5",)))
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "65:0"), job.log()
    assert "sampling.seed" in job.log()
    ended = job.end(job.submit(settings=("sampling.temprature=1",)))
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "64:0"), job.log()
    assert job.log().count("start 1") == 2
    assert "start 2" not in job.log()


@pytest.mark.feature("slurm", "three attempts in a row without a new row end a job")
def test_a_hopeless_job_ends(job: Job) -> None:
    ended = job.end(job.submit("-N1", FAIL_WHEN="killed at the start", FAIL_RANK="0"))
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "70:0"), job.log()
    assert "start 3" in job.log()
    assert "start 4" not in job.log()


@pytest.mark.feature("slurm", "bash slurm/run.sh inside an interactive allocation")
def test_an_interactive_allocation(job: Job) -> None:
    command = ["salloc", "-N2", "--ntasks-per-node=1", "bash", str(RUN), *job.settings]
    environment = job.cluster.environment | job.environment
    options = {"cwd": job.folder, "env": environment, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    job.check()


def test_without_settings_it_runs_the_demo(job: Job) -> None:
    os.symlink(ROOT / "examples", job.folder / "examples")
    job.settings = []
    ended = job.end(job.submit("-N1"))
    assert ended["JobState"] == "COMPLETED", job.log()
    assert verify(str(job.folder / "demo-output")).ok
