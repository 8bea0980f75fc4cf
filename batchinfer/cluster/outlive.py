"""A rank outlives its MPI library where the launcher lets it.

MPICH ends the process on errors that it calls fatal, whatever the error handler says (5.0.2: the connection to a lost
node breaks, which MPI_Iprobe finds), and has the launcher end all other ranks first: one lost node would cost the job.
So the library's line to the launcher is taken from it while the job runs, and where it calls exit(), the process
executes its own command line again, without MPI: it goes on like a task of a job array (array.py), and loses the rows
that it had in hand and the time to load the model.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from collections.abc import Mapping

CHANNEL = "PMI_FD"
"""Names the library's descriptor to the launcher, in the wire protocols of PMI-1 and PMI-2 (Balaji et al. 2010)."""

WITHOUT_MPI = "cluster.mpi=off"


class Lifeline:
    """From MPI_Init to :meth:`give_back` the library can neither reach the launcher nor end this process."""

    def __init__(self, channel: int, command: list[str]):
        process = importlib.import_module("batchinfer._process")
        self._end_at_exit = process.end_at_exit
        self._channel, self._saved = channel, os.dup(channel)
        os.set_inheritable(self._saved, True)  # open as long as the process, or the launcher takes it for ended
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, channel)
        os.close(nowhere)
        process.restart_at_exit(command)
        atexit.register(process.end_at_exit)  # an end of the interpreter is our own

    def give_back(self) -> None:
        """Before MPI_Finalize and MPI_Abort."""
        os.dup2(self._saved, self._channel)
        self._end_at_exit()


def lifeline(env: Mapping[str, str]) -> Lifeline | None:
    """Of a process that srun has started. mpiexec ends all ranks when one dies, so there it would be of no use."""
    if "SLURM_STEP_ID" not in env or not env.get(CHANNEL, "").isdecimal():
        return None
    return Lifeline(int(env[CHANNEL]), [sys.executable, *sys.orig_argv[1:], WITHOUT_MPI])
