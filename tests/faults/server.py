"""A process that has everything imported and forks jobs: a job then starts in milliseconds.

python server.py SOCKET serves one job per connection: a line of JSON (harness.Order) in; the job's process id out, and
its exit status (as os.waitpid has it) when it has ended. The job has a session of its own; its output goes to a file.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import sys
import time
from typing import Any

import pyarrow.parquet  # noqa: F401 (imported once, for all jobs)
from fake_engine import FakeEngine, identify_fake
from faults import shim

from batchinfer import job
from batchinfer.__main__ import _report
from batchinfer.cluster.world import World
from batchinfer.config import from_dict


class SlowEngine(FakeEngine):
    """``step_seconds``: what a step takes."""

    def __init__(self, slots: int, step_seconds: float):
        super().__init__(slots=slots)
        self._step_seconds = step_seconds

    def step(self) -> list:
        time.sleep(self._step_seconds)
        return super().step()


def load(model: Any, engine: Any, *, step_seconds: float, **ranks: int) -> SlowEngine:
    return SlowEngine(engine.max_slots, step_seconds)


def run_job(order: dict[str, Any]) -> int:
    """The job as the command line would do it; its exit code."""
    os.setsid()
    os.chdir(order["folder"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    config = from_dict(order["config"])
    if order["fault"]:
        shim.arm(config.output.path, shim.Fault(**order["fault"]))
    for name, value in order["settings"].items():  # module.NAME of the product, for this job alone
        module, _, attribute = name.rpartition(".")
        assert hasattr(sys.modules[module], attribute), name
        setattr(sys.modules[module], attribute, value)
    try:
        return job.run(config, World(), functools.partial(load, step_seconds=order["step_seconds"]), identify_fake)
    except BaseException as error:
        return _report(error, World())


def serve_one(connection: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with connection.makefile("rw") as stream:
        order = json.loads(stream.readline())
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = run_job(order)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        print(child, file=stream, flush=True)
        print(os.waitpid(child, 0)[1], file=stream, flush=True)


def main(path: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that serve a connection
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                try:
                    serve_one(connection)
                finally:
                    os._exit(0)
            connection.close()


if __name__ == "__main__":
    main(sys.argv[1])
