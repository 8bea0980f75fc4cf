"""Which columns a configuration uses, and the clear end of a job whose columns do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data.fakes import write

from batchinfer.config import InputConfig
from batchinfer.data.columns import check_input, prompt_source, used_columns
from batchinfer.data.tables import InputFile, list_inputs
from batchinfer.types import ExitCode, JobError

MESSAGES = pa.list_(pa.struct([("content", pa.large_string()), ("role", pa.string()), ("name", pa.string())]))


@pytest.fixture
def files(tmp_path: Path) -> list[InputFile]:
    columns = {
        "id": pa.array([1]),
        "prompt": pa.array(["a"]).dictionary_encode(),
        "chat": pa.array([[]], MESSAGES),
        "ids": pa.array([[1]], pa.large_list(pa.int32())),
        "heat": pa.array([0.5]),
        "flag": pa.array([True]),
        "ends": pa.array([["x"]]),
        "push": pa.array([[(1, 2.0)]], pa.map_(pa.int64(), pa.float32())),
    }
    return list_inputs(str(write(tmp_path / "lang=de" / "a.parquet", columns).parent.parent))


def refusal(files: list[InputFile], code: int = ExitCode.USAGE, **config: Any) -> str:
    with pytest.raises(JobError) as caught:
        check_input(files, InputConfig(**config))
    assert caught.value.exit_code == code
    return str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"prompt_column": "lang"},
        {"messages_column": "chat"},
        {"token_ids_column": "ids"},
        {"template": "{{ lang }}: {{ prompt }}"},
        {"columns": []},
        {"columns": ["lang", "id"]},
        {"sampling_columns": {"temperature": "heat", "max_tokens": "id", "ignore_eos": "flag", "stop": "ends"}},
        {"sampling_columns": {"stop": "prompt", "stop_token_ids": "ids", "n": "heat"}},
        {"sampling_columns": {"logit_bias": "push", "allowed_token_ids": "ids", "bad_words": "ends"}},
        {"sampling_columns": {"include_stop": "flag", "skip_special_tokens": "flag", "best_of": "id"}},
    ],
)
def test_what_fits(files: list[InputFile], config: dict[str, Any]):
    check_input(files, InputConfig(**config))


@pytest.mark.feature("input", "missing columns and wrong column types are refused with column, type and what is needed")
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"prompt_column": "promt"}, "there is no column 'promt' in"),
        ({"prompt_column": "promt"}, "Did you mean 'prompt'?"),
        ({"prompt_column": "zzz"}, "Its columns: id, prompt, chat, ids, heat, flag, ends, push, lang"),
        ({"messages_column": "messages"}, "input.messages_column: there is no column 'messages'"),
        ({"columns": ["id", "nope"]}, "input.columns: there is no column 'nope'"),
        ({"template": "{{ question }}"}, "input.template: there is no column 'question'"),
        ({"sampling_columns": {"top_k": "nope"}}, "input.sampling_columns.top_k: there is no column 'nope'"),
        ({"sampling_columns": {"heat": "heat"}}, "input.sampling_columns.heat: there is no such field; allowed: max_"),
        ({"prompt_column": "id"}, "column 'id' of"),
        ({"prompt_column": "id"}, "is int64; it must be string"),
        ({"prompt_column": "chat"}, "for a column like this one use input.messages_column"),
        ({"prompt_column": "ids"}, "for a column like this one use input.token_ids_column"),
        ({"messages_column": "prompt"}, "it must be list<struct<role: string, content: string>>"),
        ({"token_ids_column": "ends"}, "it must be a list of integers"),
        ({"sampling_columns": {"temperature": "prompt"}}, "it must be an integer or floating-point number"),
        ({"sampling_columns": {"temperature": "flag"}}, "column 'flag'"),
        ({"sampling_columns": {"ignore_eos": "id"}}, "it must be boolean"),
        ({"sampling_columns": {"logit_bias": "ids"}}, "it must be map<integer, number>"),
        ({"sampling_columns": {"stop": "id"}}, "it must be string, or a list of strings"),
    ],
)
def test_what_does_not_fit(files: list[InputFile], config: dict[str, Any], expected: str):
    assert expected in refusal(files, **config)


def test_the_file_is_named(files: list[InputFile]):
    assert files[0].full_path in refusal(files, prompt_column="nope")
    assert files[0].full_path in refusal(files, prompt_column="id")


@pytest.mark.parametrize(
    "second",
    [
        {"prompt": pa.array([b"a"], pa.binary()), "id": pa.array([1])},
        {"prompt": pa.array(["a"]), "id": pa.array([1], pa.int32())},
        {"prompt": pa.array(["a"])},
    ],
)
def test_files_that_differ_in_a_used_column(tmp_path: Path, second: dict[str, pa.Array]):
    write(tmp_path / "a.parquet", {"id": pa.array([1]), "prompt": pa.array(["a"])})
    write(tmp_path / "b.parquet", second)
    text = refusal(list_inputs(str(tmp_path)), ExitCode.INPUT)
    assert "a.parquet" in text
    assert "b.parquet" in text


def test_files_may_differ_in_layout_and_in_columns_that_are_not_used(tmp_path: Path):
    write(tmp_path / "a.parquet", {"prompt": pa.array(["a"]), "id": pa.array([1])})
    write(tmp_path / "b.parquet", {"id": pa.array(["x"]), "prompt": pa.array(["a"], pa.large_string())})
    files = list_inputs(str(tmp_path))
    check_input(files, InputConfig(columns=[]))
    assert "column 'id' is int64 in a.parquet, but is string in b.parquet" in refusal(files, ExitCode.INPUT)


def test_two_columns_of_one_name(tmp_path: Path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    files = list_inputs(str(write(tmp_path / "a.parquet", table)))
    assert "several columns named 'prompt'" in refusal(files, ExitCode.INPUT)


def test_prompt_source():
    assert prompt_source(InputConfig()).kind == "prompt_column"
    assert prompt_source(InputConfig(messages_column="m")).name == "m"  # the default of prompt_column gives way
    with pytest.raises(JobError, match=r"input.prompt_column='q' and input.template='{{ x }}'"):
        prompt_source(InputConfig(prompt_column="q", template="{{ x }}"))
    with pytest.raises(JobError, match=r"input.messages_column='m' and input.token_ids_column='t'"):
        prompt_source(InputConfig(messages_column="m", token_ids_column="t"))
    with pytest.raises(JobError, match=r"no prompt source: set one of input.prompt_column, input.messages_column"):
        prompt_source(InputConfig(prompt_column=""))


def test_used_columns():
    schema = pa.schema([(name, pa.string()) for name in "abcde"])
    assert used_columns(InputConfig(prompt_column="c"), schema) == list("abcde")
    config = InputConfig(template="{{ b }}{{ d }}", columns=["d", "a", "d"], sampling_columns={"n": "e"})
    assert used_columns(config, schema) == ["d", "a", "b", "e"]
