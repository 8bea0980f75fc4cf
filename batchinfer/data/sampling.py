"""Sampling parameters that a row overrides by its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from batchinfer.data.reader import Unreadable, python_values
from batchinfer.types import ErrorCode, RowError, SamplingParams

TEXT_FIELDS = frozenset(("json_schema", "regex", "grammar"))
TEXTS_FIELDS = frozenset(("stop", "choice", "bad_words"))
IDS_FIELDS = frozenset(("stop_token_ids", "allowed_token_ids"))
FLAGS = frozenset(("ignore_eos", "include_stop", "skip_special_tokens", "detokenize"))
INTEGER_FIELDS = frozenset(
    (
        "max_tokens",
        "min_tokens",
        "top_k",
        "seed",
        "n",
        "best_of",
        "beam_width",
        "logprobs",
        "prompt_logprobs",
        "truncate_prompt_tokens",
    )
)


def row_samplings(
    rows: pa.Table, overrides: Mapping[str, str], default: SamplingParams
) -> list[SamplingParams | RowError]:
    """One entry per row. ``overrides`` maps a field to its column; a null there leaves the default.

    The column types are those that columns.py lets pass; a value out of its range is a BAD_SAMPLING error.
    """
    if not overrides:
        return [default] * rows.num_rows
    columns = {field: python_values(rows[column]) for field, column in overrides.items()}
    by_row = zip(*columns.values(), strict=True)
    return [_row_sampling(dict(zip(columns, values, strict=True)), default) for values in by_row]


def _row_sampling(values: dict[str, Any], default: SamplingParams) -> SamplingParams | RowError:
    try:
        given = {field: _coerce(field, value) for field, value in values.items() if value is not None}
        sampling = replace(default, **given)
        sampling.check()
    except ValueError as error:
        return RowError(ErrorCode.BAD_SAMPLING, str(error))
    return sampling


def _coerce(field: str, value: Any) -> Any:
    """``value`` as the type of the field. Floating-point columns may give whole numbers: pandas makes them of integers
    with nulls. ValueError names the field and the value."""
    if isinstance(value, Unreadable):
        raise ValueError(f"{field} cannot be read: {value.reason}")
    if field in TEXT_FIELDS:
        return _text(field, value)
    if field in TEXTS_FIELDS:
        return tuple(_text(field, text) for text in (value if isinstance(value, list) else [value]))
    if field in IDS_FIELDS:
        if any(item is None for item in value):
            raise ValueError(f"{field}={value!r} is not allowed: the list holds a null")
        return tuple(value)
    if field == "logit_bias":
        if any(bias is None for _, bias in value):
            raise ValueError(f"{field}={value!r} is not allowed: the map holds a null")
        return {token: float(bias) for token, bias in value}
    if field in INTEGER_FIELDS and isinstance(value, float):
        if not value.is_integer():  # false for NaN and infinity, too
            raise ValueError(f"{field}={value!r} is not allowed: {field} must be a whole number")
        return int(value)
    return value if field in INTEGER_FIELDS or field in FLAGS else float(value)


def _text(field: str, value: Any) -> str:
    if value is None:
        raise ValueError(f"{field} is not allowed: the list holds a null")
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise ValueError(f"{field}={value!r} is not allowed: byte {error.start} is not UTF-8") from None
