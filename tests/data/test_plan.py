"""The plan: chunks that cover every row once, and the differences that end a job."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from data.fakes import small_plan, write
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.data.plan import MAX_DIFFERENCES, Plan, cut, difference_table, differences, make_plan
from batchinfer.data.tables import list_inputs
from batchinfer.types import Chunk


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 20))
def test_pieces_cover_all_rows_once_and_cut_row_groups_only_if_they_must(groups: list[int], most: int):
    pieces = list(cut(groups, most))
    rows = [row for start, count in pieces for row in range(start, start + count)]
    assert rows == list(range(sum(groups)))
    assert all(1 <= count <= most for _, count in pieces)
    starts = {start for start, _ in pieces}
    first = 0
    for group in groups:
        inside = [s for s in starts if first < s < first + group]
        assert len(inside) == (max(0, -(-group // most) - 1) if group > most else 0)
        first += group


def test_pieces_of_a_row_group_are_nearly_equal():
    assert list(cut([1025], 1024)) == [(0, 512), (512, 513)]
    assert list(cut([3, 3, 3, 10, 1], 6)) == [(0, 6), (6, 3), (9, 5), (14, 5), (19, 1)]


def test_chunks_never_cross_files(tmp_path: Path):
    for name, rows in (("a", 5), ("b", 0), ("c", 3)):
        write(tmp_path / f"{name}.parquet", {"prompt": ["x"] * rows} if rows else small_empty())
    plan = make_plan(list_inputs(str(tmp_path)), 4, {})
    assert plan.chunks == (Chunk(0, 0, 0, 2), Chunk(1, 0, 2, 3), Chunk(2, 2, 0, 3))
    assert plan.rows == 8


def small_empty():
    import pyarrow as pa

    return pa.table({"prompt": pa.array([], pa.string())})


def test_there_and_back(tmp_path: Path):
    write(tmp_path / "lang=de" / "a.parquet", {"prompt": ["x"]})
    plan = make_plan(list_inputs(str(tmp_path)), 4, {"sampling": {"stop": ("a", "b"), "n": 1}}, {"ranks": 3})
    back = Plan.from_json(plan.to_json())
    assert back == plan
    assert back.id == plan.id
    assert back.files[0].full_path == plan.files[0].full_path
    assert back.fingerprint == {"sampling": {"stop": ["a", "b"], "n": 1}}


def test_the_id_does_not_depend_on_where_the_input_lies_or_on_free_fields(tmp_path: Path):
    one = small_plan(tmp_path / "one")
    assert small_plan(tmp_path / "other").id == one.id
    assert one.with_root("/elsewhere").id == one.id
    assert replace(one, free={"ranks": 9}).id == one.id
    assert make_plan(one.files, 3, one.fingerprint).id != one.id
    assert make_plan(one.files, 4, {"model": {"path": "n"}}).id != one.id


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "Expecting value"),
        (b"[]", "it is not a plan"),
        (b"{}", "it is not a plan"),
        (b'{"schema_version": 99}', "its schema version is 99"),
        (b"\xff", "utf-8"),
    ],
)
def test_what_is_no_plan(content: bytes, expected: str):
    with pytest.raises(ValueError, match=expected):
        Plan.from_json(content)


def test_a_changed_plan_is_noticed(tmp_path: Path):
    content = json.loads(small_plan(tmp_path).to_json())
    for key, value in (("chunks", [[0, 0, 10]]), ("fingerprint", {}), ("id", "0" * 64), ("files", [])):
        with pytest.raises(ValueError, match=r"damaged|not a plan"):
            Plan.from_json(json.dumps({**content, key: value}).encode())
    with pytest.raises(ValueError, match="not a plan"):
        Plan.from_json(json.dumps({**content, "files": [{"path": "x"}]}).encode())


def test_no_difference(tmp_path: Path):
    plan = small_plan(tmp_path)
    assert differences(plan, make_plan(plan.files, 3, plan.fingerprint, {"ranks": 7})) == []


def test_differences_in_the_fingerprint(tmp_path: Path):
    planned = small_plan(tmp_path, sampling={"temperature": 0.0, "n": 1, "stop": []})
    now = small_plan(tmp_path, sampling={"temperature": 0.5, "stop": [], "seed": 3})
    assert differences(planned, now) == [
        ("sampling.temperature", "0.0", "0.5"),
        ("sampling.n", "1", "absent"),
        ("sampling.seed", "absent", "3"),
    ]


def test_differences_in_the_input(tmp_path: Path):
    for name in "ab":
        write(tmp_path / f"{name}.parquet", {"prompt": ["x"]})
    planned = make_plan(list_inputs(str(tmp_path)), 4, {})
    write(tmp_path / "a.parquet", {"prompt": ["y", "z"]})
    (tmp_path / "b.parquet").rename(tmp_path / "c.parquet")
    found = differences(planned, make_plan(list_inputs(str(tmp_path)), 4, {}))
    assert [name for name, _, _ in found] == [f"input file {x}.parquet" for x in "abc"]
    assert found[0][1].startswith("1 rows, ")
    assert found[0][2].startswith("2 rows, ")
    assert found[1][2] == found[2][1] == "absent"


def test_one_edited_row_is_a_difference(tmp_path: Path):
    texts = [f"row {i:03}" for i in range(100)]
    path = write(tmp_path / "a.parquet", {"prompt": texts})
    planned = make_plan(list_inputs(str(path)), 4, {})
    write(path, {"prompt": [*texts[:99], "row 0x9"]})
    assert [name for name, _, _ in differences(planned, make_plan(list_inputs(str(path)), 4, {}))] == [
        "input file a.parquet"
    ]


def test_the_table():
    lines = difference_table([("model.path", '"a"', '"bc"'), ("n", "1", "2")]).splitlines()
    assert lines == ["field      | planned | now", 'model.path | "a"     | "bc"', "n          | 1       | 2"]
    many = difference_table([(f"field {i}", "1", "2") for i in range(MAX_DIFFERENCES + 5)]).splitlines()
    assert len(many) == MAX_DIFFERENCES + 2
    assert many[-1] == "... and 5 more"


def test_long_values_are_shown_where_they_differ():
    text = difference_table([("template", "x" * 500 + "old" + "y" * 500, "x" * 500 + "new" + "y" * 500)])
    assert "xxxold" in text
    assert "xxxnew" in text
    assert max(map(len, text.splitlines())) < 150
