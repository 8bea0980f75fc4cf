"""Starts jobs with the stub engine in processes of their own, waits for them, kills them."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from faults.shim import Fault

import batchinfer
from batchinfer.config import Config, to_dict

BOUND = 60.0
"""Seconds that any job here may take (I7); it takes a tenth of one, but the machine may be busy."""

LANES = 2
"""Jobs that tests here run side by side."""

A = TypeVar("A")
T = TypeVar("T")


def configuration(inputs: Path, output: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A configuration as plain dicts; ``changes`` are dotted keys."""
    values = to_dict(Config())
    given = {
        "model.path": "fake",
        "input.path": str(inputs),
        "output.path": str(output),
        "output.rows_per_chunk": 10,
        "engine.max_slots": 8,
        "sampling.max_tokens": 16,
        "job.max_error_fraction": 0.5,
        "job.journal_seconds": 0.0,  # with each row that finishes
        **(changes or {}),
    }
    for key, value in given.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return values


@dataclass(frozen=True)
class Order:
    """A job to be started. ``folder`` is its working directory, ``settings`` are constants of the product's modules
    that get another value in this process (dotted name -> value)."""

    config: dict[str, Any]
    folder: str
    log: str
    step_seconds: float = 0.0
    fault: Fault | None = None
    settings: dict[str, Any] = field(default_factory=dict)


class Job:
    """A running job."""

    def __init__(self, address: str, order: Order):
        self._log = Path(order.log)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(BOUND)
        self._socket.connect(address)
        self._stream = self._socket.makefile("rw")
        self._stream.write(json.dumps(asdict(order)) + "\n")
        self._stream.flush()
        self.pid = int(self._stream.readline())

    def kill(self) -> None:
        """SIGKILL to its process group. It may have ended by itself."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def wait(self) -> int:
        """Its exit code, negative for a signal as in subprocess. AssertionError: it did not end in time (I7)."""
        try:
            status = int(self._stream.readline())
        except TimeoutError:
            self.kill()
            raise AssertionError(f"I7: a job did not end within {BOUND} s\n{self.log()}") from None
        finally:
            self._stream.close()
            self._socket.close()
        return os.waitstatus_to_exitcode(status)

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


class Server:
    """A fork server. ``start`` costs milliseconds."""

    def __init__(self, address: Path, shim: Path | None):
        self._address = str(address)
        tests, package = Path(__file__).parents[1], Path(batchinfer.__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{tests}"}
        if shim:
            environment["LD_PRELOAD"] = str(shim)
        command = [sys.executable, str(Path(__file__).with_name("server.py")), self._address]
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout.readline() == "ready\n"

    def start(self, order: Order) -> Job:
        return Job(self._address, order)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


@contextmanager
def serving(folder: Path, shim: Path | None) -> Iterator[Server]:
    server = Server(folder / "s", shim)
    try:
        yield server
    finally:
        server.close()


class Bench:
    """One input, any number of outputs. A place is a folder that holds nothing but one output, so that what a job
    writes beside it is noticed; logs lie elsewhere."""

    def __init__(self, server: Server, folder: Path, inputs: Path):
        self.server, self.inputs = server, inputs
        self._folder = folder
        self._places, self._jobs = itertools.count(1), itertools.count(1)

    def place(self) -> Path:
        """The path of a new output, not made yet."""
        folder = self._folder / f"place-{next(self._places)}"
        folder.mkdir()
        return folder / "out"

    def discard(self, output: Path) -> None:
        """Give the space of a place back."""
        shutil.rmtree(output.parent)

    def start(self, output: Path, changes: Mapping[str, Any] | None = None, **options: Any) -> Job:
        """``options``: fields of Order."""
        log = str(self._folder / f"log-{next(self._jobs)}")
        inputs = (changes or {}).get("input.path", self.inputs)
        config = configuration(Path(inputs), output, changes)
        return self.server.start(Order(config, str(output.parent), log, **options))

    def run(self, output: Path, changes: Mapping[str, Any] | None = None, **options: Any) -> tuple[int, str]:
        """(exit code, what it printed)."""
        job = self.start(output, changes, **options)
        code = job.wait()
        return code, job.log()

    def seconds(self, changes: Mapping[str, Any] | None = None, **options: Any) -> float:
        """What one undisturbed run takes."""
        output = self.place()
        start = time.monotonic()
        code, log = self.run(output, changes, **options)
        seconds = time.monotonic() - start
        assert code == 0, log
        self.discard(output)
        return seconds


def side_by_side(function: Callable[[A], T], items: Iterable[A]) -> list[T]:
    """``function`` of every item, two at a time; the first error ends it."""
    with ThreadPoolExecutor(LANES) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)
