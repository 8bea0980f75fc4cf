"""Bulk data between two ranks over MPI, beside the messages of world.py: it neither delays nor reorders those."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import Lock
from typing import Any, Protocol

Buffer = bytes | bytearray | memoryview

Test = Callable[[], bool]
"""Whether an operation is over. Never waits; ConnectionError if the other rank is known to be dead."""


class Channel(Protocol):
    """Messages of a ``kind`` (0 to 32767) that keep their order between two ranks. A buffer belongs to the channel
    until the operation is over."""

    def send(self, rank: int, kind: int, data: Buffer) -> Test: ...

    def probe(self, rank: int) -> tuple[int, int] | None:
        """(kind, bytes) of the oldest message from ``rank`` that is not received, or None at once."""

    def receive(self, rank: int, kind: int, out: Buffer) -> Test:
        """Receive the message that :meth:`probe` has found; ``out`` has its size."""

    def abandon(self, data: Buffer) -> None:
        """Leave an operation under way for good: MPI may use ``data`` as long as the process lives."""


class MpiChannel:
    """On a communicator of its own. ``lock`` is held in every call of MPI, which is made within ``within``.
    ``abandoned`` is not empty once something was left under way: MPI_Finalize would wait for it."""

    def __init__(self, mpi: Any, comm: Any, lock: Lock, within: Callable[[], AbstractContextManager]):
        self._mpi, self._comm, self._lock, self._within = mpi, comm, lock, within
        comm.Set_errhandler(mpi.ERRORS_RETURN)
        self.abandoned: list[Buffer] = []

    def send(self, rank: int, kind: int, data: Buffer) -> Test:
        return self._test(self._call(lambda: self._comm.Isend([data, self._mpi.BYTE], rank, kind)))

    def probe(self, rank: int) -> tuple[int, int] | None:
        status = self._mpi.Status()
        if not self._call(lambda: self._comm.Iprobe(rank, self._mpi.ANY_TAG, status)):
            return None
        return status.Get_tag(), status.Get_count(self._mpi.BYTE)

    def receive(self, rank: int, kind: int, out: Buffer) -> Test:
        return self._test(self._call(lambda: self._comm.Irecv([out, self._mpi.BYTE], rank, kind)))

    def abandon(self, data: Buffer) -> None:
        self.abandoned.append(data)

    def _test(self, request: Any) -> Test:
        return lambda: self._call(request.Test)

    def _call(self, operation: Callable[[], Any]) -> Any:
        try:
            with self._lock, self._within():
                return operation()
        except self._mpi.Exception as error:
            raise ConnectionError(str(error)) from None
