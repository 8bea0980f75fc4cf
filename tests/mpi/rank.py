"""`batchinfer` with the fake engine, for the tests of this folder: run it under mpiexec.

FAIL_RANK and FAIL_WHEN (see ``Failing``) make one rank fail; STEP_SECONDS slows the engine's steps down.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import time
from pathlib import Path

RANK = int(os.environ.get("PMI_RANK", 0))
WHEN = os.environ.get("FAIL_WHEN", "") if os.environ.get("FAIL_RANK") == str(RANK) else ""
START_SECONDS = float(os.environ.get("START_SECONDS", 900))
STEP_SECONDS = float(os.environ.get("STEP_SECONDS", 0))

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

if WHEN == "silently":
    os._exit(9)
if WHEN == "before MPI":
    sys.modules["mpi4py"] = None

from fake_engine import FakeEngine, identify_fake  # noqa: E402

from batchinfer import __main__ as command  # noqa: E402
from batchinfer import job  # noqa: E402
from batchinfer.cluster import world  # noqa: E402
from batchinfer.types import JobError  # noqa: E402

world.START_SECONDS = START_SECONDS


class Failing(FakeEngine):
    def step(self) -> list:
        time.sleep(STEP_SECONDS)
        if self.stats().steps >= 5:
            if WHEN == "midway":
                raise RuntimeError("the device went away")
            if WHEN == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().step()

    def close(self) -> None:
        if WHEN == "at the end":
            raise JobError("the last breath failed", 74)


def load(model: object, engine: object, *, threads: int, rank_on_node: int, ranks_on_node: int) -> FakeEngine:
    if WHEN == "at the start":
        raise JobError("no device for this rank", 69)
    if os.environ.get("SHOW_SHARES"):
        print(f"rank {RANK}: {threads} threads, {ranks_on_node} ranks", flush=True)
    return Failing(slots=8)


if WHEN == "importing":

    def broken(*_: object) -> None:
        importlib.import_module("batchinfer.no_such_module")

    job.run = broken
else:
    job.run = functools.partial(job.run, load_engine=load, identify=identify_fake)

sys.exit(command.main())
