"""Who computes which chunk: rank 0 hands them out and computes too.

:class:`ChunkQueue` holds every decision and knows no messages. The two dispatchers carry its answers: the root to
itself and to the ranks that ask, a worker from the root. They need only ``send`` and ``receive`` of a World, so that
tests can deliver the messages in any order.

No rank waits for a dead one. Each hears of the other at least every ``HEARTBEAT_SECONDS``; after ``SILENCE_SECONDS``
without a word the root gives a rank's chunks to others, and a worker goes through the missing chunks by itself
(array.py). Both may be wrong about a rank that was only slow: a chunk computed twice is committed once.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from batchinfer.cluster.world import POLL_SECONDS
from batchinfer.types import Chunk

HEARTBEAT_SECONDS = 10.0
"""Longest time between two messages of a rank that is alive: a thousand ranks then cost rank 0 a hundred a second."""

SILENCE_SECONDS = 60.0
"""A rank of which nothing was heard for so long counts as dead. Engine steps are shorter by far, and what takes longer
(loading, the check at the end) runs in :func:`meanwhile`."""

WATCH_SECONDS = 1.0
"""Between two looks of the root for silent ranks, and for work for idle ones."""

DEATHS = 2
"""A chunk that was in the hand of so many ranks when they died is set aside: a row of it may have killed them, and it
would go on with the others. Another attempt runs such rows alone."""

SLOW_FACTOR = 2.0
"""An idle rank repeats a chunk that has taken this many times what chunks took so far."""


class Dispatcher(Protocol):
    """One rank's source of work. ``report`` is any picklable state of the rank; rank 0 keeps the latest of each."""

    def next_chunk(self, hungry: bool) -> Chunk | None:
        """A chunk for this rank, or None: nothing right now, ask again. ``hungry``: the engine has room and no rows;
        otherwise the rank asks ahead, and is served only while there is plenty."""

    def done(self, chunk: Chunk, report: Any) -> None:
        """The chunk is committed."""

    def poll(self, report: Any) -> None:
        """Exchange what is due. Called once per engine step; never waits. ``report`` None: as before."""

    @property
    def finished(self) -> bool:
        """Every chunk of the job is committed, by whichever rank, or left to another attempt."""

    @property
    def draining(self) -> bool:
        """Rank 0 has asked all ranks to leave their chunks unfinished and to end."""


