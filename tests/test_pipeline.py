"""The two threads beside the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from batchinfer.pipeline import MAX_UNCOMMITTED, Feeder, OpenChunk, Writer
from batchinfer.types import Chunk, Completion, ErrorCode, Request, RowError, SamplingParams


def chunk(index: int, rows: int = 3) -> Chunk:
    return Chunk(index=index, file=1, start=10 * index, rows=rows)


def requests(_: object, of: Chunk) -> list[Request | Completion]:
    return [Request(of.row_id(i), np.zeros(1, np.int32), SamplingParams()) for i in range(of.rows)]


def until(ready: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not ready():
        assert time.monotonic() < end, "nothing happened for 10 s"
        time.sleep(0.001)


def test_an_open_chunk_puts_results_in_row_order() -> None:
    opened = OpenChunk(chunk(4), "table", requests(None, chunk(4)))
    completions = [Completion(chunk(4).row_id(i), 1) for i in range(3)]
    assert [opened.settle(completions[i]) for i in (2, 0, 1)] == [False, False, True]
    assert opened.completions == completions
    with pytest.raises(ValueError, match=r"row 1 of .* came back twice"):
        opened.settle(completions[1])


def test_chunks_come_in_order_and_only_when_ready() -> None:
    gate = threading.Event()

    def read(of: Chunk) -> str:
        gate.wait(10)
        return f"table {of.index}"

    feeder = Feeder(read, requests)
    feeder.open(chunk(0))
    feeder.open(chunk(1, rows=1))
    assert list(feeder.ready()) == []
    assert len(feeder) == 2
    until(lambda: feeder.stage == "reading")
    gate.set()
    got: list[OpenChunk] = []
    until(lambda: got.extend(feeder.ready()) or len(got) == 2)
    assert [(opened.table, [item.id for item in opened.rows]) for opened in got] == [
        ("table 0", [chunk(0).row_id(i) for i in range(3)]),
        ("table 1", [chunk(1).row_id(0)]),
    ]
    assert len(feeder) == 0
    assert feeder.stage == ""
    assert feeder.seconds["read"] > 0 < feeder.seconds["tokenise"]
    feeder.close()


def test_the_feeders_error_is_raised_by_ready() -> None:
    def read(_: Chunk) -> None:
        raise OSError("disk gone")

    feeder = Feeder(read, requests)
    feeder.open(chunk(0))
    with pytest.raises(OSError, match="disk gone"):
        until(lambda: list(feeder.ready()))
    feeder.close()


def opened(index: int) -> OpenChunk:
    rows = [Completion(chunk(index).row_id(i), 0, error=RowError(ErrorCode.NULL_PROMPT, "")) for i in range(3)]
    return OpenChunk(chunk(index), None, rows)


def test_the_writer_commits_in_order_and_lets_the_engine_wait() -> None:
    gate, seen = threading.Semaphore(0), []

    def commit(of: OpenChunk) -> None:
        assert gate.acquire(timeout=10)
        seen.append(of.chunk.index)

    writer = Writer(commit)
    for index in range(MAX_UNCOMMITTED):
        writer.submit(opened(index))
    assert list(writer.committed()) == []
    late = threading.Thread(target=writer.submit, args=(opened(9),))
    late.start()
    time.sleep(0.05)
    assert late.is_alive()  # the next one waits for the oldest
    gate.release(MAX_UNCOMMITTED + 1)
    late.join(10)
    got: list[Chunk] = []
    until(lambda: got.extend(writer.committed()) or len(got) == MAX_UNCOMMITTED + 1)
    assert [c.index for c in got] == seen == [*range(MAX_UNCOMMITTED), 9]
    assert writer.seconds["backlog"] >= 0.05
    assert writer.seconds["commit"] > 0
    writer.close()


def test_the_writers_error_is_raised_by_committed() -> None:
    def commit(_: OpenChunk) -> None:
        raise OSError("no space")

    writer = Writer(commit)
    writer.submit(opened(0))
    with pytest.raises(OSError, match="no space"):
        until(lambda: list(writer.committed()))
    writer.close()
