"""Digest of a table's values, whatever their layout in memory or on disk."""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
import pyarrow as pa

from batchinfer.data.tables import plain_type

BLOCK_ROWS = 128  # hashed together; bounds the copies, and keeps a block's texts under Arrow's 2 GiB


class _Hash(Protocol):
    def update(self, data: object, /) -> None: ...


def content_digest(table: pa.Table) -> str:
    """SHA-256 (hex) over the names, plain types and values of ``table``.

    Two tables with equal values have the same digest, however they are sliced, chunked, dictionary-encoded or
    compressed; bytes under a null do not count. So two attempts at a chunk can be compared, and a file with its source.
    """
    digest = hashlib.sha256()
    schema = pa.schema([(field.name, plain_type(field.type)) for field in table.schema])
    digest.update(f"{table.num_rows}\n{schema.to_string(show_schema_metadata=False)}\n".encode())
    for start in range(0, table.num_rows, BLOCK_ROWS):
        for column, field in zip(table.slice(start, BLOCK_ROWS).columns, schema, strict=True):
            _update(digest, _one_array(column.cast(field.type)))
    return digest.hexdigest()


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _update(digest: _Hash, array: pa.Array) -> None:
    """Validity, then values without those under a null; of variable lengths, first the lengths."""
    kind = array.type
    digest.update(len(array).to_bytes(8, "little"))
    digest.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_null(kind):
        return
    array = array.drop_null() if array.null_count else array
    if pa.types.is_struct(kind):
        for child in array.flatten():
            _update(digest, child)
    elif pa.types.is_map(kind):
        offsets = np.asarray(array.offsets)
        digest.update(np.diff(offsets).astype(np.int32).tobytes())
        for child in (array.keys, array.items):
            _update(digest, child.slice(offsets[0], offsets[-1] - offsets[0]))
    elif pa.types.is_list(kind):
        digest.update(np.diff(np.asarray(array.offsets)).astype(np.int32).tobytes())
        _update(digest, array.flatten())
    elif pa.types.is_fixed_size_list(kind):
        _update(digest, array.flatten())
    elif pa.types.is_string(kind) or pa.types.is_binary(kind):
        if len(array):
            _, lengths, data = array.buffers()
            offsets = np.frombuffer(lengths, np.int32)[array.offset : array.offset + len(array) + 1]
            digest.update(np.diff(offsets).tobytes())
            digest.update(memoryview(data or b"")[offsets[0] : offsets[-1]])
    elif pa.types.is_boolean(kind):
        digest.update(array.cast(pa.uint8()).to_numpy().tobytes())
    else:  # numbers, times, decimals, fixed-size binary
        width = kind.bit_width // 8
        digest.update(memoryview(array.buffers()[1])[array.offset * width : (array.offset + len(array)) * width])
