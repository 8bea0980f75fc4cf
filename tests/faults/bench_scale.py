"""How the job half scales: a plan of ten million rows, 64 ranks at one dispatcher, a folder of 100,000 parts.

python tests/faults/bench_scale.py FOLDER [rows] [rows per chunk]    JSON lines; FOLDER needs about 1 GB and is kept
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.cluster.dispatch import RootDispatcher, WorkerDispatcher
from batchinfer.data.audit import status, verify
from batchinfer.data.digest import content_digest
from batchinfer.data.ledger import Ledger, open_job
from batchinfer.data.part import describe, encode_part, part_name
from batchinfer.data.plan import Plan, make_plan
from batchinfer.data.tables import list_inputs
from batchinfer.types import Chunk

FILE_ROWS = 100_000
RANKS = 64


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@contextmanager
def measured(what: str, count: int = 0, **more: Any) -> Iterator[dict[str, Any]]:
    """Prints a line for the block; ``count`` gives a rate; the block may add to the line."""
    line: dict[str, Any] = {"what": what, **more}
    start = time.perf_counter()
    yield line
    seconds = time.perf_counter() - start
    rate = {"count": count, "per_second": round(count / seconds)} if count else {}
    print(json.dumps({**line, "seconds": round(seconds, 3), **rate, "rss_mib": round(rss_mib())}), flush=True)


def write_input(folder: Path, rows: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for ordinal in range(rows // FILE_ROWS):
        path = folder / f"{ordinal:05d}.parquet"
        if not path.exists():
            table = pa.table({"prompt": [f"prompt {i}" for i in range(FILE_ROWS)]})
            pq.write_table(table, path, row_group_size=10_000)


class Post:
    """One rank's end of messages that are pickled, as MPI's are."""

    def __init__(self, boxes: list[deque[tuple[int, bytes]]], rank: int):
        self.rank, self.size = rank, len(boxes)
        self._boxes = boxes

    def send(self, rank: int, message: Any) -> None:
        self._boxes[rank].append((self.rank, pickle.dumps(message)))

    def receive(self) -> tuple[int, Any] | None:
        if not self._boxes[self.rank]:
            return None
        sender, message = self._boxes[self.rank].popleft()
        return sender, pickle.loads(message)


def dispatch(chunks: list[Chunk], line: dict[str, Any]) -> None:
    """All ranks in this process, each computing every chunk at once: nothing but the dispatcher's own work."""
    boxes: list[deque[tuple[int, bytes]]] = [deque() for _ in range(RANKS)]
    root = RootDispatcher(Post(boxes, 0), chunks)
    ranks = [root, *(WorkerDispatcher(Post(boxes, rank)) for rank in range(1, RANKS))]
    done = [0] * RANKS
    while not all(rank.finished for rank in ranks):
        for number, rank in enumerate(ranks):
            rank.poll(done[number])
            if (chunk := rank.next_chunk(hungry=True)) is not None:
                done[number] += 1
                rank.done(chunk, done[number])
            if sum(done) == len(chunks) // 10 and "rss_mib_at_a_tenth" not in line:
                line["rss_mib_at_a_tenth"] = round(rss_mib())
    assert sum(done) == len(chunks)


def write_parts(folder: str, plan: Plan, chunks: list[Chunk]) -> None:
    """Parts as commit() makes them, without its fsync."""
    for chunk in chunks:
        path = os.path.join(folder, part_name(chunk))
        if not os.path.exists(path):
            table = pa.table({"generated_text": [f"answer {chunk.row_id(i)}" for i in range(chunk.rows)]})
            info = describe(plan, chunk, content_digest(table), "bench", {"counts": {"ok": chunk.rows, "error": 0}})
            Path(path).write_bytes(encode_part(table, info))


def main(folder: Path, rows: int, rows_per_chunk: int) -> None:
    write_input(folder / "in", rows)
    with measured("list the input's files", rows // FILE_ROWS):
        files = list_inputs(str(folder / "in"))
    with measured("make the plan", rows, rows=rows) as line:
        plan = make_plan(files, rows_per_chunk, {"bench": True})
        line["chunks"] = len(plan.chunks)
    with measured("write the plan") as line:
        line["bytes"] = len(plan.to_json())
    with measured("read the plan"):
        Plan.from_json(plan.to_json())
    with measured("pickle the plan for the other ranks") as line:
        line["bytes"] = len(pickle.dumps((plan, plan.chunks)))
    with measured(f"hand chunks out to {RANKS} ranks", len(plan.chunks)) as line:
        dispatch(list(plan.chunks), line)

    out = str(folder / "out")
    open_job(out, plan)
    half = len(plan.chunks) // 2
    with measured("write parts, two processes (no fsync)", len(plan.chunks)):
        writers = [
            get_context("fork").Process(target=write_parts, args=(out, plan, list(chunks)))
            for chunks in (plan.chunks[:half], plan.chunks[half:])
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
    os.unlink(os.path.join(out, part_name(plan.chunks[-1])))
    with measured("resume: open the job, find what is missing", len(plan.chunks)) as line:
        ledger = open_job(out, plan)
        line["missing"] = len(ledger.missing())
    with measured("another rank's start"):
        Ledger.attach(out)
    with measured("status: footers of all parts", len(plan.chunks)):
        status(out)
    write_parts(out, plan, [plan.chunks[-1]])
    with measured("finish: open every part, publish _SUCCESS", len(plan.chunks)):
        ledger.finish()
    with measured("verify: every byte of every part", len(plan.chunks)):
        assert verify(out).ok


if __name__ == "__main__":
    arguments = [int(text) for text in sys.argv[2:]]
    main(Path(sys.argv[1]), *(arguments or [10_000_000]), *([] if len(arguments) > 1 else [100]))