class ChunkQueue:
    """Which chunks wait, which are in hand and of whom, how many are done. Rank 0's book; pure decisions. ``now`` is
    in seconds, of any clock that does not go backwards."""

    def __init__(self, chunks: Iterable[Chunk], ranks: int):
        self._waiting = deque(chunks)
        self._ranks = ranks
        self._holders: dict[int, list[int]] = {}  # chunk index -> the ranks that compute it, oldest chunk first
        self._taken: dict[int, tuple[Chunk, float]] = {}
        self._held: Counter[int] = Counter()
        self._times = [0, 0.0]  # chunks done, seconds they took in all
        self._deaths: Counter[int] = Counter()
        self.aside: set[int] = set()

    @property
    def finished(self) -> bool:
        """Nothing is left to do but what was set aside."""
        return not self._waiting and not self._holders

    def take(self, rank: int, hungry: bool, now: float) -> Chunk | None:
        """The next chunk for ``rank``, or None.

        No rank holds more than its share of what is not done, so that the first one ready does not empty a short
        queue (guided self-scheduling, Polychronopoulos & Kuck 1987). At the tail, with fewer chunks than ranks, only
        a hungry rank gets one: it starts at once, where another would keep it waiting behind its own rows. A rank
        without any work repeats the chunk that is most overdue elsewhere (backup tasks, Dean & Ghemawat 2004)."""
        if not self._waiting:
            return self._overdue(rank, now) if hungry and not self._held[rank] else None
        share = -(-(len(self._waiting) + len(self._holders)) // self._ranks)
        if self._held[rank] >= share or (not hungry and len(self._waiting) < self._ranks):
            return None
        chunk = self._waiting.popleft()
        self._taken[chunk.index] = chunk, now
        self._holders[chunk.index] = [rank]
        self._held[rank] += 1
        return chunk

    def done(self, index: int, now: float) -> None:
        """Strike a chunk off, whoever computed it; nothing, if it is done already. ValueError if it was in nobody's
        hand: then the book is wrong."""
        if index not in self._taken:
            raise ValueError(f"chunk {index} is reported, which nobody was given")
        if index in self._holders:
            self._times[0] += 1
            self._times[1] += now - self._taken[index][1]
            self._held.subtract(self._holders.pop(index))
        else:
            self._waiting = deque(chunk for chunk in self._waiting if chunk.index != index)
            self.aside.discard(index)

    def release(self, rank: int, dead: bool) -> None:
        """Take a rank's chunks out of its hand: it is dead, or leaves. Those that nobody else computes wait again, or
        are set aside."""
        for index in [index for index, ranks in self._holders.items() if rank in ranks]:
            self._deaths[index] += dead
            self._holders[index].remove(rank)
            if self._holders[index]:
                continue
            del self._holders[index]
            if self._deaths[index] < DEATHS:
                self._waiting.appendleft(self._taken[index][0])
            else:
                self.aside.add(index)
        self._held[rank] = 0

    def _overdue(self, rank: int, now: float) -> Chunk | None:
        count, seconds = self._times
        for index, ranks in self._holders.items():
            chunk, since = self._taken[index]
            if (
                count
                and len(ranks) == 1
                and ranks != [rank]
                and not self._deaths[index]
                and now - since > SLOW_FACTOR * seconds / count
            ):
                ranks.append(rank)
                self._held[rank] += 1
                return chunk
        return None


class RootDispatcher:
    """Rank 0's, also of a job of one rank. ``reports[rank]`` is the latest report of each rank, ``lost`` the ranks
    that have been silent for too long."""

    def __init__(self, world: Any, chunks: Iterable[Chunk], clock: Callable[[], float] = time.monotonic):
        self._world, self._clock = world, clock
        self._queue = ChunkQueue(chunks, world.size)
        self._workers = range(1, world.size)
        now = clock()
        self._heard = dict.fromkeys(self._workers, now)
        self._sent = dict.fromkeys(self._workers, now)
        self._idle: set[int] = set()  # ranks that were refused when hungry, and wait for a chunk
        self._farewells: dict[int, Any] = {}
        self._gone: set[int] = set()
        self._watched = now
        self._told = False
        self.reports: list[Any] = [None] * world.size
        self.lost: set[int] = set()
        self.draining = False

    @property
    def finished(self) -> bool:
        return self._queue.finished

    @property
    def aside(self) -> set[int]:
        """Chunks that this attempt leaves undone, see DEATHS."""
        return self._queue.aside

    def next_chunk(self, hungry: bool) -> Chunk | None:
        return self._queue.take(0, hungry, self._clock())

    def done(self, chunk: Chunk, report: Any) -> None:
        self.reports[0] = report
        self._queue.done(chunk.index, self._clock())
        self._tell_if_finished()

    def poll(self, report: Any) -> None:
        self.reports[0] = self.reports[0] if report is None else report
        while (message := self._world.receive()) is not None:
            self._answer(*message)
        now = self._clock()
        if now - self._watched >= WATCH_SECONDS:
            self._watched = now
            self._watch(now)
        self._tell_if_finished()

    def drain(self) -> None:
        """Ask all ranks to end; see ``Dispatcher.draining``."""
        if not self.draining:
            self.draining = True
            self._tell_all("drain")

    def gather(self, value: Any, seconds: float) -> list[Any]:
        """The values that the workers have :meth:`WorkerDispatcher.leave` with, after rank 0's own; without those of
        ranks that are lost or take longer than ``seconds``."""
        deadline = self._clock() + seconds
        while set(self._workers) - self._farewells.keys() - self.lost and self._clock() < deadline:
            self.poll(None)
            time.sleep(POLL_SECONDS)
        self.lost |= set(self._workers) - self._farewells.keys()
        return [value, *self._farewells.values()]

    def release(self, value: Any) -> None:
        """Tell the ranks that have left what the job came to; they go. Afterwards no message is under way, except to
        ranks that are lost."""
        self._tell_all("end", value)
        while set(self._workers) - self._gone - self.lost:
            self.poll(None)
            time.sleep(POLL_SECONDS)

    def _answer(self, rank: int, message: tuple[str, Any, Any]) -> None:
        kind, value, self.reports[rank] = message
        now = self._heard[rank] = self._clock()
        if rank in self.lost:  # it was only slow, and has missed what all were told
            self.lost.discard(rank)
            for missed in ["finished"] * self._told + ["drain"] * self.draining:
                self._send(rank, missed)
        if kind == "ask":
            chunk = self._queue.take(rank, value, now)
            if chunk is None and value:
                self._idle.add(rank)
            self._send(rank, "chunk", chunk)
        elif kind == "done":
            self._idle.discard(rank)
            self._queue.done(value, now)
        elif kind == "bye":
            self._idle.discard(rank)
            self._queue.release(rank, dead=False)
            self._farewells[rank] = value
        elif kind == "gone":
            self._gone.add(rank)
        if kind != "gone" and now - self._sent[rank] >= HEARTBEAT_SECONDS:
            # An answer, never a message out of the blue: some MPI libraries die of sending to a rank that is dead.
            self._send(rank, "alive")

    def _watch(self, now: float) -> None:
        for rank in self._workers:
            if now - self._heard[rank] > SILENCE_SECONDS and rank not in self._gone | self.lost:
                self.lost.add(rank)
                self._queue.release(rank, dead=True)
        for rank in sorted(self._idle - self.lost):
            if (chunk := self._queue.take(rank, True, now)) is not None:
                self._idle.discard(rank)
                self._send(rank, "chunk", chunk)

    def _tell_if_finished(self) -> None:
        if self.finished and not self._told:
            self._told = True
            self._tell_all("finished")

    def _tell_all(self, kind: str, value: Any = None) -> None:
        for rank in self._workers:
            if rank not in self.lost:
                self._send(rank, kind, value)

    def _send(self, rank: int, kind: str, value: Any = None) -> None:
        self._sent[rank] = self._clock()
        self._world.send(rank, (kind, value))


class WorkerDispatcher:
    """Any other rank's. One question is under way at most; the answer is there an engine step later.

    ``alone`` makes the dispatcher that goes on when the root is silent, given the indices of the chunks in this rank's
    hand; :attr:`lost` then holds rank 0.
    """

    def __init__(
        self, world: Any, alone: Callable[[set[int]], Dispatcher], clock: Callable[[], float] = time.monotonic
    ):
        self._world, self._clock = world, clock
        self._make_alone = alone
        self._alone: Dispatcher | None = None
        self._asked: bool | None = None  # the question under way: was the rank hungry?
        self._refused: set[bool] = set()  # questions whose answer stays no until a chunk is done, or comes unasked
        self._chunk: Chunk | None = None
        self._held: set[int] = set()
        self._report: Any = None
        self._heard = self._sent = clock()
        self._end: tuple[Any] | None = None
        self._finished = False
        self.draining = False

    @property
    def finished(self) -> bool:
        return self._finished or (self._alone is not None and self._alone.finished)

    @property
    def lost(self) -> set[int]:
        return {0} if self._alone else set()

    def next_chunk(self, hungry: bool) -> Chunk | None:
        if self._alone:
            return self._alone.next_chunk(hungry)
        chunk, self._chunk = self._chunk, None
        if chunk is None and self._asked is None and hungry not in self._refused:
            self._asked = hungry
            self._send("ask", hungry)
        if chunk is None or chunk.index in self._held:  # the root had given up this rank, and its chunk waited again
            return None
        self._held.add(chunk.index)
        return chunk

    def done(self, chunk: Chunk, report: Any) -> None:
        if self._alone:
            return self._alone.done(chunk, report)
        self._report = report
        self._held.discard(chunk.index)
        self._refused.clear()
        self._send("done", chunk.index)

    def poll(self, report: Any) -> None:
        """Take the root's answers; tell it the rank's state where that has changed, or that there is one."""
        if self._alone:
            return self._alone.poll(report)
        while (message := self._world.receive()) is not None:
            self._heard = self._clock()
            self._take(*message[1])
        now = self._clock()
        if now - self._heard > SILENCE_SECONDS:
            self._alone = self._make_alone(self._held)
        elif self._end is None and (report not in (None, self._report) or now - self._sent >= HEARTBEAT_SECONDS):
            self._report = self._report if report is None else report
            self._send("report")

    def leave(self, value: Any) -> Any:
        """Say goodbye with ``value`` and wait for rank 0's last word; None if it is silent."""
        if not self._alone:
            self._send("bye", value)
        while not self._alone and self._end is None:
            self.poll(None)
            time.sleep(POLL_SECONDS)
        if self._end is None:
            return None
        self._send("gone")
        return self._end[0]

    def _take(self, kind: str, value: Any) -> None:
        if kind == "finished":
            self._finished = True
        elif kind == "drain":
            self.draining = True
        elif kind == "end":
            self._end = (value,)
        elif kind == "chunk" and value is None:
            self._refused.add(bool(self._asked))
            self._asked = None
        elif kind == "chunk":
            self._chunk, self._asked = value, None
            self._refused.clear()

    def _send(self, kind: str, value: Any = None) -> None:
        self._sent = self._clock()
        self._world.send(0, (kind, value, self._report))


@contextlib.contextmanager
def meanwhile(dispatcher: Dispatcher, threads: bool) -> Iterator[None]:
    """Keep the messages going while the caller does what takes long, in a thread. Of the dispatcher and its world
    others may then only ask ``finished`` and ``draining``, call ``drain``, and use the channel. ``threads``: whether
    the MPI library allows calls from another thread; if not, nothing is done, and a rank that takes longer than
    ``SILENCE_SECONDS`` counts as dead."""
    over = threading.Event()
    failure: list[BaseException] = []

    def attend() -> None:
        try:
            while not over.wait(POLL_SECONDS):
                dispatcher.poll(None)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=attend, name="messages", daemon=True)
    if threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if threads:
            thread.join()
    if failure:
        raise failure[0]
