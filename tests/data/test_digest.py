"""The content digest: equal for equal values in any layout, different for any other value."""

from __future__ import annotations

import datetime
import io
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.fakes import INVALID, invalid_text
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.data.digest import BLOCK_ROWS, content_digest

NESTED = pa.list_(pa.struct([("role", pa.string()), ("score", pa.list_(pa.float32()))]))
message = st.fixed_dictionaries(
    {
        "role": st.none() | st.text(max_size=3),
        "score": st.none() | st.lists(st.none() | st.floats(width=32, allow_nan=False), max_size=3),
    }
)
rows = st.fixed_dictionaries(
    {
        "text": st.none() | st.text(max_size=5),
        "raw": st.none() | st.binary(max_size=5),
        "number": st.none() | st.integers(-(2**63), 2**63 - 1),
        "flag": st.none() | st.booleans(),
        "nested": st.none() | st.lists(st.none() | message, max_size=3),
        "map": st.none() | st.lists(st.tuples(st.text(max_size=2), st.none() | st.integers(0, 9)), max_size=2),
        "pair": st.none() | st.lists(st.none() | st.integers(0, 9), min_size=2, max_size=2),
        "nothing": st.none(),
    }
)
SCHEMA = pa.schema(
    {
        **{"text": pa.string(), "raw": pa.binary(), "number": pa.int64(), "flag": pa.bool_(), "nested": NESTED},
        **{"map": pa.map_(pa.string(), pa.int16()), "pair": pa.list_(pa.int8(), 2), "nothing": pa.null()},
    }
)


def table_of(values: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(values, schema=SCHEMA)


def through_parquet(table: pa.Table, **options: Any) -> pa.Table:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return pq.read_table(io.BytesIO(sink.getvalue()))


@settings(max_examples=40)
@given(st.lists(rows, min_size=1, max_size=12), st.data())
def test_the_layout_does_not_count(values: list[dict[str, Any]], data: st.DataObject):
    table = table_of(values)
    digest = content_digest(table)
    front, back = data.draw(st.lists(rows, max_size=5)), data.draw(st.lists(rows, max_size=5))
    assert content_digest(table_of(front + values + back).slice(len(front), len(values))) == digest
    split = data.draw(st.integers(0, len(values)))
    assert content_digest(pa.concat_tables([table_of(values[:split]), table_of(values[split:])])) == digest
    options = {"row_group_size": 5, "compression": data.draw(st.sampled_from(["none", "zstd"]))}
    assert content_digest(through_parquet(table, **options)) == digest


@settings(max_examples=40)
@given(st.lists(rows, min_size=1, max_size=6), st.data())
def test_every_value_counts(values: list[dict[str, Any]], data: st.DataObject):
    row = data.draw(st.integers(0, len(values) - 1))
    column = data.draw(st.sampled_from([name for name in SCHEMA.names if name != "nothing"]))
    other = [dict(value) for value in values]
    other[row][column] = data.draw(rows)[column]
    same = table_of(values)[column].to_pylist().__repr__() == table_of(other)[column].to_pylist().__repr__()
    assert (content_digest(table_of(values)) == content_digest(table_of(other))) == same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array(["ab", "c"]), pa.array(["a", "bc"])),
        (pa.array([[1], [2, 3]]), pa.array([[1, 2], [3]])),
        (pa.array([None, "a"]), pa.array(["a", None])),
        (pa.array([""]), pa.array([None], pa.string())),
        (pa.array([1]), pa.array([1], pa.int32())),
        (pa.array([0.0]), pa.array([-0.0])),
        (pa.array([[[1], []]]), pa.array([[[], [1]]])),
        (pa.array([Decimal("1.5")]), pa.array([Decimal("1.6")])),
        (pa.array([datetime.date(2024, 1, 1)]), pa.array([datetime.date(2024, 1, 2)])),
        (pa.array([True, False]), pa.array([False, True])),
        (pa.array([b"ab", b"cd"], pa.binary(2)), pa.array([b"ab", b"ce"], pa.binary(2))),
        (invalid_text([INVALID]), invalid_text([b"\xff\xfd"])),
    ],
)
def test_differences(one: pa.Array, other: pa.Array):
    assert content_digest(pa.table({"x": one})) != content_digest(pa.table({"x": other}))
    assert content_digest(pa.table({"x": one})) != content_digest(pa.table({"y": one}))


def test_plain_types_have_one_digest():
    text = pa.array(["a", "b", "a", None])
    digest = content_digest(pa.table({"x": text}))
    for kind in (pa.large_string(), pa.string_view()):
        assert content_digest(pa.table({"x": text.cast(kind)})) == digest
    assert content_digest(pa.table({"x": text.dictionary_encode()})) == digest


def test_bytes_under_a_null_do_not_count():
    values = pa.array([1, 2, 3], pa.int32()).buffers()[1]
    others = pa.array([1, 9, 3], pa.int32()).buffers()[1]
    bits = pa.py_buffer(bytes([0b101]))
    one, other = (pa.Array.from_buffers(pa.int32(), 3, [bits, buffer]) for buffer in (values, others))
    assert one.to_pylist() == other.to_pylist() == [1, None, 3]
    assert content_digest(pa.table({"x": one})) == content_digest(pa.table({"x": other}))


def test_many_rows_and_their_order():
    count = 3 * BLOCK_ROWS + 5
    forward = pa.table({"x": list(range(count))})
    assert content_digest(forward) == content_digest(through_parquet(forward, row_group_size=100))
    assert content_digest(forward) != content_digest(pa.table({"x": list(range(count))[::-1]}))
    assert content_digest(forward) != content_digest(forward.slice(0, count - 1))
