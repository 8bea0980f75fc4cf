"""The journal: what a rank has of rows whose chunk is not committed yet, so that a job which dies loses a minute of it.

    OUT/_batchinfer/journal/chunk-000123.WRITER.journal     appended every minute, and at a drain

It is only a cache. Any number of attempts may leave records of the same rows: each holds what the row's answer is, or
how it begins, and the fullest is taken. A file is a sequence of frames:

    magic "BIJ1" | payload bytes u32 | CRC-32 of the payload u32 | CRC-32 of these 12 bytes u32 | payload

little-endian; the payload is an Arrow IPC stream of one batch of :data:`RECORDS`. A frame whose payload is damaged is
passed over, and what follows a damaged header is not read: both cost work, never a wrong row.
"""

from __future__ import annotations

import os
import re
import secrets
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pyarrow as pa

from batchinfer.data.commit import read_bytes, remove, sync_folder
from batchinfer.data.results import LOGPROBS, logprobs_value
from batchinfer.types import Chunk, Completion, Logprobs, Request, Sample

JOURNAL = "journal"
MAGIC = b"BIJ1"
HEADER = struct.Struct("<4sII")
CHECKED = struct.Struct("<4sIII")
MAX_PAYLOAD = 1 << 30  # bytes; a larger length in a header is damage

RECORDS = pa.schema(
    [
        ("id", pa.uint64()),
        ("prompt_tokens", pa.int32()),
        (
            "samples",
            pa.list_(
                pa.struct(
                    [
                        ("token_ids", pa.list_(pa.int32())),
                        ("text", pa.string()),
                        ("finish_reason", pa.string()),
                        ("logprobs", LOGPROBS),
                        ("reasoning", pa.string()),
                        ("vector", pa.list_(pa.float32())),
                    ]
                )
            ),
        ),
        ("prompt_logprobs", LOGPROBS),
    ]
)
"""One record: a Completion without an error. An empty finish_reason: the sample goes on after its tokens."""

_NAME = re.compile(r"chunk-(\d{6,})\.[0-9a-f]+\.journal")


class Journal:
    """One rank's side: it collects completions (:meth:`add`), and appends them from time to time (:meth:`write`).

    ``add``, ``drop`` and ``take`` belong to the thread of the engine, ``write`` and ``forget`` to that of the writer.
    """

    def __init__(self, state: str, plan: str, seconds: float = 60.0, clock: Callable[[], float] = time.monotonic):
        """``state``: the job's state folder. ``plan``: the plan's id, without which a record means nothing.
        ``seconds``: between two records."""
        self._seconds, self._clock = seconds, clock
        self._taken = clock()
        self._folder = os.path.join(state, JOURNAL)
        self._plan = plan
        self._writer = secrets.token_hex(8)
        self._failures = 0
        self._new: dict[int, list[Completion]] = {}

    def add(self, chunk: Chunk, completion: Completion) -> None:
        """Keep a row's result, or the beginning of one, for the next :meth:`take`. An error is found again."""
        if completion.error is None:
            self._new.setdefault(chunk.index, []).append(completion)

    def drop(self, chunk: Chunk) -> None:
        """The chunk is complete, and about to be committed: its rows need no record."""
        self._new.pop(chunk.index, None)

    def due(self) -> bool:
        """Whether it is time for the next record, and there is something to record."""
        return bool(self._new) and self._clock() - self._taken >= self._seconds

    def take(self) -> dict[int, list[Completion]]:
        """What was added since the last call, by chunk index."""
        new, self._new = self._new, {}
        self._taken = self._clock()
        return new

    def write(self, records: Mapping[int, Sequence[Completion]]) -> None:
        """Append and fsync. After an OSError the next call begins new files: what lies in a file behind a torn frame
        could not be read."""
        try:
            os.makedirs(self._folder, exist_ok=True)
            for index, completions in records.items():
                _append(self._path(index), encode(self._plan, index, completions))
            if records:
                sync_folder(self._folder)
        except OSError:
            self._failures += 1
            raise

    def forget(self, chunk: Chunk, others: Iterable[str] = ()) -> None:
        """The chunk is committed: remove its file, and those of earlier attempts, named by ``others``."""
        for path in (self._path(chunk.index), *others):
            remove(path)

    def _path(self, index: int) -> str:
        return os.path.join(self._folder, f"chunk-{index:06d}.{self._writer}{self._failures:02x}.journal")


def journal_files(state: str) -> dict[int, list[str]]:
    """Paths of all journals in the job's state folder, by chunk index; none if the folder cannot be read."""
    found: dict[int, list[str]] = {}
    with suppress(OSError):
        for name in sorted(os.listdir(os.path.join(state, JOURNAL))):
            if match := _NAME.fullmatch(name):
                found.setdefault(int(match[1]), []).append(os.path.join(state, JOURNAL, name))
    return found


