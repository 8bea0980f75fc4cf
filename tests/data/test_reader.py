"""Reading chunks: any order, any type, bounded memory, and files that are damaged or replaced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.fakes import INVALID, invalid_text, write
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.data import reader
from batchinfer.data.reader import BATCH_ROWS, ChunkReader, Unreadable, python_values, read_chunk
from batchinfer.data.tables import InputFile, list_inputs
from batchinfer.types import Chunk, ExitCode, JobError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[InputFile]:
    """1000 rows in row groups of 300, and 77 rows in row groups of 1; the partition column key is "a" and "b"."""
    folder = tmp_path_factory.mktemp("input")
    for name, start, rows, groups in (("a", 0, 1000, 300), ("b", 1000, 77, 1)):
        table = {"id": list(range(start, start + rows)), "text": [f"text {i}" for i in range(start, start + rows)]}
        write(folder / f"key={name}" / "rows.parquet", table, row_group_size=groups)
    return list_inputs(str(folder))


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 999), st.integers(1, 400)), min_size=1, max_size=6))
def test_chunks_in_any_order(files: list[InputFile], wanted: list[tuple[int, int, int]]):
    with ChunkReader(files, ["text", "key", "id"]) as chunks:
        for ordinal, start, rows in wanted:
            start %= files[ordinal].rows
            rows = min(rows, files[ordinal].rows - start)
            table = chunks.read(Chunk(0, ordinal, start, rows))
            ids = list(range(1000 * ordinal + start, 1000 * ordinal + start + rows))
            assert table.to_pydict() == {
                "text": [f"text {i}" for i in ids],
                "key": ["ab"[ordinal]] * rows,
                "id": ids,
            }


def test_consecutive_chunks_decode_each_row_once(files: list[InputFile], monkeypatch: pytest.MonkeyPatch):
    decoded = []
    plain_batch = reader._plain_batch
    monkeypatch.setattr(reader, "_plain_batch", lambda b, f: decoded.append(b.num_rows) or plain_batch(b, f))
    with ChunkReader(files) as chunks:
        for start in range(0, 1000, 100):
            assert chunks.read(Chunk(0, 0, start, 100)).num_rows == 100
    assert sum(decoded) == 1000


def test_all_columns_are_read_unless_some_are_named(files: list[InputFile]):
    file = files[0]
    assert read_chunk(file, Chunk(0, 0, 0, 1)).column_names == ["id", "text", "key"]
    assert read_chunk(file, Chunk(0, 0, 0, 3), ["key"]).to_pydict() == {"key": ["a"] * 3}


READ_AND_MEASURE = """
import sys, pyarrow as pa
from batchinfer.data.reader import ChunkReader
from batchinfer.data.tables import InputFile, list_inputs
from batchinfer.types import Chunk
with ChunkReader(list_inputs(sys.argv[1])) as chunks:
    for start in (0, 100, 39_000, 20_000):
        assert chunks.read(Chunk(0, 0, start, 100))["text"][0].as_py().startswith(f"{start:08d}")
