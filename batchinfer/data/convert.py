"""Other people's files -> one Parquet file that a job can read: JSON lines, OpenAI batch requests, `datasets` folders.

A job needs rows that can be found again by their number, which lines of text do not offer; so the rows are written
once, in their order, and everything after rests on that file. It is published whole (commit.py) or not at all.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from batchinfer.data.commit import file_for
from batchinfer.data.openai_batch import Requests, is_request
from batchinfer.data.tables import plain_type
from batchinfer.types import ExitCode, JobError

BLOCK_BYTES = 8 << 20
"""Lines are read and typed in blocks of about this size, which is what a conversion holds in memory."""

JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
PACKED_ENDINGS = ("", ".gz", ".bz2", ".zst")


@dataclass(frozen=True)
class Converted:
    """``settings`` are those with which a job reads the file as it was meant."""

    path: str
    rows: int
    columns: list[str]
    settings: list[str]


@dataclass(frozen=True)
class Block:
    """Consecutive lines of a file that are not blank; ``numbers`` counts lines from 1."""

    path: str
    numbers: list[int]
    lines: list[bytes]

    def values(self) -> Iterator[tuple[str, Any]]:
        """(place in words, value) of each line. JobError(66) for one that is not JSON."""
        for number, line in zip(self.numbers, self.lines, strict=True):
            place = f"{self.path}, line {number}"
            try:
                yield place, json.loads(line)
            except ValueError as error:
                raise JobError(f"{place} is not JSON: {error}", ExitCode.INPUT) from None


def convert(source: str, target: str) -> Converted:
    """Write ``target`` from ``source``: a .jsonl file (also .gz, .bz2, .zst), of any objects or of OpenAI batch
    requests, or a folder that `datasets` has saved.

    JobError(66): ``source`` cannot be read, with the line; (73): ``target`` exists or cannot be written.
    """
    rows = 0
    with file_for("convert.path", os.path.expanduser(target)) as fd, open(fd, "wb", closefd=False) as file:
        schema, tables, settings = _open(os.path.expanduser(source))
        with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
            for table in _readable(source, tables):
                writer.write_table(table, row_group_size=max(table.num_rows, 1))
                rows += table.num_rows
    return Converted(target, rows, schema.names, settings)


def _open(source: str) -> tuple[pa.Schema, Iterator[pa.Table], list[str]]:
    """Schema, tables in order, and the settings that go with them."""
    settings: list[str] = []
    try:
        if os.path.isdir(source):
            schema, tables = _arrow_folder(source)
        elif not os.path.basename(source).endswith(tuple(a + b for a in JSON_ENDINGS for b in PACKED_ENDINGS)):
            allowed = f"a file ending in {', '.join(JSON_ENDINGS)} (packed: {', '.join(PACKED_ENDINGS[1:])})"
            raise JobError(f"input.path={source}: convert takes {allowed}, or a datasets folder", ExitCode.INPUT)
        elif is_request(_first(source)):
            requests = Requests(value for block in _blocks(source) for value in block.values())
            schema, settings = requests.schema, requests.settings
            tables = (requests.table(block.values()) for block in _blocks(source))
        else:
            schema = _schema_of_lines(source)
            tables = (_read(block, schema) for block in _blocks(source))
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(source, error) from None
    return schema, tables, settings


def _readable(source: str, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The tables; what goes wrong with them is the input's fault, not the output's."""
    try:
        yield from tables
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(source, error) from None


def _unreadable(source: str, error: Exception) -> JobError:
    return JobError(f"input.path={source} cannot be read: {str(error).splitlines()[0]}", ExitCode.INPUT)


# Lines


def _blocks(path: str) -> Iterator[Block]:
    numbers: list[int] = []
    lines: list[bytes] = []
    size = 0
    with pa.input_stream(path, compression="detect") as stream:
        for number, line in enumerate(_lines(stream), start=1):
            if not line.strip():
                continue
            numbers.append(number)
            lines.append(line)
            size += len(line)
            if size >= BLOCK_BYTES:
                yield Block(path, numbers, lines)
                numbers, lines, size = [], [], 0
    if lines:
        yield Block(path, numbers, lines)


