"""What the launch script learns from a start of the ranks, and how it has to start them."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchinfer.cluster.launch import LAUNCH, launch_name, note_failure, noted_failure, srun_mpi_type

DEBIAN = (
    "MPI plugin types are...\n\tpmix\n\tnone\n\tcray_shasta\n\tpmi2\nspecific pmix plugin versions available: pmix_v4"
)


@pytest.mark.parametrize(
    ("library", "listed", "expected"),
    [
        ("MPICH Version:      5.0.2", DEBIAN, "pmi2"),
        ("Intel(R) MPI Library 2021.18", DEBIAN, "pmi2"),
        ("MPICH Version: 4.3", "none pmix", "pmix"),
        ("Open MPI v5.0.11", DEBIAN, "pmix"),
        ("Open MPI v4.1.4", "none pmi2 pmix_v3", "pmix_v3"),
        ("Open MPI v5.0.11", "none pmi2", None),
        ("MPI VERSION    : CRAY MPICH version 8.1.28.2", DEBIAN, "cray_shasta"),
        ("MPI VERSION    : CRAY MPICH version 8.1.28.2", "none, pmi2, pmix", "pmi2"),
        (None, DEBIAN, None),
        ("MPICH Version: 5.0.2", "", None),
    ],
)
def test_srun_is_told_how_the_library_starts(library: str | None, listed: str, expected: str | None) -> None:
    assert srun_mpi_type(library, listed) == expected


def test_the_first_failure_is_noted_for_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCH, raising=False)
    note_failure(65)
    assert launch_name() is None
    assert noted_failure() is None
    monkeypatch.setenv(LAUNCH, str(tmp_path / "launch"))
    assert noted_failure() is None
    note_failure(65)
    note_failure(70)
    assert noted_failure() == 65
