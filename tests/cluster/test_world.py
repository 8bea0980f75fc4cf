"""What the launcher says, without a launcher; MPI itself is tested in tests/mpi."""

from __future__ import annotations

import pytest

from batchinfer.cluster.world import Launch, World, join, launcher
from batchinfer.types import ExitCode, JobError


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, Launch(2, 4, "PMI_SIZE")),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, Launch(1, 2, "OMPI_COMM_WORLD_SIZE")),
        (
            {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_ID": "0"},
            Launch(3, 8, "SLURM_STEP_NUM_TASKS"),
        ),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, Launch(3, 8, "SLURM_NTASKS")),
        ({"PMIX_RANK": "1"}, Launch(1, None, "PMIX_RANK")),
        ({"PALS_RANKID": "0"}, Launch(0, None, "PALS_RANKID")),
        # the batch script itself is one process, however many tasks the job may start
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Launch()),
        # mpiexec inside a Slurm job: its own numbers, not those of the job
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "1"},
            Launch(1, 2, "PMI_SIZE"),
        ),
        ({"PMI_RANK": "x", "PMI_SIZE": "2"}, Launch()),
    ],
)
def test_launcher_is_read_from_the_environment(environment: dict[str, str], expected: Launch) -> None:
    assert launcher(environment) == expected


def test_a_plain_run_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "1")
    world = join("auto")
    assert type(world) is World
    assert (world.rank, world.size, world.local_size) == (0, 1, 1)
    assert world.bcast({"a": 1}) == {"a": 1}
    assert world.gather("x") == ["x"]
    assert world.receive() is None
    with pytest.raises(ValueError, match="rank 1 does not exist"):
        world.send(1, "hello")


def test_a_launcher_without_an_mpi_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)
    with pytest.raises(JobError, match=r"PMI_SIZE.*pip install 'batchinfer\[mpi\]'") as caught:
        join("auto")
    assert caught.value.exit_code == ExitCode.UNFIT
    assert type(join("off")) is World


def test_without_mpi_slurm_says_who_else_is_on_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"STEP_ID": "0", "PROCID": "5", "STEP_NUM_TASKS": "8", "LOCALID": "1", "STEP_TASKS_PER_NODE": "4(x2)"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    world = join("off")
    assert (world.size, world.local_rank, world.local_size) == (1, 1, 4)
