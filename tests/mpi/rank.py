"""`batchinfer` with the fake engine, for the tests of this folder and of slurm/: run it under mpiexec or srun.

FAIL_RANK and FAIL_WHEN (see ``Failing``) make one rank fail, in a job array one task; with FAIL_ONCE, the path of a
file that is there, only the first time. STEP_SECONDS slows the engine's steps down, IMPORT_SECONDS the start.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import signal
import sys
import time
from pathlib import Path

RANK = os.environ.get("PMI_RANK") or os.environ.get("SLURM_ARRAY_TASK_ID") or os.environ.get("SLURM_PROCID", "0")
ONCE = Path(os.environ.get("FAIL_ONCE", __file__))
IN_STEP = "SLURM_ARRAY_TASK_ID" not in os.environ or "SLURM_STEP_ID" in os.environ
WHEN = os.environ.get("FAIL_WHEN", "") if os.environ.get("FAIL_RANK") == RANK and ONCE.exists() and IN_STEP else ""
START_SECONDS = float(os.environ.get("START_SECONDS", 900))
STEP_SECONDS = float(os.environ.get("STEP_SECONDS", 0))

sys.path.insert(0, str(Path(__file__).parents[1]))

if sys.argv[1:2] == ["run"] and "--cfg" not in sys.argv:
    time.sleep(float(os.environ.get("IMPORT_SECONDS", 0)))
    if WHEN and "FAIL_ONCE" in os.environ:
        ONCE.unlink()
    if WHEN == "silently":
        os._exit(9)
if WHEN == "before MPI":
    sys.modules["mpi4py"] = None
if WHEN == "stopped before MPI":
    os.kill(os.getpid(), signal.SIGSTOP)

from fake_engine import FakeEngine, identify_fake  # noqa: E402

from batchinfer import __main__ as command  # noqa: E402
from batchinfer import job  # noqa: E402
from batchinfer.cluster import dispatch, outlive, weights, world  # noqa: E402
from batchinfer.types import JobError, Request  # noqa: E402

world.START_SECONDS = START_SECONDS
dispatch.SILENCE_SECONDS = float(os.environ.get("SILENCE_SECONDS", 60))
dispatch.HEARTBEAT_SECONDS = dispatch.SILENCE_SECONDS / 6
job.SILENCE_SECONDS = dispatch.SILENCE_SECONDS
outlive.STUCK_SECONDS = dispatch.SILENCE_SECONDS
weights.CLOSE_SECONDS = 1.0


class Failing(FakeEngine):
    def add(self, request: Request) -> None:
        if os.environ.get("FAIL_WHEN") == "a row" and b"row 123 " in bytes(request.prompt.astype("uint8")):
            os.kill(os.getpid(), signal.SIGSEGV)  # whichever rank has it
        super().add(request)

    def step(self) -> list:
        time.sleep(STEP_SECONDS)
        if self.stats().steps >= 5:
            if WHEN == "midway":
                raise RuntimeError("the device went away")
            if WHEN == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if WHEN == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if WHEN == "ended by its library":  # MPICH's way to go
                os.write(int(os.environ["PMI_FD"]), b"cmd=abort exitcode=15\n")
                ctypes.CDLL(None).exit(15)
        return super().step()

    def close(self) -> None:
        if WHEN == "killed at the end":
            os.kill(os.getpid(), signal.SIGKILL)
        if WHEN == "stopped at the end":
            os.kill(os.getpid(), signal.SIGSTOP)
        if WHEN == "at the end":
            raise JobError("the last breath failed", 74)


def load(
    model: object, engine: object, *, threads: int, rank_on_node: int, ranks_on_node: int, source: object
) -> FakeEngine:
    if WHEN == "killed at the start":
        time.sleep(0.5)  # the exchange before is over everywhere
        os.kill(os.getpid(), signal.SIGKILL)
    if WHEN == "stopped at the start":
        os.kill(os.getpid(), signal.SIGSTOP)
    if WHEN == "at the start":
        raise JobError("no device for this rank", 69)
    if os.environ.get("SHOW_SHARES"):
        print(f"rank {RANK}: {threads} threads, {ranks_on_node} ranks", flush=True)
    return Failing(slots=8, max_seq_len=4096)


if WHEN == "importing":

    def broken(*_: object) -> None:
        importlib.import_module("batchinfer.no_such_module")

    job.run = broken
else:
    job.run = functools.partial(job.run, load_engine=load, identify=identify_fake)

sys.exit(command.main())
