"""Which columns of the input the configuration uses, what for, and whether they have a fitting type.

Everything here is known before the first row is read, so a wrong column ends the job at its start.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from batchinfer.data.tables import InputFile, input_schema
from batchinfer.data.template import RowTemplate
from batchinfer.types import ExitCode, JobError, SamplingParams

if TYPE_CHECKING:
    from batchinfer.config import InputConfig

DEFAULT_PROMPT_COLUMN = "prompt"


@dataclass(frozen=True)
class PromptSource:
    """Where the prompt comes from: ``name`` is a column, for a template its text or file."""

    kind: Literal["prompt_column", "messages_column", "template", "token_ids_column", "query_column"]
    name: str


@dataclass(frozen=True)
class Kind:
    """A family of plain Arrow types, and how to call it in a message."""

    name: str
    accepts: Callable[[pa.DataType], bool]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_binary(kind)


def _is_messages(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)):
        return False
    return all(
        (i := kind.value_type.get_field_index(name)) >= 0 and _is_text(kind.value_type.field(i).type)
        for name in ("role", "content")
    )


def _is_list_of(accepts: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    return lambda kind: (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)) and accepts(kind.value_type)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


TEXT = Kind("string, or binary that holds UTF-8", _is_text)
MESSAGES = Kind("list<struct<role: string, content: string>>", _is_messages)
TOKEN_IDS = Kind("a list of integers", _is_list_of(pa.types.is_integer))
NUMBER = Kind("an integer or floating-point number", _is_number)
BOOLEAN = Kind("boolean", pa.types.is_boolean)
BIASES = Kind(
    "map<integer, number>",
    lambda kind: pa.types.is_map(kind) and pa.types.is_integer(kind.key_type) and _is_number(kind.item_type),
)
STOP = Kind("string, or a list of strings", lambda kind: _is_text(kind) or _is_list_of(_is_text)(kind))
ANY = Kind("of any type", lambda kind: True)

SOURCE_KINDS = {"prompt_column": TEXT, "messages_column": MESSAGES, "token_ids_column": TOKEN_IDS, "query_column": TEXT}
SAMPLING_KINDS = {field.name: NUMBER for field in fields(SamplingParams)} | {
    "ignore_eos": BOOLEAN,
    "json_schema": TEXT,
    "regex": TEXT,
    "choice": STOP,
    "grammar": TEXT,
    "stop": STOP,
    "stop_token_ids": TOKEN_IDS,
    "allowed_token_ids": TOKEN_IDS,
    "bad_words": STOP,
    "logit_bias": BIASES,
    "include_stop": BOOLEAN,
    "skip_special_tokens": BOOLEAN,
    "detokenize": BOOLEAN,
}


def prompt_source(config: InputConfig) -> PromptSource:
    """The one prompt source. ``input.prompt_column`` gives way to another source while it has its default value.

    JobError(64) names the keys if none or several are configured.
    """
    others = [k for k in ("messages_column", "template", "token_ids_column", "query_column") if getattr(config, k)]
    keys = others if config.prompt_column in (None, "", DEFAULT_PROMPT_COLUMN) else ["prompt_column", *others]
    if not keys and config.prompt_column:
        keys = ["prompt_column"]
    if len(keys) == 1:
        return PromptSource(keys[0], getattr(config, keys[0]))
    if keys:
        given = " and ".join(f"input.{key}={getattr(config, key)!r}" for key in keys)
        raise JobError(f"{given}: a prompt has one source; set all but one to null", ExitCode.USAGE)
    known = ", ".join(f"input.{key}" for key in (*SOURCE_KINDS, "template"))
    raise JobError(f"no prompt source: set one of {known}", ExitCode.USAGE)


def used_columns(config: InputConfig, schema: pa.Schema) -> list[str]:
    """The columns to read, without repetition: those passed through first, in the order of the output."""
    return list(dict.fromkeys([*passed_columns(config, schema), *(need.column for need in _needs(config, schema))]))


def passed_columns(config: InputConfig, schema: pa.Schema) -> list[str]:
    """The columns that go into the output as they are."""
    return list(schema.names) if config.columns is None else list(dict.fromkeys(config.columns))


def check_input(files: Sequence[InputFile], config: InputConfig) -> None:
    """Raise unless every used column exists, with a fitting type and the same type in all files.

    JobError(64): the configuration does not fit the first file. JobError(66): another file differs from the first.
    """
    schema = input_schema(files)
    first = files[0]
    doubled = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if doubled:
        raise JobError(f"input file {first.full_path} has several columns named {doubled[0]!r}", ExitCode.INPUT)
    for need in _needs(config, schema):
        _check_need(need, schema, first)
    for name in passed_columns(config, schema):
        _check_need(_Need("input.columns", name, ANY), schema, first)
    for file in files[1:]:
        theirs = input_schema([file])
        for name in used_columns(config, schema):
            _compare(name, first, schema, file, theirs)


@dataclass(frozen=True)
class _Need:
    key: str
    column: str
    kind: Kind


def _needs(config: InputConfig, schema: pa.Schema) -> Iterator[_Need]:
    source = prompt_source(config)
    if source.kind == "template":
        used, missing = RowTemplate(source.name).columns(schema.names)
        for name in (*missing, *used):
            yield _Need("input.template", name, ANY)
    else:
        yield _Need(f"input.{source.kind}", source.name, SOURCE_KINDS[source.kind])
    if config.continuation_column is not None:
        kind = TOKEN_IDS if source.kind == "token_ids_column" else TEXT
        yield _Need("input.continuation_column", config.continuation_column, kind)
    if config.document_column is not None:
        yield _Need("input.document_column", config.document_column, TEXT)
    if config.adapter_column is not None:
        yield _Need("input.adapter_column", config.adapter_column, TEXT)
    for field, column in config.sampling_columns.items():
        if field not in SAMPLING_KINDS:
            text = f"input.sampling_columns.{field}: there is no such field; allowed: {', '.join(SAMPLING_KINDS)}"
            raise JobError(text, ExitCode.USAGE)
        yield _Need(f"input.sampling_columns.{field}", column, SAMPLING_KINDS[field])


def _check_need(need: _Need, schema: pa.Schema, file: InputFile) -> None:
    index = schema.get_field_index(need.column)
    if index < 0:
        close = difflib.get_close_matches(need.column, schema.names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise JobError(
            f"{need.key}: there is no column {need.column!r} in {file.full_path}.{hint} "
            f"Its columns: {', '.join(schema.names)}",
            ExitCode.USAGE,
        )
    kind = schema.field(index).type
    if not need.kind.accepts(kind):
        fits = [
            key for key, other in SOURCE_KINDS.items() if other.accepts(kind) and need.kind in SOURCE_KINDS.values()
        ]
        hint = f"; for a column like this one use input.{fits[0]}" if fits else ""
        raise JobError(
            f"{need.key}: column {need.column!r} of {file.full_path} is {kind}; it must be {need.kind.name}{hint}",
            ExitCode.USAGE,
        )


def _compare(name: str, first: InputFile, schema: pa.Schema, file: InputFile, theirs: pa.Schema) -> None:
    index, planned = theirs.get_field_index(name), schema.field(name).type
    if index >= 0 and theirs.field(index).type == planned:
        return
    is_ = f"is {theirs.field(index).type}" if index >= 0 else "does not exist"
    raise JobError(
        f"the files of the input differ: column {name!r} is {planned} in {first.path}, but {is_} in {file.path}; "
        "convert one of them, or give a glob that leaves it out",
        ExitCode.INPUT,
    )
