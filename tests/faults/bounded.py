"""Runs hostile input in a forked process with a bound on time and memory, so that a crash or a hang is a finding."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "socket.bind",
    "pickle.find_class",
    "shutil.rmtree",
)
"""Audit events (sys.addaudithook) that no reading of hostile files may cause."""


@dataclass(frozen=True)
class Outcome:
    """``value`` is what the function returned or raised. ``signal``: what ended the process, or 0. ``rss_mib``: how far
    its peak memory rose."""

    value: Any
    signal: int
    seconds: float
    rss_mib: float
    events: tuple[str, ...] = ()


def bounded(function: Callable[[], Any], seconds: int = 20, address_gib: float = 8.0) -> Outcome:
    """Run ``function`` in a fork; its value must pickle. More than ``seconds`` end it with SIGALRM, beyond
    ``address_gib`` more address space an allocation fails."""
    receive, send = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _child(function, send, seconds, address_gib)
    os.close(send)
    with os.fdopen(receive, "rb") as stream:
        data = stream.read()
    status = os.waitpid(child, 0)[1]
    took = time.monotonic() - start
    if os.WIFSIGNALED(status):
        return Outcome(None, os.WTERMSIG(status), took, 0.0)
    value, rss_mib, events = pickle.loads(data)
    return Outcome(value, 0, took, rss_mib, events)


def _child(function: Callable[[], Any], send: int, seconds: int, address_gib: float) -> NoReturn:
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a Python handler would wait for native code to come back
        signal.alarm(seconds)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(address_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        events: list[str] = []
        sys.addaudithook(lambda event, _: events.append(event) if event in FORBIDDEN else None)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        before = peak_mib()
        try:
            value = function()
        except BaseException as error:
            error.__traceback__ = None
            value = error
        events = [event for event in events if event != "pickle.find_class"]
        os.write(send, pickle.dumps((_portable(value), peak_mib() - before, tuple(events))))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def peak_mib() -> float:
    """Highest resident memory of this process so far."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def _portable(value: Any) -> Any:
    """Errors with arguments of their own do not unpickle: what is looked at of them is class, text and exit code."""
    if not isinstance(value, BaseException):
        return value
    return Failure(type(value).__name__, str(value), getattr(value, "exit_code", None))


@dataclass(frozen=True)
class Failure:
    """An exception: its class, its text, and the exit code of a JobError (else None)."""

    name: str
    text: str
    exit_code: int | None
