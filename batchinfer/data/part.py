"""A part file: one chunk's rows as Parquet, which says itself what it is and whether it is whole.

Its footer has the key "batchinfer" with a JSON object (:class:`PartInfo`). Three digests guard it: every page has a
CRC, ``content`` covers the values (two attempts at a chunk can be compared by it), and ``sha256`` covers every byte of
the file, taken with zeros in its own place.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer import __version__
from batchinfer.data.commit import read_bytes
from batchinfer.data.digest import content_digest
from batchinfer.data.plan import Plan
from batchinfer.types import Chunk, ExitCode, JobError

META_KEY = b"batchinfer"
NO_DIGEST = "0" * 64
DIGEST_KEY = b'"sha256":"'
ROW_GROUP_ROWS = 1 << 16  # only chunks beyond this have more than one row group
PAGE_BYTES = 1 << 20


class BadPart(Exception):
    """A part file that is damaged, or that is not the part which its name says."""


@dataclass(frozen=True)
class PartInfo:
    """What a part's footer says. ``row_ids``: SHA-256 over the rows' identities as little-endian 64-bit words.
    ``counts``: see results.count_results. ``provenance``: what the job wants to have on record."""

    plan: str
    chunk: int
    file: str
    ordinal: int
    start: int
    rows: int
    row_ids: str
    content: str
    attempt: str
    host: str
    software: dict[str, str]
    counts: dict[str, int]
    provenance: dict[str, Any]
    sha256: str = field(default=NO_DIGEST)  # the last one: encode_part looks for it from the end


def part_name(chunk: Chunk) -> str:
    return f"part-{chunk.index:06d}.parquet"


def describe(plan: Plan, chunk: Chunk, content: str, attempt: str, provenance: dict[str, Any]) -> PartInfo:
    """``provenance`` may hold "counts", which go into a field of their own."""
    provenance = dict(provenance)
    return PartInfo(
        plan=plan.owner(chunk),
        chunk=chunk.index,
        file=plan.files[chunk.file].path,
        ordinal=chunk.file,
        start=chunk.start,
        rows=chunk.rows,
        row_ids=_row_ids_digest(chunk),
        content=content,
        attempt=attempt,
        host=os.uname().nodename,
        software={"batchinfer": __version__, "pyarrow": pa.__version__},
        counts=provenance.pop("counts", {}),
        provenance=provenance,
    )


def encode_part(table: pa.Table, info: PartInfo, compression: str = "zstd") -> bytes:
    """The bytes of the part file."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, table.schema, compression=compression, write_page_checksum=True, data_page_size=PAGE_BYTES
    ) as writer:
        writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
        writer.add_key_value_metadata({META_KEY: json.dumps(asdict(info), separators=(",", ":"))})
    data = bytearray(sink.getvalue())
    place = _digest_place(data)
    data[place : place + len(NO_DIGEST)] = _digest_around(data, place).encode()
    return bytes(data)


def decode_part(data: bytes) -> tuple[PartInfo, pa.Table]:
    """Check every byte and decode every value. BadPart says what is wrong. Arrow sees the bytes only if they are those
    that were written: some of its versions do not come back from a damaged footer."""
    place = _digest_place(data)
    if place is None:
        raise BadPart("it is truncated, or was not written by batchinfer (it has no digest)")
    if _digest_around(data, place) != data[place : place + len(NO_DIGEST)].decode("ascii", "replace"):
        raise BadPart("its bytes are not those that were written (SHA-256 differs)")
    try:
        info = _info(pq.read_metadata(pa.BufferReader(data)))
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(use_threads=False)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise BadPart(f"it cannot be decoded: {error}") from None
    if table.num_rows != info.rows:
        raise BadPart(f"it has {table.num_rows} rows, and its footer promises {info.rows}")
    if content_digest(table) != info.content:
        raise BadPart("its values are not those that were computed (content digest differs)")
    return info, table


def read_info(path: str) -> PartInfo:
    """What the footer says; nothing else of the file is read. FileNotFoundError, OSError, or BadPart."""
    try:
        metadata = pq.read_metadata(path)
        info = _info(metadata)
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise BadPart(f"its footer cannot be read: {error}") from None
    if metadata.num_rows != info.rows:
        raise BadPart(f"it has {metadata.num_rows} rows, and its footer promises {info.rows}")
    return info


def read_part(folder: str, plan: Plan, chunk: Chunk) -> tuple[PartInfo, pa.Table]:
    """The part of ``chunk``, every byte checked. JobError(74): it cannot be read, is damaged, or another's."""
    path = os.path.join(folder, part_name(chunk))
    try:
        info, table = decode_part(read_bytes(path))
        check_identity(info, plan, chunk)
    except (OSError, BadPart) as error:
        raise JobError(f"{path} cannot be used: {error}", ExitCode.IO) from None
    return info, table


def check_identity(info: PartInfo, plan: Plan, chunk: Chunk) -> None:
    """Raise BadPart unless the file is the part of ``chunk`` in ``plan``."""
    if info.plan != plan.owner(chunk):
        raise BadPart(f"it belongs to plan {info.plan[:12]}, not to {plan.owner(chunk)[:12]}")
    if (info.chunk, info.ordinal, info.start, info.rows) != (chunk.index, chunk.file, chunk.start, chunk.rows):
        theirs = f"chunk {info.chunk}, rows {info.start} to {info.start + info.rows - 1} of file {info.ordinal}"
        raise BadPart(f"it is {theirs}, not {chunk}")
    if info.row_ids != _row_ids_digest(chunk):
        raise BadPart("the digest of its row identities differs")


def _info(metadata: pq.FileMetaData) -> PartInfo:
    text = (metadata.metadata or {}).get(META_KEY)
    if text is None:
        raise BadPart("it was not written by batchinfer")
    return PartInfo(**json.loads(text))


def _row_ids_digest(chunk: Chunk) -> str:
    first = chunk.row_id(0)
    return hashlib.sha256(np.arange(first, first + chunk.rows, dtype="<u8").tobytes()).hexdigest()


def _digest_place(data: bytes | bytearray) -> int | None:
    """Where the digest stands. It is the last one: only Arrow's base64 schema and its own name follow in the footer."""
    found = data.rfind(DIGEST_KEY)
    return None if found < 0 else found + len(DIGEST_KEY)


def _digest_around(data: bytes | bytearray, place: int) -> str:
    view = memoryview(data)
    digest = hashlib.sha256(view[:place])
    digest.update(NO_DIGEST.encode())
    digest.update(view[place + len(NO_DIGEST) :])
    return digest.hexdigest()
