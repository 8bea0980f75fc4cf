"""What the input is: its Parquet files, their rows, and one plain Arrow schema for all of them.

Only footers are read here (Parquet format specification, "File Metadata"); the rows are reader.py's.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.types import ROW_BITS, ExitCode, JobError

MAX_FILES = 2 ** (64 - ROW_BITS)
TAIL_BYTES = 1 << 16  # one read fetches the whole footer of most files
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
INTEGER = re.compile(r"-?[1-9][0-9]{0,17}|0")  # nothing that a round trip through int64 would change, such as 007
PLAIN = {
    "large_string": pa.string(),
    "string_view": pa.string(),
    "large_binary": pa.binary(),
    "binary_view": pa.binary(),
}

Partition = str | int | None


@dataclass(frozen=True)
class InputFile:
    """One Parquet file of the input.

    ``path`` is relative to ``root``; ``ordinal`` is the file's place in the sorted list and the upper part of its rows'
    identity. ``digest`` is the SHA-256 (hex) of the footer. ``partitions`` holds the columns that the names of its
    folders give (key=value). ``schema`` is the plain schema of its columns, partitions included; a plan that was
    read back does not carry it.
    """

    ordinal: int
    path: str
    root: str = field(compare=False)
    rows: int
    row_group_rows: tuple[int, ...]
    bytes: int
    digest: str
    partitions: dict[str, Partition] = field(default_factory=dict)
    schema: pa.Schema | None = field(default=None, compare=False, repr=False)

    @property
    def full_path(self) -> str:
        return os.path.join(self.root, self.path)


def list_inputs(path: str) -> list[InputFile]:
    """The files of ``input.path``, sorted by relative path: a file, a folder (searched to its leaves) or a glob.

    In folders only names ending in .parquet count, and names that begin with "." or "_" do not. JobError(66) names the
    first file that cannot be read, or says that there is nothing to read.
    """
    root, names = _find(path)
    if len(names) > MAX_FILES:
        raise _unreadable(path, f"matches {len(names)} files, and a job takes at most {MAX_FILES}: split it")
    with ThreadPoolExecutor(16) as pool:
        files = list(pool.map(lambda item: _inspect(item[0], item[1], root), enumerate(names)))
    if not any(file.rows for file in files):
        what = f"{files[0].full_path} has" if len(files) == 1 else f"the {len(files)} Parquet files of {path} have"
        raise JobError(f"input.path={path}: {what} no rows, so there is nothing to compute", ExitCode.INPUT)
    return _type_partitions(files)


def input_schema(files: Sequence[InputFile]) -> pa.Schema:
    """The plain schema of the first file; :func:`batchinfer.data.columns.check_input` compares the others with it."""
    first = files[0]
    return first.schema or _with_partitions(_plain_schema(read_footer(first.full_path)[1]), first.partitions)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The one type that stands for all that hold the same values: text is string, bytes are binary, lists are list,
    dictionaries are their values. Extension types are their storage: none is ever resolved (CVE-2023-47248)."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type), kind.list_size)
    if pa.types.is_map(kind):
        return pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))
    if pa.types.is_struct(kind):
        return pa.struct([(kind.field(i).name, plain_type(kind.field(i).type)) for i in range(kind.num_fields)])
    return PLAIN.get(str(kind), kind)


def read_footer(path: str) -> tuple[int, pq.FileMetaData, str]:
    """Size in bytes, metadata and digest (SHA-256 of the footer, hex) of one file. JobError(66) if it is not whole."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise _unreadable(path, "is empty (0 bytes): write it again or take it out of the input")
            file.seek(max(0, size - TAIL_BYTES))
            tail = file.read()
            if tail[-4:] == b"PARE":
                raise _unreadable(path, "has an encrypted footer, which is not supported: decrypt it first")
            length = int.from_bytes(tail[-8:-4], "little") + 8
            if tail[-4:] != b"PAR1" or size < 12 or length + 4 > size:
                raise _unreadable(path, "does not end as a Parquet file does: it is truncated, or not Parquet")
            if length > len(tail):
                file.seek(size - length)
                tail = file.read()
        footer = tail[-length:]
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: a name that is not UTF-8
        raise _unreadable(path, f"cannot be read: {_first_line(error)}") from None
    return size, metadata, hashlib.sha256(footer).hexdigest()