def clear_journals(state: str) -> None:
    """Remove every journal: the job is complete."""
    for paths in journal_files(state).values():
        for path in paths:
            remove(path)
    with suppress(OSError):
        os.rmdir(os.path.join(state, JOURNAL))


def recall(paths: Iterable[str], plan: str, chunk: Chunk) -> dict[int, Completion]:
    """The fullest record of each of the chunk's rows, by row id. Damage, other plans' records and files that went away
    are passed over."""
    best: dict[int, Completion] = {}
    ids = range(chunk.row_id(0), chunk.row_id(0) + chunk.rows)
    for path in paths:
        with suppress(OSError):
            for completion in decode(read_bytes(path), plan, chunk.index):
                known = best.get(completion.id)
                if completion.id in ids and (known is None or _fullness(completion) > _fullness(known)):
                    best[completion.id] = completion
    return best


def resume(rows: Sequence[Request | Completion], known: Mapping[int, Completion]) -> list[Request | Completion]:
    """The rows with what the journal ``known`` has of them: finished ones need no engine, begun ones go on."""

    def one(row: Request | Completion) -> Request | Completion:
        record = known.get(row.id)
        if isinstance(row, Completion) or record is None:
            return row
        if len(record.samples) != (row.sampling.n if record.finished else row.sampling.samples):
            return row
        if record.finished:
            return record
        fits = all(s.finish_reason or len(s.token_ids) < row.sampling.max_tokens for s in record.samples)
        return replace(row, so_far=record.samples) if fits else row

    return [one(row) for row in rows]


def encode(plan: str, index: int, completions: Sequence[Completion]) -> bytes:
    """One frame."""
    columns = [
        pa.array([c.id for c in completions], pa.uint64()),
        pa.array([c.prompt_tokens for c in completions], pa.int32()),
        pa.array([[_sample_value(s) for s in c.samples] for c in completions], RECORDS.field("samples").type),
        pa.array([logprobs_value(c.prompt_logprobs) for c in completions], LOGPROBS),
    ]
    schema = RECORDS.with_metadata({"plan": plan, "chunk": str(index)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        stream.write_batch(pa.record_batch(columns, schema=schema))
    payload = sink.getvalue().to_pybytes()
    header = HEADER.pack(MAGIC, len(payload), zlib.crc32(payload))
    return header + struct.pack("<I", zlib.crc32(header)) + payload


def decode(data: bytes, plan: str, index: int) -> Iterator[Completion]:
    """The completions of every whole frame of this plan and chunk."""
    at = 0
    while at + CHECKED.size <= len(data):
        magic, size, payload_crc, header_crc = CHECKED.unpack_from(data, at)
        if magic != MAGIC or size > MAX_PAYLOAD or zlib.crc32(data[at : at + HEADER.size]) != header_crc:
            return
        payload = data[at + CHECKED.size : at + CHECKED.size + size]
        at += CHECKED.size + size
        if len(payload) == size and zlib.crc32(payload) == payload_crc:
            yield from _completions(payload, {b"plan": plan.encode(), b"chunk": str(index).encode()})


def _completions(payload: bytes, wanted: dict[bytes, bytes]) -> Iterator[Completion]:
    with pa.ipc.open_stream(payload) as stream:
        if stream.schema.metadata != wanted or not stream.schema.equals(RECORDS, check_metadata=False):
            return
        rows = stream.read_all().to_pylist()
    for row in rows:
        samples = tuple(_sample(value) for value in row["samples"])
        prompt_logprobs = _logprobs(row["prompt_logprobs"])
        yield Completion(row["id"], row["prompt_tokens"], samples, prompt_logprobs=prompt_logprobs)


def _sample_value(sample: Sample) -> dict[str, object]:
    return {
        "token_ids": sample.token_ids,
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "logprobs": logprobs_value(sample.logprobs),
        "reasoning": sample.reasoning,
        "vector": sample.vector,
    }


def _sample(value: dict) -> Sample:
    tokens = np.array(value["token_ids"], np.int32)
    vector = None if value["vector"] is None else np.array(value["vector"], np.float32)
    return Sample(
        tokens, value["text"], value["finish_reason"], _logprobs(value["logprobs"]), value["reasoning"], vector
    )


def _logprobs(value: dict | None) -> Logprobs | None:
    """The inverse of :func:`batchinfer.data.results.logprobs_value`."""
    if value is None:
        return None
    tokens = len(value["chosen"])
    shape = (tokens, -1 if tokens else 0)
    return Logprobs(
        chosen=np.array(value["chosen"], np.float32),
        top_ids=np.array(value["top_ids"], np.int32).reshape(shape),
        top=np.array(value["top"], np.float32).reshape(shape),
    )


def _fullness(completion: Completion) -> tuple[bool, int, int]:
    samples = completion.samples
    done = sum(bool(s.finish_reason) for s in samples)
    return completion.finished, done, sum(len(s.token_ids) for s in samples)


def _append(path: str, data: bytes) -> None:
    """A new descriptor each time: one whose fsync failed must not be synced again."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