print(pa.default_memory_pool().max_memory())
"""


@pytest.mark.feature("input", "row groups are read piece by piece in bounded memory")
def test_memory_is_bounded_by_the_chunk_not_by_the_row_group(tmp_path: Path):
    """40 MB in one row group. In a process of its own, since Arrow tells only the peak since the process began."""
    texts = [f"{i:08d}" + "x" * 1000 for i in range(40_000)]
    options = {"row_group_size": len(texts), "use_dictionary": False, "compression": "none"}
    path = write(tmp_path / "a.parquet", {"text": texts}, **options)
    peak = int(subprocess.check_output([sys.executable, "-c", READ_AND_MEASURE, str(path)], timeout=60))
    assert 0 < peak < 10 << 20


TEXTS = ["a", None, "b", "a"]
MESSAGES = [
    [{"role": "user", "content": "x", "extra": "1"}],
    None,
    [],
    [{"role": "user", "content": None, "extra": None}],
]
MESSAGE = [("role", pa.string()), ("content", pa.string()), ("extra", pa.string())]
LARGE_MESSAGE = [
    ("role", pa.dictionary(pa.int32(), pa.string())),
    ("content", pa.large_string()),
    ("extra", pa.string()),
]


@pytest.mark.feature("input", "string, large_string, dictionary, lists and structs in any Arrow layout")
@pytest.mark.parametrize(
    ("kind", "values", "plain"),
    [
        (pa.string(), TEXTS, pa.string()),
        (pa.large_string(), TEXTS, pa.string()),
        (pa.string_view(), TEXTS, pa.string()),
        (pa.dictionary(pa.int32(), pa.string()), TEXTS, pa.string()),
        (pa.binary(), [b"a", None, INVALID, b""], pa.binary()),
        (pa.list_(pa.struct(MESSAGE)), MESSAGES, pa.list_(pa.struct(MESSAGE))),
        (pa.large_list(pa.struct(LARGE_MESSAGE)), MESSAGES, pa.list_(pa.struct(MESSAGE))),
        (pa.list_(pa.int64()), [[1, 2], None, [], [3, None]], pa.list_(pa.int64())),
        (pa.map_(pa.string(), pa.int32()), [[("a", 1)], None, [], [("b", None)]], pa.map_(pa.string(), pa.int32())),
    ],
)
def test_types_become_plain_ones(tmp_path: Path, kind: pa.DataType, values: list, plain: pa.DataType):
    path = write(tmp_path / "a.parquet", {"x": pa.array(values, kind)}, row_group_size=3)
    table = read_chunk(list_inputs(str(path))[0], Chunk(0, 0, 0, 4))
    assert table.schema == pa.schema([("x", plain)])
    assert table["x"].to_pylist() == values


def test_extension_types_are_read_as_their_storage(tmp_path: Path):
    ids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16], pa.binary(16)))
    path = write(tmp_path / "a.parquet", {"id": ids, "ids": pa.ListArray.from_arrays([0, 1], ids)})
    table = read_chunk(list_inputs(str(path))[0], Chunk(0, 0, 0, 1))
    assert table.schema == pa.schema([("id", pa.binary(16)), ("ids", pa.list_(pa.binary(16)))])


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_text_that_is_not_utf8_is_read_as_it_is(tmp_path: Path, kind: pa.DataType):
    texts = invalid_text([b"good", b"bad" + INVALID, None])
    column = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
    path = write(tmp_path / "a.parquet", {"x": column})
    column = read_chunk(list_inputs(str(path))[0], Chunk(0, 0, 0, 3))["x"]
    assert column.cast(pa.binary()).to_pylist() == [b"good", b"bad" + INVALID, None]
    good, bad, null = python_values(column)
    assert (good, null) == ("good", None)
    assert isinstance(bad, Unreadable)
    assert "byte 3" in bad.reason


def damage(path: Path, group: int) -> None:
    """Change a bit in the middle of the only column of a row group."""
    column = pq.read_metadata(path).row_group(group).column(0)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle] ^= 1
    path.write_bytes(data)


def test_only_the_row_groups_of_the_chunk_are_read_and_damage_in_them_is_found(tmp_path: Path):
    texts = [f"{i * 7919 % 1000:04d}" * 20 for i in range(900)]
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}  # other text, well-formed
    path = write(tmp_path / "a.parquet", {"x": texts}, row_group_size=300, **options)
    (file,) = list_inputs(str(path))
    damage(path, 1)
    with ChunkReader([file]) as chunks:
        for start in (0, 600):
            assert chunks.read(Chunk(0, 0, start, 300))["x"].to_pylist() == texts[start : start + 300]
        with pytest.raises(JobError, match="rows 350 to 449: cannot be decoded") as caught:
            chunks.read(Chunk(0, 0, 350, 100))
        assert caught.value.exit_code == ExitCode.INPUT
        assert str(path) in str(caught.value)
        assert chunks.read(Chunk(0, 0, 0, 300))["x"].to_pylist() == texts[:300]


@pytest.mark.feature("input", "a file that changes during the job ends it before a wrong row is written")
def test_a_file_that_was_replaced_since_it_was_listed(tmp_path: Path):
    path = write(tmp_path / "a.parquet", {"x": ["before"]})
    (file,) = list_inputs(str(path))
    write(path, {"x": ["after"]})
    with pytest.raises(JobError, match=r"a\.parquet has changed since the job was planned") as caught:
        read_chunk(file, Chunk(0, 0, 0, 1))
    assert caught.value.exit_code == ExitCode.MISMATCH


def test_a_file_that_went_away(tmp_path: Path):
    path = write(tmp_path / "a.parquet", {"x": ["before"]})
    (file,) = list_inputs(str(path))
    path.unlink()
    with pytest.raises(JobError, match=r"a\.parquet cannot be read") as caught:
        read_chunk(file, Chunk(0, 0, 0, 1))
    assert caught.value.exit_code == ExitCode.INPUT


def test_rows_beyond_the_file(tmp_path: Path):
    (file,) = list_inputs(str(write(tmp_path / "a.parquet", {"x": ["a"]})))
    with pytest.raises(ValueError, match="beyond the 1 rows"):
        read_chunk(file, Chunk(0, 0, 0, 2))


def test_a_chunk_may_be_larger_than_a_batch(files: list[InputFile]):
    file = files[0]
    assert BATCH_ROWS < 1000
    assert read_chunk(file, Chunk(0, 0, 0, 1000), ["id"])["id"].to_pylist() == list(range(1000))


def test_values_that_python_cannot_hold():
    times = pa.chunked_array([pa.array([0, 2**62], pa.int64()).cast(pa.timestamp("s"))])
    good, bad = python_values(times)
    assert good.year == 1970
    assert isinstance(bad, Unreadable)
