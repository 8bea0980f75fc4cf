"""A row's own sampling parameters: taken over, or refused with the field and the value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from data.fakes import INVALID, invalid_text

from batchinfer.data.sampling import row_samplings
from batchinfer.types import ErrorCode, RowError, SamplingParams

BIASES = pa.map_(pa.int32(), pa.int64())
DEFAULT = SamplingParams(max_tokens=7, stop=("end",))


@pytest.mark.parametrize(
    ("field", "column", "expected"),
    [
        ("max_tokens", pa.array([1, None, 2**20]), [1, 7, 2**20]),
        ("max_tokens", pa.array([1.0, None]), [1, 7]),  # how pandas writes integers with nulls
        ("temperature", pa.array([1, None]), [1.0, 0.0]),
        ("temperature", pa.array([0.25], pa.float32()), [0.25]),
        ("logprobs", pa.array([0, None, 5]), [0, None, 5]),
        ("ignore_eos", pa.array([True, None]), [True, False]),
        ("stop", pa.array(["a", None]), [("a",), ("end",)]),
        ("stop", pa.array([["a", "b"], [], None]), [("a", "b"), (), ("end",)]),
        ("stop", pa.array([b"a"]), [("a",)]),
        ("stop_token_ids", pa.array([[1, 2], None]), [(1, 2), ()]),
        ("allowed_token_ids", pa.array([[3], None]), [(3,), ()]),
        ("bad_words", pa.array([["x", "y z"], None]), [("x", "y z"), ()]),
        ("logit_bias", pa.array([[(5, 2), (7, -1)], None], BIASES), [{5: 2.0, 7: -1.0}, {}]),
        ("include_stop", pa.array([True, None]), [True, False]),
        ("skip_special_tokens", pa.array([False, None]), [False, True]),
        ("best_of", pa.array([3.0, None]), [3, 0]),
        ("prompt_logprobs", pa.array([0, None]), [0, None]),
        ("truncate_prompt_tokens", pa.array([5, None]), [5, 0]),
    ],
)
def test_values(field: str, column: pa.Array, expected: list[Any]):
    made = row_samplings(pa.table({"c": column}), {field: "c"}, DEFAULT)
    assert made == [replace(DEFAULT, **{field: value}) for value in expected]
    assert [type(getattr(m, field)) for m in made] == [type(value) for value in expected]


@pytest.mark.parametrize(
    ("field", "column", "expected"),
    [
        ("temperature", pa.array([float("nan")]), "temperature=nan"),
        ("temperature", pa.array([float("inf")]), "temperature=inf"),
        ("top_p", pa.array([-0.5]), "top_p=-0.5"),
        ("top_k", pa.array([1.5]), "top_k=1.5 is not allowed: top_k must be a whole number"),
        ("top_k", pa.array([float("nan")]), "top_k=nan"),
        ("n", pa.array([0]), "n=0"),
        ("n", pa.array([10**6]), "n=1000000"),
        ("logprobs", pa.array([65]), "logprobs=65"),
        ("seed", pa.array([2**64 - 1], pa.uint64()), "seed=18446744073709551615"),
        ("min_tokens", pa.array([8]), "min_tokens=8"),
        ("stop", pa.array([""]), "empty string"),
        ("stop", pa.array([["a", None]]), "stop is not allowed: the list holds a null"),
        ("stop", invalid_text([INVALID]), "stop cannot be read: byte 0"),
        ("stop", pa.array([INVALID]), "byte 0 is not UTF-8"),
        ("stop_token_ids", pa.array([[1, None]]), "stop_token_ids=[1, None]"),
        ("logit_bias", pa.array([[(5, None)]], BIASES), "logit_bias=[(5, None)] is not allowed: the map holds a null"),
        ("logit_bias", pa.array([[(5, 101)]], BIASES), "logit_bias[5]=101.0 is not allowed"),
        ("best_of", pa.array([-1]), "best_of=-1"),
        ("bad_words", pa.array([["a", "\n"]]), "bad_words holds a text without a word"),
    ],
)
def test_refusals(field: str, column: pa.Array, expected: str):
    (made,) = row_samplings(pa.table({"c": column}), {field: "c"}, DEFAULT)
    assert isinstance(made, RowError)
    assert made.code is ErrorCode.BAD_SAMPLING
    assert expected in made.message


def test_several_columns_and_none():
    table = pa.table({"a": [1, 2], "b": [0.5, None]})
    made = row_samplings(table, {"max_tokens": "a", "top_p": "b"}, DEFAULT)
    assert made == [replace(DEFAULT, max_tokens=1, top_p=0.5), replace(DEFAULT, max_tokens=2)]
    assert row_samplings(table, {}, DEFAULT) == [DEFAULT, DEFAULT]


def test_rows_without_a_text() -> None:
    flags = pa.table({"c": pa.array([False, None])})
    made = row_samplings(flags, {"detokenize": "c"}, replace(DEFAULT, stop=()))
    assert [row.detokenize for row in made] == [False, True]
    with_stops = row_samplings(flags, {"detokenize": "c"}, DEFAULT)
    assert "stop and detokenize=false" in with_stops[0].message
    assert with_stops[1] == DEFAULT
