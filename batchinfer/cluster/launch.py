"""What the launch script (slurm/run.sh) and the program tell each other.

The script names each start of the ranks: BATCHINFER_LAUNCH is a path that does not exist yet. The attempt's record
carries that name, so that the script asks after this start and not after an older one. A rank that fails before
there is a record writes its exit code to the path; srun's own exit code is 137 for any failure in which MPI_Abort ends
the other ranks.
"""

from __future__ import annotations

import contextlib
import os

LAUNCH = "BATCHINFER_LAUNCH"


def launch_name() -> str | None:
    """The name of this start, None if a person started it."""
    return os.environ.get(LAUNCH) or None


def note_failure(code: int) -> None:
    """Leave the exit code to the script; of several ranks the first counts."""
    name = launch_name()
    if name:
        with contextlib.suppress(OSError), open(name, "x") as file:
            file.write(f"{code}\n")


def noted_failure() -> int | None:
    """What :func:`note_failure` left."""
    try:
        with open(launch_name() or os.devnull) as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def srun_mpi_type(library: str | None, listed: str) -> str | None:
    """The ``srun --mpi`` with which ranks of this MPI library find each other, among those that ``srun --mpi=list``
    printed; None if there is none, or no library. ``library``: its version text.

    With a wrong one every rank takes itself for the only one, or MPI_Init aborts. MPICH and its kin speak PMI-2 (and
    PMIx only if they were built so), Open MPI since 5 only PMIx; Cray MPICH has a plugin of its own.
    """
    names = listed.replace(",", " ").split()
    pmix = sorted((name for name in names if name.startswith("pmix")), key=len)  # "pmix" is the newest of them
    wanted: list[str] = []
    if library and "CRAY" in library.upper():
        wanted = ["cray_shasta", "pmi2"]
    elif library and library.startswith("Open MPI"):
        wanted = pmix
    elif library:
        wanted = ["pmi2", *pmix]
    return next((name for name in wanted if name in names), None)
