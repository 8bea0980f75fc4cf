"""What the doctor prints, and the code with which it ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from doctor.nodes import CPU_BUILD, GPU_NODE, LOGIN

from batchinfer import doctor
from batchinfer.doctor.facts import Facts, FileSystem, Mpi, Nic
from batchinfer.types import ExitCode, JobError


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize(
    ("facts", "code"),
    [
        (GPU_NODE, ExitCode.COMPLETE),
        (replace(LOGIN, nics=(Nic("hsn0", "Slingshot", "down"),)), ExitCode.COMPLETE),  # a remark
        (replace(GPU_NODE, build=CPU_BUILD), ExitCode.UNFIT),
    ],
)
def test_only_what_prevents_a_job_is_unfit(
    facts: Facts, code: int, as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "gather", lambda paths: facts)
    assert doctor.main([], as_json) == code
    printed = capsys.readouterr().out
    if as_json:
        assert json.loads(printed)["fit"] is (code == 0)
    else:
        assert printed.rstrip().endswith(f"are {'unfit' if code else 'fit'} for jobs.")
        assert ("UNFIT: " in printed) is bool(code)


def test_the_text_has_a_line_for_each_part() -> None:
    facts = replace(
        GPU_NODE,
        mpi=Mpi("Open MPI v5.0.3", srun="/usr/bin/srun", srun_mpi="pmix", gpu_aware=True),
        nics=(Nic("mlx5_0:1", "InfiniBand", "ACTIVE", 400),),
        file_systems=(FileSystem("/scratch/me", "/scratch", "lustre", 5 << 40),),
    )
    text = doctor.to_text(facts, [])
    for part in (
        "cuda 12.8.93 for 80-real 90a-real 90-virtual",
        "4 of NVIDIA on the PCI bus, driver 570.86.15 (CUDA 12.8)",
        "NVIDIA H100 80GB HBM3, 9.0, 80 GiB, 0000:17:00.0",
        "Open MPI v5.0.3 (GPU-aware)",
        "srun --mpi=pmix",
        "mlx5_0:1: InfiniBand, ACTIVE, 400 Gbit/s",
        "/scratch/me: lustre at /scratch, 5120 GiB free",
    ):
        assert part in text


def test_the_launch_script_reads_its_line_of_the_json() -> None:
    """slurm/run.sh takes it with sed: one line, one key of that name."""
    facts = replace(LOGIN, mpi=Mpi("MPICH", srun="/usr/bin/srun", srun_types="pmi2", srun_mpi="pmi2"))
    printed = json.dumps(doctor.to_json(facts, []), indent=2)
    assert [line.strip() for line in printed.splitlines() if '"srun_mpi"' in line] == ['"srun_mpi": "pmi2",']


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"nowhere: there is no such file or folder") as caught:
        doctor.gather([str(tmp_path / "nowhere")])
    assert caught.value.exit_code == ExitCode.USAGE
