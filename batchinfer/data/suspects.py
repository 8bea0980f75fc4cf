"""Rows that were in the engine when it crashed: any of them may have crashed it, and would do so again.

    OUT/_batchinfer/suspects/WRITER.log     one for each rank that computes; removed when the rank ends in order

A log has a line for the rows that went into the engine ("+ ids"), for those that came out ("- ids"), and, if the engine
crashed, why ("! reason", or what faulthandler writes at a fatal signal). A log without such a mark belongs to a rank
that runs, or was killed from outside: then no row is to blame. Nothing is synced, since what was written outlives the
process; a node that goes down leaves its rows without suspicion.

Suspects run alone, after all other rows. A row that crashed the engine before, and alone, gets no third try.
"""

from __future__ import annotations

import faulthandler
import os
import secrets
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from batchinfer.data.commit import read_bytes, remove
from batchinfer.types import Completion, ErrorCode, Request, RowError

SUSPECTS = "suspects"
FATAL = "Fatal Python error"  # how faulthandler begins
NEVER_ALONE = 2  # crashes after which a row that crashed alone is given up


@dataclass(frozen=True)
class Suspicion:
    """What earlier attempts left: for each row how many crashes it was part of, and the rows that were alone in one."""

    crashes: Counter[int] = field(default_factory=Counter)
    alone: frozenset[int] = frozenset()

    def falls_on(self, row: int) -> bool:
        """Whether the row has to run alone."""
        return self.crashes[row] > 0

    def condemns(self, row: int) -> bool:
        """Whether the row is given up."""
        return row in self.alone and self.crashes[row] >= NEVER_ALONE


class SuspectLog:
    """One rank's log. An OSError of a write is passed over: the log only matters if there is a crash as well."""

    def __init__(self, state: str):
        """``state``: the job's state folder."""
        self._path = os.path.join(state, SUSPECTS, f"{secrets.token_hex(8)}.log")
        self._fd = -1
        self._enabled_before = faulthandler.is_enabled()
        with suppress(OSError):
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, 0o666)
            faulthandler.enable(self._fd)

    def went_in(self, rows: Iterable[int]) -> None:
        """The engine is about to get these rows."""
        self._line("+", rows)

    def came_out(self, rows: Iterable[int]) -> None:
        """The engine has finished these rows."""
        self._line("-", rows)

    def crashed(self, reason: str) -> None:
        """The engine failed: the rows in it are suspects from now on."""
        self._line("!", [" ".join(reason.split())])

    def close(self, in_order: bool) -> None:
        """``in_order``: the rank has not crashed, and the log is of no use."""
        if self._fd < 0:
            return
        faulthandler.disable()
        if self._enabled_before:
            faulthandler.enable(sys.__stderr__)
        with suppress(OSError):
            os.close(self._fd)
        self._fd = -1
        if in_order:
            remove(self._path)

    def _line(self, kind: str, items: Iterable[object]) -> None:
        words = [str(item) for item in items]
        if words and self._fd >= 0:
            with suppress(OSError):
                os.write(self._fd, f"{kind} {' '.join(words)}\n".encode())


def read_suspicion(state: str) -> Suspicion:
    """From all logs in the job's state folder. Logs that can't be read are passed over."""
    crashes: Counter[int] = Counter()
    alone: set[int] = set()
    for data in _logs(state):
        inside = rows_in_crash(data)
        crashes.update(inside)
        if len(inside) == 1:
            alone |= inside
    return Suspicion(crashes, frozenset(alone))


def rows_in_crash(log: str) -> set[int]:
    """The rows in the engine when it crashed; none if the log says nothing of a crash."""
    inside: set[int] = set()
    for line in log.splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "!" or line.startswith(FATAL):
            return inside
        ids = {int(word) for word in rest.split() if word.isdecimal()} if kind in ("+", "-") else set()
        inside = inside | ids if kind == "+" else inside - ids
    return set()


def clear_suspects(state: str) -> None:
    """Remove all logs: the job is complete."""
    folder = os.path.join(state, SUSPECTS)
    with suppress(OSError):
        for name in os.listdir(folder):
            remove(os.path.join(folder, name))
        os.rmdir(folder)


def condemn(rows: Iterable[Request | Completion], suspicion: Suspicion) -> list[Request | Completion]:
    """The rows, with an error in the place of those that are given up."""
    return [
        Completion(row.id, len(row.prompt), error=RowError(ErrorCode.ENGINE_CRASH, _reason(suspicion, row.id)))
        if isinstance(row, Request) and suspicion.condemns(row.id)
        else row
        for row in rows
    ]


def _reason(suspicion: Suspicion, row: int) -> str:
    return f"the engine crashed {suspicion.crashes[row]} times with this row in it, in the end with this row alone"


def _logs(state: str) -> Iterator[str]:
    folder = os.path.join(state, SUSPECTS)
    with suppress(OSError):
        for name in sorted(os.listdir(folder)):
            with suppress(OSError):
                yield read_bytes(os.path.join(folder, name)).decode("utf-8", "replace")