def _lines(stream: Any) -> Iterator[bytes]:
    rest = b""
    while data := stream.read(1 << 20):
        *whole, rest = (rest + data).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _first(path: str) -> Any:
    for block in _blocks(path):
        for place, value in block.values():
            if not isinstance(value, dict):
                raise JobError(f'{place} is not an object; each line is one, as in {{"prompt": ...}}', ExitCode.INPUT)
            return value
    raise JobError(f"{path} has no lines, so there is nothing to convert", ExitCode.INPUT)


def _schema_of_lines(path: str) -> pa.Schema:
    """One schema for all lines: a first pass."""
    schema = pa.schema([])
    for block in _blocks(path):
        found = _read(block, None).schema
        try:
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
        except pa.ArrowException as error:
            raise _wrong_types(block, str(error)) from None
    # A key that is null in every line has no type; as text it can at least be passed through.
    return pa.schema([(f.name, pa.string() if pa.types.is_null(f.type) else f.type) for f in schema])


def _read(block: Block, schema: pa.Schema | None) -> pa.Table:
    data = b"\n".join(block.lines)
    options = pyarrow.json.ParseOptions(explicit_schema=schema)
    reading = pyarrow.json.ReadOptions(use_threads=False, block_size=len(data) + 1)
    try:
        table = pyarrow.json.read_json(pa.BufferReader(data), read_options=reading, parse_options=options)
    except pa.ArrowException as error:
        for place, value in block.values():  # finds the line that is not JSON at all
            if not isinstance(value, dict):
                raise JobError(f"{place} is not an object", ExitCode.INPUT) from None
        raise _wrong_types(block, str(error)) from None
    if schema is None:
        return table.cast(pa.schema([(f.name, _without_times(f.type)) for f in table.schema]))
    return table.select(schema.names)


def _without_times(kind: pa.DataType) -> pa.DataType:
    """Arrow takes texts that look like a time for one; JSON has none, and the next block's may not look so."""
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_times(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(f.name, _without_times(f.type)) for f in kind])
    return kind


def _wrong_types(block: Block, reason: str) -> JobError:
    where = f"{block.path}, lines {block.numbers[0]} to {block.numbers[-1]}"
    return JobError(f"{where}: a key has values of different types ({reason.splitlines()[0]})", ExitCode.INPUT)


# Folders of Hugging Face `datasets` (Dataset.save_to_disk): Arrow streams, named in order by state.json


def _arrow_folder(folder: str) -> tuple[pa.Schema, Iterator[pa.Table]]:
    splits = _json(folder, "dataset_dict.json").get("splits")
    if splits:
        which = ", ".join(os.path.join(folder, name) for name in splits)
        raise JobError(f"input.path={folder} holds several splits: give one of {which}", ExitCode.INPUT)
    names = [entry["filename"] for entry in _json(folder, "state.json").get("_data_files", ())]
    if not names:
        reason = "has no state.json that lists Arrow files, as Dataset.save_to_disk writes it"
        raise JobError(f"input.path={folder} {reason}; a folder of Parquet files needs no conversion", ExitCode.INPUT)
    paths = [os.path.join(folder, os.path.basename(name)) for name in names]
    with pa.ipc.open_stream(pa.memory_map(paths[0])) as first:
        schema = pa.schema([(f.name, plain_type(f.type)) for f in first.schema])
    return schema, itertools.chain.from_iterable(_arrow_tables(path, schema) for path in paths)


def _arrow_tables(path: str, schema: pa.Schema) -> Iterator[pa.Table]:
    with pa.ipc.open_stream(pa.memory_map(path)) as stream:
        for batch in stream:
            yield pa.Table.from_batches([batch]).cast(schema)


def _json(folder: str, name: str) -> dict[str, Any]:
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return {}
    with open(path, "rb") as file:
        return json.load(file)
