"""The loop of a rank: chunks from the dispatcher, rows into the engine, completions to the writer and the journal."""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from batchinfer.cluster.deadline import Deadline
from batchinfer.cluster.dispatch import Dispatcher, WorkerDispatcher
from batchinfer.cluster.world import POLL_SECONDS
from batchinfer.data.journal import Journal
from batchinfer.data.suspects import SuspectLog, Suspicion
from batchinfer.engine.planner import Planner
from batchinfer.pipeline import Feeder, OpenChunk, Writer
from batchinfer.report import Meter
from batchinfer.types import Completion, EngineStats, ErrorCode, ExitCode, JobError, Request, RowError

LOOK_AHEAD = 2
"""Chunks read ahead of those whose rows are being handed to the engine. They make the next plan: the more there are,
the more rows that begin alike meet in it, and the longer a chunk waits for its last row."""

PATIENCE = 16
"""Steps without a chunk from the dispatcher after which none is expected: an answer of rank 0 takes one or two."""

LACKS = ("no chunk", "reading", "tokenising", "idle")
"""Why the engine could have taken a row and got none; and when it had nothing to compute at all."""


class Engine(Protocol):
    """The engine half, as a job sees it (engine/engine.py)."""

    tokenizer: Any
    max_seq_len: int
    max_slots: int
    kv_tokens: int

    @property
    def num_open(self) -> int: ...

    @property
    def wants_more(self) -> bool: ...

    def expected_tokens(self, request: Request) -> int: ...

    def add(self, request: Request) -> None: ...

    def step(self) -> list[Completion]: ...

    def abandon(self, request_id: int) -> Completion: ...

    def unfinished(self) -> list[Completion]: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


