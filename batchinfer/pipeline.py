"""What runs beside the engine: a thread that turns chunks into requests, and a thread that commits finished chunks.

Tables pass through unopened. An error in either thread is raised in the main one, at its next call.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from batchinfer.types import Chunk, Completion, Request

MAX_UNCOMMITTED = 2
"""Finished chunks that may wait for the writer; then the engine waits too, and memory stays bounded."""


@dataclass(slots=True)
class OpenChunk:
    """A chunk some of whose rows are not finished. ``table`` holds its rows as they were read."""

    chunk: Chunk
    table: Any
    rows: list[Request | Completion]
    completions: list[Completion | None] = field(init=False)
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.completions = [None] * len(self.rows)
        self.missing = len(self.rows)

    def settle(self, completion: Completion) -> bool:
        """Put a row's result in its place; whether it was the last one. ValueError for a row that is settled."""
        offset = completion.id - self.chunk.row_id(0)
        if self.completions[offset] is not None:
            raise ValueError(f"row {offset} of {self.chunk} came back twice")
        self.completions[offset] = completion
        self.missing -= 1
        return self.missing == 0


class Feeder:
    """Chunks in, their rows out, in order. ``read`` gives a chunk's table, ``build`` its requests (or completions of
    rows that can't be one); both run in the thread, at most as far ahead as chunks were opened. ``stage`` is what the
    thread does now, "reading" or "tokenising", "" if nothing; ``seconds``: what "read" and "tokenise" took so far."""

    def __init__(self, read: Callable[[Chunk], Any], build: Callable[[Any, Chunk], list[Request | Completion]]):
        self._read, self._build = read, build
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feeder")
        self._ahead: deque[Future[OpenChunk]] = deque()
        self.stage = ""
        self.seconds = {"read": 0.0, "tokenise": 0.0}

    def __len__(self) -> int:
        """Chunks opened and not yet taken."""
        return len(self._ahead)

    def open(self, chunk: Chunk) -> None:
        """Start reading a chunk."""
        self._ahead.append(self._thread.submit(self._prepare, chunk))

    def ready(self) -> Iterator[OpenChunk]:
        """Take the chunks whose rows are there."""
        while self._ahead and self._ahead[0].done():
            yield self._ahead.popleft().result()

    def close(self) -> None:
        """Stop; what was read ahead is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, chunk: Chunk) -> OpenChunk:
        start = time.perf_counter()
        self.stage = "reading"
        table = self._read(chunk)
        middle = time.perf_counter()
        self.stage = "tokenising"
        rows = self._build(table, chunk)
        self.stage = ""
        self.seconds["read"] += middle - start
        self.seconds["tokenise"] += time.perf_counter() - middle
        return OpenChunk(chunk, table, rows)


class Writer:
    """Finished chunks in, committed chunks out. ``commit`` runs in the thread, and so does ``record``, which appends to
    the journal. ``seconds``: what "commit" took so far, and for how long :meth:`submit` had to wait ("backlog")."""

    def __init__(self, commit: Callable[[OpenChunk], Any], record: Callable[[Any], Any] = lambda records: None):
        self._commit, self._record = commit, record
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._pending: deque[tuple[Chunk, Future[Any]]] = deque()
        self.seconds = {"commit": 0.0, "backlog": 0.0}

    def submit(self, opened: OpenChunk) -> None:
        """Commit a chunk soon. Waits while ``MAX_UNCOMMITTED`` others do."""
        if len(self._pending) >= MAX_UNCOMMITTED:
            start = time.perf_counter()
            self._pending[-MAX_UNCOMMITTED][1].result()
            self.seconds["backlog"] += time.perf_counter() - start
        self._pending.append((opened.chunk, self._thread.submit(self._time_commit, opened)))

    def _time_commit(self, opened: OpenChunk) -> None:
        start = time.perf_counter()
        self._commit(opened)
        self.seconds["commit"] += time.perf_counter() - start

    def record(self, records: Any) -> None:
        """Append to the journal after the commits submitted before."""
        self._thread.submit(self._record, records)

    def finish(self) -> None:
        """Wait until everything submitted is done."""
        self._thread.submit(lambda: None).result()

    def committed(self) -> Iterator[Chunk]:
        """The chunks committed since the last call."""
        while self._pending and self._pending[0][1].done():
            chunk, future = self._pending.popleft()
            future.result()
            yield chunk

    def close(self) -> None:
        """End the commit under way and drop those not begun."""
        self._thread.shutdown(wait=True, cancel_futures=True)
