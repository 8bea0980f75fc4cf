"""Who computes which chunk: rank 0 hands them out and computes too.

:class:`ChunkQueue` holds every decision and knows no messages. The two dispatchers carry its answers: the root to
itself and to the ranks that ask, a worker from the root. They need only ``send`` and ``receive`` of a World, so that
tests can deliver the messages in any order.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, Protocol

from batchinfer.types import Chunk


class Dispatcher(Protocol):
    """One rank's source of work. ``report`` is any picklable state of the rank; rank 0 keeps the latest of each."""

    def next_chunk(self, hungry: bool) -> Chunk | None:
        """A chunk for this rank, or None: nothing right now, ask again. ``hungry``: the engine has room and no rows;
        otherwise the rank asks ahead, and is served only while there is plenty."""

    def done(self, chunk: Chunk, report: Any) -> None:
        """The chunk is committed."""

    def poll(self, report: Any) -> None:
        """Exchange what is due. Called once per engine step; never waits."""

    @property
    def finished(self) -> bool:
        """Every chunk of the job is committed, by whichever rank."""


class ChunkQueue:
    """Which chunks wait, which are in hand and of whom, how many are done. Rank 0's book; pure decisions."""

    def __init__(self, chunks: Iterable[Chunk], ranks: int):
        self._waiting = deque(chunks)
        self._ranks = ranks
        self._holder: dict[int, int] = {}
        self._held: Counter[int] = Counter()

    @property
    def finished(self) -> bool:
        return not self._waiting and not self._holder

    def take(self, rank: int, hungry: bool) -> Chunk | None:
        """The next chunk for ``rank``, or None.

        No rank holds more than its share of what is not done, so that the first one ready does not empty a short
        queue (guided self-scheduling, Polychronopoulos & Kuck 1987). At the tail, with fewer chunks than ranks, only
        a hungry rank gets one: it starts at once, where another would keep it waiting behind its own rows. A refusal
        holds until the rank has finished a chunk."""
        share = -(-(len(self._waiting) + len(self._holder)) // self._ranks)
        if not self._waiting or self._held[rank] >= share or (not hungry and len(self._waiting) < self._ranks):
            return None
        chunk = self._waiting.popleft()
        self._holder[chunk.index] = rank
        self._held[rank] += 1
        return chunk

    def done(self, rank: int, index: int) -> None:
        """Strike a chunk off. ValueError if ``rank`` does not hold it: then the book is wrong."""
        if self._holder.get(index) != rank:
            raise ValueError(f"rank {rank} reports chunk {index}, which is in the hand of {self._holder.get(index)}")
        del self._holder[index]
        self._held[rank] -= 1


class RootDispatcher:
    """Rank 0's, also of a job of one rank. ``reports[rank]`` is the latest report of each rank."""

    def __init__(self, world: Any, chunks: Iterable[Chunk]):
        self._world = world
        self._queue = ChunkQueue(chunks, world.size)
        self.reports: list[Any] = [None] * world.size

    @property
    def finished(self) -> bool:
        return self._queue.finished

    def next_chunk(self, hungry: bool) -> Chunk | None:
        return self._queue.take(0, hungry)

    def done(self, chunk: Chunk, report: Any) -> None:
        self.reports[0] = report
        self._strike_off(0, chunk.index)

    def poll(self, report: Any) -> None:
        self.reports[0] = report
        while (message := self._world.receive()) is not None:
            self._answer(*message)

    def _answer(self, rank: int, message: tuple[str, Any, Any]) -> None:
        kind, value, self.reports[rank] = message
        if kind == "ask":
            chunk = self._queue.take(rank, hungry=value)
            self._world.send(rank, ("chunk", chunk))
        elif kind == "done":
            self._strike_off(rank, value)

    def _strike_off(self, rank: int, index: int) -> None:
        self._queue.done(rank, index)
        if self._queue.finished:
            for worker in range(1, self._world.size):
                self._world.send(worker, ("finished", None))


class WorkerDispatcher:
    """Any other rank's, of a job with one chunk at least. One question is under way at most; the answer is there an
    engine step later."""

    def __init__(self, world: Any):
        self._world = world
        self._asked: bool | None = None  # the question under way: was the rank hungry?
        self._refused: set[bool] = set()  # questions whose answer stays no until a chunk is done
        self._chunk: Chunk | None = None
        self._report: Any = None
        self.finished = False

    def next_chunk(self, hungry: bool) -> Chunk | None:
        chunk, self._chunk = self._chunk, None
        if chunk is None and self._asked is None and hungry not in self._refused:
            self._asked = hungry
            self._world.send(0, ("ask", hungry, self._report))
        return chunk

    def done(self, chunk: Chunk, report: Any) -> None:
        self._report = report
        self._refused.clear()
        self._world.send(0, ("done", chunk.index, report))

    def poll(self, report: Any) -> None:
        """Take the root's answers; tell it the rank's state where that has changed."""
        if report != self._report:
            self._report = report
            self._world.send(0, ("report", None, report))
        while (message := self._world.receive()) is not None:
            kind, value = message[1]
            if kind == "finished":
                self.finished = True
            elif value is None:
                self._refused.add(self._asked)
                self._asked = None
            else:
                self._chunk, self._asked = value, None
