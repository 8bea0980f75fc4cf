"""Signals that mean "put down what you have and go": USR1, USR2 and TERM, from the first line of the program on.

A scheduler sends them before a job's time is up, and whenever it likes: while torch is being imported, say, where the
default action would kill the process. The handler only takes a note; the job looks at it between two steps. A second
TERM is somebody in a hurry: the process ends at once, and what is committed and journaled is there.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from batchinfer.types import ExitCode

DRAIN = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)

_received: list[int] = []


def install() -> None:
    """Handle the signals. Called first of all, and again after MPI_Init: MPICH takes SIGUSR1 for itself there."""
    for number in DRAIN:
        signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, DRAIN)  # a launcher may have blocked them until somebody listens


def received() -> str | None:
    """The name of the first signal that came, or None."""
    return signal.Signals(_received[0]).name if _received else None


def _note(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGTERM and signal.SIGTERM in _received:
        os._exit(ExitCode.INCOMPLETE)
    _received.append(number)
