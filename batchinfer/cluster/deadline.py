"""When a rank has to stop: the walltime that is left, a signal, a file, or rank 0 says so."""

from __future__ import annotations

import math
import os
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Mapping

from batchinfer.types import ExitCode, JobError

END_VARIABLES = ("SLURM_JOB_END_TIME", "BATCHINFER_END_TIME")
"""Where the end of the allocation stands, in seconds since 1970. Slurm has the first from 23.02 on; the second is for
launch scripts of other schedulers and older Slurms."""

DRAIN_FILE = "DRAIN"
"""Its presence in the job's state folder stops the job; nobody needs to know a job id for that."""

LOOK_SECONDS = 5.0
"""Between two looks for that file."""

WINDOW, ENOUGH, QUANTILE = 256, 16, 0.95
"""A row is expected to take as long as the slowest twentieth of the last WINDOW rows, once ENOUGH are known."""


def seconds_left(environment: Mapping[str, str], now: float | None = None) -> float | None:
    """Until the allocation ends; None if nobody says. ``now`` in seconds since 1970. JobError(64) for a value that is
    no number."""
    for name in END_VARIABLES:
        if text := environment.get(name):
            if not text.isdecimal():
                raise JobError(f"{name}={text} is not allowed: it must be seconds since 1970", ExitCode.USAGE)
            return int(text) - (time.time() if now is None else now)
    return None


class RowTimes:
    """How long a row takes from its start to its end, of the rows that ended lately."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, seconds: float) -> None:
        if len(self._recent) == WINDOW:
            self._sorted.remove(self._recent.popleft())
        self._recent.append(seconds)
        insort(self._sorted, seconds)

    def expected(self) -> float:
        """Seconds; 0 while too few are known."""
        return self._sorted[int(QUANTILE * len(self._sorted))] if len(self._sorted) >= ENOUGH else 0.0


class Deadline:
    """One rank's answer to two questions: must I stop now, and is there time for another row?

    ``seconds`` (None: no end) until the allocation ends, counted on this host's monotonic clock: clocks of different
    hosts are not compared. ``margin``: how long before that the rank stops. ``signal`` names the signal that came, if
    one did. ``state``: the folder that is looked into for DRAIN_FILE, or None.
    """

    def __init__(
        self,
        seconds: float | None,
        margin: float,
        signal: Callable[[], str | None] = lambda: None,
        state: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._clock, self._signal = clock, signal
        self._end = math.inf if seconds is None else clock() + seconds - margin
        self._file = None if state is None else os.path.join(state, DRAIN_FILE)
        self._looked = -math.inf
        self._reason: str | None = None
        self._times = RowTimes()

    def reason(self) -> str | None:
        """Why the rank must stop now, or None. Asked between two steps; once given, it stays."""
        if self._reason is None:
            if name := self._signal():
                self._reason = f"signal {name}"
            elif self._clock() >= self._end:
                self._reason = "the allocation ends soon"
            elif self._file_is_there():
                self._reason = f"{self._file} is there: remove it before the next run"
        return self._reason

    def allows_row(self) -> bool:
        """Whether a row started now is expected to end in time. One that does not is not lost: it goes on in the next
        attempt, but its prompt is computed twice."""
        return self._clock() + self._times.expected() < self._end

    def row_took(self, seconds: float) -> None:
        """A row ended, this long after its start."""
        self._times.add(seconds)

    def _file_is_there(self) -> bool:
        now = self._clock()
        if self._file is None or now - self._looked < LOOK_SECONDS:
            return False
        self._looked = now
        return os.path.exists(self._file)
