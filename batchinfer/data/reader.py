"""Rows of the input, chunk by chunk, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.data.tables import InputFile, Partition, plain_type, read_footer
from batchinfer.types import Chunk, ExitCode, JobError

BATCH_ROWS = 256  # rows decoded at a time: all that is held beside the chunk itself
BUFFER_BYTES = 1 << 20  # per column, read ahead within a row group


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a value that Python cannot hold, such as a text that is not UTF-8 (Parquet does not check it)."""

    reason: str


class ChunkReader:
    """Reads chunks in any order; consecutive ones without decoding a row twice.

    It keeps one file open and remembers where it stands. A chunk further on in the same row group costs the rows in
    between; a chunk in another row group, or further back, starts at the beginning of its row group. Memory: the chunk,
    one batch of ``BATCH_ROWS`` rows, and per column one page and ``BUFFER_BYTES``, whatever the size of the row group.
    """

    def __init__(self, files: Sequence[InputFile], columns: Sequence[str] | None = None):
        """``columns``: names to read, partition columns among them, in the order wanted; None: all."""
        self._files = {file.ordinal: file for file in files}
        self._columns = columns
        self._file: InputFile | None = None
        self._parquet: pq.ParquetFile | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.RecordBatch | None = None  # decoded, not yet handed out
        self._row = 0  # of the file: the first of _rest

    def read(self, chunk: Chunk) -> pa.Table:
        """The chunk's rows, in plain types. JobError(66) if the file cannot be read, (65) if it was replaced."""
        file = self._files[chunk.file]
        if chunk.start + chunk.rows > file.rows:
            raise ValueError(f"{chunk} reaches beyond the {file.rows} rows of {file.path}")
        columns: dict[str, Any] = {}
        try:
            if self._own_columns(file) != []:
                table = pa.Table.from_batches(self._take(file, chunk.start, chunk.rows))
                columns = dict(zip(table.column_names, table.columns, strict=True))
        except (OSError, ValueError, pa.ArrowException) as error:
            self.close()
            where = f"input file {file.full_path}, rows {chunk.start} to {chunk.start + chunk.rows - 1}"
            raise JobError(f"{where}: cannot be decoded, write the file again: {error}", ExitCode.INPUT) from None
        columns |= {key: _constant(value, chunk.rows) for key, value in file.partitions.items()}
        return pa.table({name: columns[name] for name in self._columns or columns})

    def close(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
        self._file = self._parquet = self._rest = None
        self._batches = iter(())

    def __enter__(self) -> ChunkReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _own_columns(self, file: InputFile) -> list[str] | None:
        """The columns to read from the file itself; None: all."""
        return None if self._columns is None else [name for name in self._columns if name not in file.partitions]

    def _take(self, file: InputFile, start: int, rows: int) -> list[pa.RecordBatch]:
        self._seek(file, start)
        taken = []
        while rows:
            if self._rest is None or not self._rest.num_rows:
                self._rest = _plain_batch(next(self._batches, None), file)
            skip = min(start - self._row, self._rest.num_rows)
            part = self._rest.slice(skip, rows)
            if part.num_rows:
                taken.append(part)
            used = skip + part.num_rows
            self._rest = self._rest.slice(used)
            self._row += used
            start += part.num_rows
            rows -= part.num_rows
        return taken

    def _seek(self, file: InputFile, start: int) -> None:
        """Stand at or before row ``start`` of ``file``, within the same row group."""
        if self._file != file:
            self._open(file)
        group, first = 0, 0
        while first + file.row_group_rows[group] <= start:
            first += file.row_group_rows[group]
            group += 1
        if not first <= self._row <= start or self._rest is None:
            names = self._own_columns(file)
            # One row group at a time: a batch over two would decode rows that nobody asked for, and Arrow cannot
            # join the dictionaries of two groups inside a struct.
            self._batches = (
                batch
                for i in range(group, len(file.row_group_rows))
                for batch in self._parquet.iter_batches(BATCH_ROWS, row_groups=[i], columns=names, use_threads=False)
            )
            self._rest, self._row = None, first

    def _open(self, file: InputFile) -> None:
        self.close()
        if read_footer(file.full_path)[2] != file.digest:
            raise JobError(f"input file {file.full_path} has changed since the job was planned", ExitCode.MISMATCH)
        self._parquet = pq.ParquetFile(
            file.full_path, pre_buffer=False, buffer_size=BUFFER_BYTES, page_checksum_verification=True
        )
        self._file = file


def read_chunk(file: InputFile, chunk: Chunk, columns: Sequence[str] | None = None) -> pa.Table:
    """One chunk by itself; for a series of chunks a :class:`ChunkReader` is cheaper."""
    with ChunkReader([file], columns) as reader:
        return reader.read(chunk)


def python_values(column: pa.ChunkedArray) -> list[Any]:
    """The values as Python objects, with :class:`Unreadable` in place of those that Python cannot hold."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # UnicodeDecodeError is a ValueError
        return [_python_value(scalar) for scalar in column]


def _python_value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return Unreadable(f"byte {error.start} of the text is not UTF-8")
    except (ValueError, OverflowError) as error:
        return Unreadable(str(error))


def _plain_batch(batch: pa.RecordBatch | None, file: InputFile) -> pa.RecordBatch:
    if batch is None:
        raise OSError(f"the row groups hold fewer rows than the footer says ({file.rows})")
    schema = pa.schema([(field.name, plain_type(field.type)) for field in batch.schema])
    columns = [array.cast(field.type) for array, field in zip(batch.columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _constant(value: Partition, rows: int) -> pa.Array:
    return pa.repeat(pa.scalar(value, pa.int64() if isinstance(value, int) else pa.string()), rows)