@dataclass
class Loop:
    """Runs until the job is done or this rank must stop; then the journal has what the engine has.

    The engine has rows of several chunks at a time, so that no chunk's end drains the batch, and gets them in the order
    of the planner. Rows under suspicion wait until there is nothing else to do, and then go through the engine alone.
    """

    engine: Engine
    dispatcher: Dispatcher
    feeder: Feeder
    writer: Writer
    journal: Journal
    deadline: Deadline
    suspicion: Suspicion
    log: SuspectLog
    show: Callable[[], object]
    row_seconds: float = 0.0  # longest time of a row in the engine; 0: any
    reorder: bool = True

    _chunk_of: dict[int, OpenChunk] = field(default_factory=dict)  # of the rows that the planner has
    _owners: dict[int, tuple[OpenChunk, float]] = field(default_factory=dict)  # and when the row was started
    _held: deque[tuple[OpenChunk, Request]] = field(default_factory=deque)
    _alone: bool = False
    _refused: int = 0  # steps since there was a chunk or no need for one

    def __post_init__(self) -> None:
        self._planner = Planner(self.engine, self.reorder)
        self._lack = dict.fromkeys(LACKS, 0.0)
        self._meter = Meter(self.engine.stats, self._seconds, lambda: self._planner.shared_tokens)

    def run(self) -> None:
        """JobError(71) if the engine fails: another attempt may do without the row that made it fail."""
        while (
            not self.dispatcher.finished and not self._nothing_fits() and not must_stop(self.dispatcher, self.deadline)
        ):
            start = time.perf_counter()
            self.dispatcher.poll(self._meter.report())
            self._take_chunk()
            self._admit()
            idle = not self.engine.num_open
            lacks = self._what_lacks()
            self._step()
            self._abandon_late_rows()
            if self.journal.due():
                self.writer.record(self.journal.take())
            self._report_commits()
            self.show()
            if idle:
                time.sleep(POLL_SECONDS)
            seconds = time.perf_counter() - start
            if lacks:
                self._lack[lacks] += seconds
            if idle:
                self._lack["idle"] += seconds
        self._put_down()

    @property
    def _rows_wait(self) -> bool:
        return len(self._planner) > 0 or len(self.feeder) > 0

    def _what_lacks(self) -> str:
        """Why the engine's batch may not be full: what the next row waits for; "" if rows are there."""
        if len(self._planner) or not self.engine.wants_more:
            return ""
        return self.feeder.stage or "no chunk"

    def _seconds(self) -> dict[str, float]:
        """What stages waited and worked, in all so far."""
        return self._lack | self.feeder.seconds | self.writer.seconds

    def _nothing_fits(self) -> bool:
        """Rows wait, and none of them would end in time."""
        return self._rows_wait and not self.engine.num_open and not self.deadline.allows_row()

    def _take_chunk(self) -> None:
        if len(self.feeder) >= LOOK_AHEAD:
            return
        chunk = self.dispatcher.next_chunk(hungry=self.engine.wants_more and not self._rows_wait)
        if chunk is not None:
            self.feeder.open(chunk)
        self._refused = 0 if chunk is not None else self._refused + 1

    def _admit(self) -> None:
        """Give the engine rows while it wants some and there is time for them."""
        if self._alone and self.engine.num_open:
            return
        self._alone = False
        while self.engine.wants_more and self.deadline.allows_row() and (request := self._next_row()) is not None:
            self._start(self._chunk_of.pop(request.id), request)
        if self._held and not self.engine.num_open and not self._rows_wait:
            self._alone = True
            self._start(*self._held.popleft())

    def _next_row(self) -> Request | None:
        """The row to start now. Plans those of the chunks that are ready, once the last plan is used up."""
        if not len(self._planner):
            for opened in self.feeder.ready():
                self._planner.add(self._runnable(opened))
        return self._planner.next(more=len(self.feeder) > 0 or self._refused < PATIENCE)

    def _runnable(self, opened: OpenChunk) -> list[Request]:
        """The rows of a chunk that may run beside others. Those that need not run are settled."""
        requests = []
        for item in opened.rows:
            if isinstance(item, Completion):  # a row that can't be a request, or that the journal had
                self._settle(opened, item)
            elif self.suspicion.falls_on(item.id):
                self._held.append((opened, item))
            else:
                self._chunk_of[item.id] = opened
                requests.append(item)
        return requests

    def _start(self, opened: OpenChunk, request: Request) -> None:
        self._owners[request.id] = opened, time.monotonic()
        self.log.went_in([request.id])
        self.engine.add(request)

    def _step(self) -> None:
        try:
            done = self.engine.step()
        except Exception as error:
            traceback.print_exc()
            self.log.crashed(f"{type(error).__name__}: {error}")
            raise JobError(
                f"the engine failed with {len(self._owners)} rows in it ({type(error).__name__}: {error}): the same "
                "command goes on, and lets these rows run alone, after all others",
                ExitCode.LOST_RANK,
            ) from error
        self.log.came_out(completion.id for completion in done)
        for completion in done:
            opened, started = self._owners.pop(completion.id)
            self.deadline.row_took(time.monotonic() - started)
            if not self._settle(opened, completion):
                self.journal.add(opened.chunk, completion)

    def _abandon_late_rows(self) -> None:
        """Rows that take too long become errors, with the text so far."""
        if not self.row_seconds:
            return
        latest = time.monotonic() - self.row_seconds
        for row in [row for row, (_, started) in self._owners.items() if started < latest]:
            opened, _ = self._owners.pop(row)
            error = RowError(ErrorCode.TIMEOUT, f"not finished after job.row_seconds={self.row_seconds:g}")
            self._settle(opened, replace(self.engine.abandon(row), error=error))
            self.log.came_out([row])

    def _settle(self, opened: OpenChunk, completion: Completion) -> bool:
        """Whether the row's chunk is complete now."""
        self._meter.count(completion)
        if not opened.settle(completion):
            return False
        self.journal.drop(opened.chunk)
        self.writer.submit(opened)
        return True

    def _report_commits(self) -> None:
        for chunk in self.writer.committed():
            self.dispatcher.done(chunk, self._meter.report(fresh=True))

    def _put_down(self) -> None:
        for state in self.engine.unfinished():
            self.journal.add(self._owners[state.id][0].chunk, state)
        self.writer.record(self.journal.take())
        self.writer.finish()
        self._report_commits()


def must_stop(dispatcher: Dispatcher, deadline: Deadline) -> bool:
    """Whether this rank puts down what it has: it must, or rank 0 says so. Rank 0 takes all others along."""
    if not deadline.reason():
        return dispatcher.draining
    if not isinstance(dispatcher, WorkerDispatcher):
        dispatcher.drain()
    return True