def _find(path: str) -> tuple[str, list[str]]:
    """Root folder, and the sorted paths below it with "/" between the parts."""
    full = os.path.abspath(os.path.expanduser(path))
    if os.path.isfile(full):
        return os.path.dirname(full), [os.path.basename(full)]
    if os.path.isdir(full):
        root, found = full, list(_walk(full))
    elif glob.has_magic(full):
        parts = PurePath(full).parts
        root = os.path.join(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
        matches = [m for m in glob.glob(full, recursive=True) if not _hidden(os.path.relpath(m, root))]
        found = [f for m in matches for f in (_walk(m) if os.path.isdir(m) else [m])]
    else:
        raise JobError(f"input.path={path} does not exist (looked for {full})", ExitCode.INPUT)
    if not found:
        hint = 'names that begin with "." or "_" and, in folders, names that do not end in .parquet are passed over'
        raise JobError(f"input.path={path} holds no Parquet file; {hint}", ExitCode.INPUT)
    return root, sorted({os.path.relpath(name, root).replace(os.sep, "/") for name in found})


def _walk(folder: str) -> Iterator[str]:
    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        info = os.stat(here)
        if (info.st_dev, info.st_ino) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add((info.st_dev, info.st_ino))
        folders[:] = sorted(name for name in folders if not _hidden(name))
        yield from (os.path.join(here, name) for name in names if name.endswith(".parquet") and not _hidden(name))


def _hidden(path: str) -> bool:
    return any(part[0] in "._" for part in path.split(os.sep) if part)


def _inspect(ordinal: int, path: str, root: str) -> InputFile:
    full = os.path.join(root, path)
    size, metadata, digest = read_footer(full)
    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows or metadata.num_rows >= 2**ROW_BITS:
        raise _unreadable(full, f"has a damaged footer: {metadata.num_rows} rows in row groups of {groups}")
    keys = dict(part.split("=", 1) for part in path.split("/")[:-1] if part.find("=") > 0)
    values = {unquote(key): None if value == NULL_PARTITION else unquote(value) for key, value in keys.items()}
    try:
        schema = _plain_schema(metadata)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(full, f"has columns that Arrow cannot represent: {_first_line(error)}") from None
    partitions = {k: v for k, v in values.items() if k not in schema.names}  # a column of the file itself goes first
    return InputFile(ordinal, path, root, metadata.num_rows, groups, size, digest, partitions, schema)


def _plain_schema(metadata: pq.FileMetaData) -> pa.Schema:
    return pa.schema([(f.name, plain_type(f.type)) for f in metadata.schema.to_arrow_schema()])


def _type_partitions(files: list[InputFile]) -> list[InputFile]:
    """All files get the same partition columns: int64 if every value of a key is an integer, else string."""
    keys = list(files[0].partitions)
    for file in files:
        if sorted(file.partitions) != sorted(keys):
            detail = f"{files[0].path} has {keys or 'none'}, {file.path} has {list(file.partitions) or 'none'}"
            raise JobError(f"the folders give the files different partition columns: {detail}", ExitCode.INPUT)
    integers = [key for key in keys if all(INTEGER.fullmatch(str(f.partitions[key])) for f in files)]
    typed = []
    for file in files:
        values = {k: int(v) if k in integers else v for k, v in file.partitions.items()}
        typed.append(replace(file, partitions=values, schema=_with_partitions(file.schema, values)))
    return typed


def _with_partitions(schema: pa.Schema, partitions: dict[str, Partition]) -> pa.Schema:
    for key, value in partitions.items():
        schema = schema.append(pa.field(key, pa.int64() if isinstance(value, int) else pa.string()))
    return schema


def _unreadable(path: str, reason: str) -> JobError:
    return JobError(f"input file {path} {reason}", ExitCode.INPUT)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
