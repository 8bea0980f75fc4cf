"""A rank outlives its MPI library where the launcher lets it.

MPICH ends the process on errors that it calls fatal, whatever the error handler says (5.0.2: the connection to a lost
node breaks, which MPI_Iprobe finds), and has the launcher end all other ranks first: one lost node would cost the job.
So the library's line to the launcher is taken from it while the job runs, and where it calls exit(), the process
executes its own command line again, without MPI: it goes on like a task of a job array (array.py), and loses the rows
that it had in hand and the time to load the model. The same where a call of the library does not come back: MPI_Isend
to a dead rank never does over libfabric's ofi_rxm (2.5).
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping

CHANNEL = "PMI_FD"
"""Names the library's descriptor to the launcher, in the wire protocols of PMI-1 and PMI-2 (Balaji et al. 2010)."""

WITHOUT_MPI = "cluster.mpi=off"

STUCK_SECONDS = 60.0
"""After so long in one call the library is given up. No call waits for another rank, so it takes microseconds; but a
node may swap, and a message of megabytes may still be under way."""


class Lifeline:
    """From MPI_Init to :meth:`give_back` the library can neither reach the launcher nor end this process."""

    def __init__(self, channel: int, command: list[str]):
        self._process = importlib.import_module("batchinfer._process")
        self._calls: dict[int, float] = {}  # thread -> when it called the library
        self._channel, self._saved = channel, os.dup(channel)
        os.set_inheritable(self._saved, True)  # open as long as the process, or the launcher takes it for ended
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, channel)
        os.close(nowhere)
        self._process.restart_at_exit(command)
        atexit.register(self._process.end_at_exit)  # an end of the interpreter is our own
        threading.Thread(target=self._watch, name="mpi-watch", daemon=True).start()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Around a call of the library that has to come back within ``STUCK_SECONDS``."""
        thread = threading.get_ident()
        self._calls[thread] = time.monotonic()
        try:
            yield
        finally:
            del self._calls[thread]

    def give_back(self) -> None:
        """Before MPI_Finalize and MPI_Abort."""
        os.dup2(self._saved, self._channel)
        self._process.end_at_exit()

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, STUCK_SECONDS / 10))
            if any(time.monotonic() - since > STUCK_SECONDS for since in list(self._calls.values())):
                self._process.restart(f"a call of MPI has not come back for {STUCK_SECONDS:.0f} s")


def lifeline(env: Mapping[str, str]) -> Lifeline | None:
    """Of a process that srun has started. mpiexec ends all ranks when one dies, so there it would be of no use."""
    if "SLURM_STEP_ID" not in env or not env.get(CHANNEL, "").isdecimal():
        return None
    return Lifeline(int(env[CHANNEL]), [sys.executable, *sys.orig_argv[1:], WITHOUT_MPI])
