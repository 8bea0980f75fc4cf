"""Listing the input: what is found, what is refused, and the schema that comes of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pyarrow as pa
import pytest
from data.fakes import write

from batchinfer.data.tables import NULL_PARTITION, input_schema, list_inputs, plain_type, read_footer
from batchinfer.types import ExitCode, JobError

ROW = {"prompt": ["a"]}


def refusal(path: Path | str) -> str:
    with pytest.raises(JobError) as caught:
        list_inputs(str(path))
    assert caught.value.exit_code == ExitCode.INPUT
    return str(caught.value)


@pytest.mark.feature("input", "a Parquet file, a folder searched in depth, a glob")
def test_one_file(tmp_path: Path):
    path = write(tmp_path / "rows.data", {"prompt": ["a", "b", "c"]}, row_group_size=2)
    (file,) = list_inputs(str(path))
    assert (file.ordinal, file.path, file.root) == (0, "rows.data", str(tmp_path))
    assert (file.rows, file.row_group_rows, file.bytes) == (3, (2, 1), path.stat().st_size)
    assert file.full_path == str(path)


def test_the_digest_is_that_of_the_footer(tmp_path: Path):
    path = write(tmp_path / "a.parquet", ROW)
    data = path.read_bytes()
    length = int.from_bytes(data[-8:-4], "little") + 8
    assert list_inputs(str(path))[0].digest == hashlib.sha256(data[-length:]).hexdigest()


def test_a_long_footer_is_read_whole(tmp_path: Path):
    path = write(tmp_path / "a.parquet", {f"column {i} {'x' * 200}": [i] for i in range(400)})
    data = path.read_bytes()
    length = int.from_bytes(data[-8:-4], "little") + 8
    assert length > 1 << 16
    assert read_footer(str(path))[2] == hashlib.sha256(data[-length:]).hexdigest()


@pytest.mark.feature("input", "a Parquet file, a folder searched in depth, a glob")
def test_a_folder_is_searched_to_its_leaves_in_the_order_of_paths(tmp_path: Path):
    for name in ("b.parquet", "a/z.parquet", "a/b/c.parquet", "_old/x.parquet", ".tmp/x.parquet", "a/_x.parquet"):
        write(tmp_path / name, ROW)
    write(tmp_path / ".hidden.parquet", ROW)
    (tmp_path / "notes.txt").write_text("no table")
    files = list_inputs(str(tmp_path))
    assert [f.path for f in files] == ["a/b/c.parquet", "a/z.parquet", "b.parquet"]
    assert [f.ordinal for f in files] == [0, 1, 2]


def test_links_are_followed_but_not_in_circles(tmp_path: Path):
    write(tmp_path / "data" / "a.parquet", ROW)
    write(tmp_path / "elsewhere" / "b.parquet", ROW)
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "more")
    os.symlink(tmp_path / "data", tmp_path / "data" / "circle")
    assert [f.path for f in list_inputs(str(tmp_path / "data"))] == ["a.parquet", "more/b.parquet"]


@pytest.mark.feature("input", "a Parquet file, a folder searched in depth, a glob")
def test_a_glob_takes_files_of_any_name_and_folders(tmp_path: Path):
    for name in ("x/day=1/a.parquet", "x/day=2/b.parquet", "x/other/c.parquet", "x/day=3.pq", "x/_day=4.pq"):
        write(tmp_path / name, ROW)
    assert [f.path for f in list_inputs(str(tmp_path / "x" / "*.pq"))] == ["day=3.pq"]
    files = list_inputs(str(tmp_path / "x" / "day=?"))
    assert [(f.path, f.partitions) for f in files] == [
        ("day=1/a.parquet", {"day": 1}),
        ("day=2/b.parquet", {"day": 2}),
    ]
    assert files[0].root == str(tmp_path / "x")


def test_a_name_with_glob_characters_is_a_name_if_it_exists(tmp_path: Path):
    path = write(tmp_path / "a[1].parquet", ROW)
    assert [f.path for f in list_inputs(str(path))] == ["a[1].parquet"]


@pytest.mark.feature("input", "hive partitions key=value become columns")
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("1", "-20", "0"), [1, -20, 0]),
        (("1", "x", "2"), ["1", "x", "2"]),
        (("01", "02", "03"), ["01", "02", "03"]),
        (("9" * 18, "9" * 19, "1"), ["9" * 18, "9" * 19, "1"]),
        (("a%2Fb", "c d", "%C3%A9"), ["a/b", "c d", "é"]),
        (("1", NULL_PARTITION, "2"), ["1", None, "2"]),
    ],
)
def test_partition_columns(tmp_path: Path, values: tuple[str, ...], expected: list):
    for i, value in enumerate(values):
        write(tmp_path / f"lang=de/key={value}" / f"{i}.parquet", ROW)
    files = sorted(list_inputs(str(tmp_path)), key=lambda f: f.path.rsplit("/")[-1])
    assert [f.partitions for f in files] == [{"lang": "de", "key": value} for value in expected]
    kind = pa.int64() if isinstance(expected[0], int) else pa.string()
    for file in files:
        assert input_schema([file]) == pa.schema([("prompt", pa.string()), ("lang", pa.string()), ("key", kind)])


def test_the_folder_given_and_those_above_it_are_no_partitions(tmp_path: Path):
    write(tmp_path / "a=1" / "b=2" / "x.parquet", ROW)
    assert list_inputs(str(tmp_path / "a=1"))[0].partitions == {"b": 2}
    assert list_inputs(str(tmp_path / "a=1" / "b=2" / "x.parquet"))[0].partitions == {}


def test_a_column_of_the_file_goes_before_a_partition(tmp_path: Path):
    write(tmp_path / "lang=de" / "x.parquet", {"lang": ["en"]})
    (file,) = list_inputs(str(tmp_path))
    assert file.partitions == {}
    assert input_schema([file]) == pa.schema([("lang", pa.string())])


def test_partitions_that_only_some_files_have(tmp_path: Path):
    write(tmp_path / "a=1" / "x.parquet", ROW)
    write(tmp_path / "y.parquet", ROW)
    text = refusal(tmp_path)
    assert "a=1/x.parquet" in text
    assert "y.parquet" in text


def test_nothing_there(tmp_path: Path):
    assert f"{tmp_path}/no.parquet does not exist" in refusal(tmp_path / "no.parquet")
    assert "holds no Parquet file" in refusal(tmp_path)
    assert "holds no Parquet file" in refusal(tmp_path / "*.parquet")


@pytest.mark.feature("input", "empty, truncated, foreign and unreadable files are refused with their name")
def test_a_file_of_no_bytes(tmp_path: Path):
    write(tmp_path / "a.parquet", ROW)
    (tmp_path / "b.parquet").write_bytes(b"")
    text = refusal(tmp_path)
    assert str(tmp_path / "b.parquet") in text
    assert "empty (0 bytes)" in text


@pytest.mark.feature("input", "empty, truncated, foreign and unreadable files are refused with their name")
@pytest.mark.parametrize("keep", [1, 4, 8, 11, 100, -1])
def test_a_truncated_file(tmp_path: Path, keep: int):
    path = write(tmp_path / "a.parquet", ROW)
    path.write_bytes(path.read_bytes()[:keep])
    assert f"input file {path} does not end as a Parquet file does: it is truncated" in refusal(path)


@pytest.mark.feature("input", "empty, truncated, foreign and unreadable files are refused with their name")
def test_files_that_are_something_else(tmp_path: Path):
    (tmp_path / "a.parquet").write_text('{"prompt": "a line of JSON"}\n' * 10)
    assert "not Parquet" in refusal(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"\xee" * 40 + (40).to_bytes(4, "little") + b"PAR1")
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"\0" * 40 + b"PARE")
    assert "encrypted" in refusal(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path: Path):
    (tmp_path / "a.parquet").symlink_to(tmp_path / "gone")
    assert "cannot be read" in refusal(tmp_path)


def test_files_without_rows(tmp_path: Path):
    none = pa.table({"prompt": pa.array([], pa.string())})
    path = write(tmp_path / "a.parquet", none)
    assert f"{path} has no rows" in refusal(path)
    write(tmp_path / "b.parquet", none)
    assert "the 2 Parquet files" in refusal(tmp_path)
    write(tmp_path / "c.parquet", ROW)
    assert [f.rows for f in list_inputs(str(tmp_path))] == [0, 0, 1]


@pytest.mark.feature("input", "string, large_string, dictionary, lists and structs in any Arrow layout")
@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        (pa.large_string(), pa.string()),
        (pa.string_view(), pa.string()),
        (pa.large_binary(), pa.binary()),
        (pa.dictionary(pa.int8(), pa.large_string()), pa.string()),
        (pa.large_list(pa.struct([("role", pa.large_string())])), pa.list_(pa.struct([("role", pa.string())]))),
        (pa.list_(pa.large_string(), 3), pa.list_(pa.string(), 3)),
        (pa.map_(pa.string(), pa.large_list(pa.int8())), pa.map_(pa.string(), pa.list_(pa.int8()))),
        (pa.uuid(), pa.binary(16)),
        (pa.list_(pa.json_()), pa.list_(pa.string())),
        (pa.decimal128(5, 2), pa.decimal128(5, 2)),
        (pa.timestamp("us", "UTC"), pa.timestamp("us", "UTC")),
    ],
)
def test_plain_types(kind: pa.DataType, plain: pa.DataType):
    assert plain_type(kind) == plain


def test_extension_types_are_their_storage(tmp_path: Path):
    ids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16], pa.binary(16)))
    path = write(tmp_path / "a.parquet", {"id": ids})
    assert input_schema(list_inputs(str(path))) == pa.schema([("id", pa.binary(16))])


def test_a_column_name_that_is_not_utf8(tmp_path: Path):
    path = write(tmp_path / "a.parquet", {"name": ["a"]}, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"name", b"na\xffe"))
    assert "a.parquet cannot be read: 'utf-8' codec" in refusal(path)
