"""A part file proves itself: whatever byte of it changes is noticed."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.fakes import rows_of, small_plan

from batchinfer.data.digest import content_digest
from batchinfer.data.part import (
    META_KEY,
    BadPart,
    check_identity,
    decode_part,
    describe,
    encode_part,
    part_name,
    read_info,
)
from batchinfer.data.plan import Plan
from batchinfer.types import Chunk


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return small_plan(tmp_path, rows=100, rows_per_chunk=40)


def part_of(plan: Plan, chunk: Chunk, table: pa.Table | None = None, compression: str = "zstd") -> bytes:
    table = rows_of(chunk) if table is None else table
    provenance = {"device": "cpu", "counts": {"ok": chunk.rows}}
    return encode_part(table, describe(plan, chunk, content_digest(table), "attempt", provenance), compression)


def test_names():
    assert part_name(Chunk(7, 0, 0, 1)) == "part-000007.parquet"
    assert part_name(Chunk(12345678, 0, 0, 1)) == "part-12345678.parquet"


@pytest.mark.parametrize("compression", ["zstd", "snappy", "lz4", "gzip", "none"])
def test_there_and_back(plan: Plan, compression: str):
    chunk = plan.chunks[1]
    info, table = decode_part(part_of(plan, chunk, compression=compression))
    assert table.equals(rows_of(chunk))
    assert (info.plan, info.chunk, info.file, info.start, info.rows) == (plan.id, 1, "input.parquet", 33, 33)
    assert (info.counts, info.provenance, info.attempt) == ({"ok": 33}, {"device": "cpu"}, "attempt")
    assert set(info.software) == {"batchinfer", "pyarrow"}
    check_identity(info, plan, chunk)


@pytest.mark.feature("output", "zstd Parquet with page checksums, provenance and digests in the footer")
def test_any_reader_can_read_it_and_it_has_page_checksums(plan: Plan, tmp_path: Path):
    path = tmp_path / "x.parquet"
    path.write_bytes(part_of(plan, plan.chunks[0]))
    assert pq.read_table(path).select(["row"]).num_rows == 33
    assert json.loads(pq.read_metadata(path).metadata[META_KEY]) == asdict(read_info(str(path)))


def test_page_checksums_are_there(plan: Plan, monkeypatch: pytest.MonkeyPatch):
    """With the digest of the file out of the way, the pages notice a change by themselves."""
    data = bytearray(part_of(plan, plan.chunks[0], compression="none"))
    place = data.index(b"answer 0")
    data[place] ^= 1
    monkeypatch.setattr("batchinfer.data.part._digest_around", lambda data, place: decode_digest(data))
    with pytest.raises(BadPart, match="CRC"):
        decode_part(bytes(data))


def decode_digest(data: bytes) -> str:
    return json.loads(pq.read_metadata(pa.BufferReader(data)).metadata[META_KEY])["sha256"]


def test_every_byte_counts(plan: Plan):
    data = part_of(plan, plan.chunks[0])
    rng = random.Random(1)
    places = [*range(8), *range(len(data) - 12, len(data)), *rng.sample(range(len(data)), 300)]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        with pytest.raises(BadPart):
            decode_part(bytes(changed))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_part(plan: Plan, keep: int):
    with pytest.raises(BadPart, match=r"truncated|SHA-256"):
        decode_part(part_of(plan, plan.chunks[0])[:keep])


def test_values_that_are_not_those_of_the_table(plan: Plan):
    """A fault between the engine and the file: the bytes are as written, but not what was to be written."""
    table = rows_of(plan.chunks[0])
    info = describe(plan, plan.chunks[0], content_digest(table), "attempt", {})
    other = table.set_column(1, "generated_text", pa.array(["wrong"] * table.num_rows))
    with pytest.raises(BadPart, match="content digest differs"):
        decode_part(encode_part(other, info))
    with pytest.raises(BadPart, match="has 32 rows, and its footer promises 33"):
        decode_part(encode_part(table.slice(1), info))


def test_a_table_that_spells_the_digest_of_a_part(plan: Plan):
    tricky = ['"sha256":"' + "0" * 64 + '"'] * 33
    table = rows_of(plan.chunks[0]).append_column('"sha256":"' + "0" * 64 + '"', pa.array(tricky))
    provenance = {"counts": {}, "sha256": "0" * 64, '"sha256":"': "0" * 64}
    info = describe(plan, plan.chunks[0], content_digest(table), "attempt", provenance)
    assert decode_part(encode_part(table, info, "none"))[1].equals(table)


def test_parquet_of_another_program(plan: Plan, tmp_path: Path):
    path = tmp_path / "x.parquet"
    pq.write_table(rows_of(plan.chunks[0]), path)
    with pytest.raises(BadPart, match="was not written by batchinfer"):
        decode_part(path.read_bytes())
    with pytest.raises(BadPart, match="not written by batchinfer"):
        read_info(str(path))


def test_the_footer_alone(plan: Plan, tmp_path: Path):
    path = tmp_path / "x.parquet"
    path.write_bytes(part_of(plan, plan.chunks[0]))
    assert read_info(str(path)).rows == 33
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadPart, match="footer cannot be read"):
        read_info(str(path))
    with pytest.raises(FileNotFoundError):
        read_info(str(tmp_path / "none"))


def test_identity(plan: Plan):
    info, _ = decode_part(part_of(plan, plan.chunks[0]))
    with pytest.raises(BadPart, match="it is chunk 0, rows 0 to 32 of file 0, not Chunk"):
        check_identity(info, plan, plan.chunks[1])
    with pytest.raises(BadPart, match="belongs to plan"):
        check_identity(info, replace(plan, fingerprint={"other": 1}), plan.chunks[0])
    with pytest.raises(BadPart, match="row identities"):
        check_identity(replace(info, row_ids="0"), plan, plan.chunks[0])
