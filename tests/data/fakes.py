"""Small inputs, a tokenizer of bytes, and completions that are a known function of the row."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.data.plan import Plan, make_plan
from batchinfer.data.tables import list_inputs
from batchinfer.types import Chunk, Completion, Logprobs, Request, Sample

INVALID = b"\xff\xfe"  # no UTF-8


class ByteTokenizer:
    """A token is a byte; the chat template puts the role before each message."""

    vocab_size = 256

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool]] = []  # texts, add_special_tokens

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[np.ndarray]:
        self.calls.append((len(texts), add_special_tokens))
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        if messages[-1]["content"] == "refuse":
            raise ValueError("after a user only an assistant may speak")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def complete(request: Request | Completion, samples: int = 1) -> Completion:
    """What a fake engine answers: the prompt backwards, once per sample with its number in front."""
    if isinstance(request, Completion):
        return request
    made = []
    for i in range(samples):
        ids = np.concatenate([np.array([i], np.int32), request.prompt[::-1]])
        top = np.stack([ids, ids + 1], axis=1)
        logprobs = Logprobs(-ids.astype(np.float32), top.astype(np.int32), -top.astype(np.float32))
        made.append(Sample(ids, f"{i}:{bytes(request.prompt[::-1].astype(np.uint8)).hex()}", "stop", logprobs))
    return Completion(request.id, len(request.prompt), tuple(made))


def invalid_text(values: list[bytes | None]) -> pa.Array:
    """A string array whose bytes nobody checked, as a Parquet file may hold it."""
    array = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(array), array.buffers(), null_count=array.null_count)


def write(path: Path, table: pa.Table | dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, **options)
    return path


def small_plan(folder: Path, rows: int = 10, rows_per_chunk: int = 4, **fingerprint: Any) -> Plan:
    """A plan over one file of ``rows`` rows."""
    path = write(folder / "input.parquet", {"id": list(range(rows)), "prompt": [f"row {i}" for i in range(rows)]})
    return make_plan(list_inputs(str(path)), rows_per_chunk, {"model": {"path": "m"}, **fingerprint})


def rows_of(chunk: Chunk) -> pa.Table:
    """An output table for ``chunk``, by row identity."""
    ids = [chunk.row_id(i) for i in range(chunk.rows)]
    return pa.table({"row": pa.array(ids, pa.uint64()), "generated_text": [f"answer {i}" for i in ids]})


class SpiedOs:
    """Stands for the module ``os``: notes the calls that change or sync a file system, and may interfere.

    ``interfere(number, name, when)`` is called before and after each of them ("before" | "after"), and may raise or
    kill the process.
    """

    SPIED = ("open", "write", "fsync", "close", "stat", "link", "symlink", "rename", "unlink")

    def __init__(self, interfere: Callable[[int, str, str], None] = lambda number, name, when: None):
        self.calls: list[tuple[str, Any]] = []
        self._interfere = interfere

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.SPIED:
            return real

        def spied(*args: Any, **kwargs: Any) -> Any:
            number = len(self.calls)
            self.calls.append((name, args[0]))
            self._interfere(number, name, "before")
            result = real(*args, **kwargs)
            self._interfere(number, name, "after")
            return result

        return spied
