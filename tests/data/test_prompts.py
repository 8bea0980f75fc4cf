"""Rows -> requests: every source, every kind of bad row, and neighbours that do not notice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from data.fakes import INVALID, ByteTokenizer, invalid_text

from batchinfer.config import InputConfig
from batchinfer.data import prompts
from batchinfer.data import texts as text_values
from batchinfer.data.prompts import PromptBuilder, row_seed
from batchinfer.types import Chunk, Completion, ErrorCode, JobError, Request, SamplingParams

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())]))


def build(
    column: pa.Array, config: InputConfig, tokenizer: ByteTokenizer | None = None, limit: int = 1000, **more: pa.Array
) -> list[Request | Completion]:
    table = pa.table({"x": column, **more})
    builder = PromptBuilder(config, SamplingParams(max_tokens=9), tokenizer or ByteTokenizer(), limit, run_seed=3)
    return builder.build(table, Chunk(index=5, file=2, start=100, rows=table.num_rows))


def text_of(entry: Request | Completion) -> str:
    assert isinstance(entry, Request)
    assert entry.prompt.dtype == np.int32
    return bytes(entry.prompt.astype(np.uint8)).decode()


def error_of(entry: Request | Completion) -> tuple[ErrorCode, str]:
    assert isinstance(entry, Completion)
    assert entry.error
    assert not entry.samples
    return entry.error.code, entry.error.message


@pytest.mark.feature("input", "prompts from a text column")
def test_a_request():
    tokenizer = ByteTokenizer()
    first, second = build(pa.array(["ab", "é"]), InputConfig(prompt_column="x"), tokenizer)
    assert (text_of(first), text_of(second)) == ("ab", "é")
    assert (first.id, second.id) == (2 << 40 | 100, 2 << 40 | 101)
    assert first.sampling == SamplingParams(max_tokens=9, seed=3)
    assert first.seed == row_seed(3, first.id) != second.seed
    assert tokenizer.calls == [(2, True)]


@pytest.mark.feature("sampling", "truncate_prompt_tokens: a prompt's last tokens, per job or row")
def test_a_prompt_is_cut_to_its_last_tokens():
    config = InputConfig(prompt_column="x", sampling_columns={"truncate_prompt_tokens": "k"})
    column, keep = pa.array(["abcdef", "abcdef", "abc", "x" * 2000, ""]), pa.array([2, None, 5, 7, 1])
    entries = build(column, config, k=keep)
    assert [text_of(entry) for entry in entries[:4]] == ["ef", "abcdef", "abc", "x" * 7]
    assert error_of(entries[4])[0] is ErrorCode.EMPTY_PROMPT


def test_requests_are_told_whether_thoughts_are_apart():
    for reasoning in (False, True):
        builder = PromptBuilder(InputConfig(), SamplingParams(), ByteTokenizer(), 100, 0, reasoning=reasoning)
        (entry,) = builder.build(pa.table({"prompt": ["a"]}), Chunk(index=0, file=0, start=0, rows=1))
        assert isinstance(entry, Request)
        assert entry.reasoning is reasoning


def test_seeds_never_change():
    assert row_seed(0, 0) == 0x865E30C8382242B3  # by another program: printf ... | sha256sum
    assert row_seed(2**63 - 1, 2**64 - 1) == 0xBCA83F62B0BE9824


def test_rows_are_tokenised_slice_by_slice():
    tokenizer = ByteTokenizer()
    texts = [f"row {i}" if i % 3 else None for i in range(prompts.SLICE_ROWS + 50)]
    entries = build(pa.array(texts), InputConfig(prompt_column="x"), tokenizer)
    assert len(tokenizer.calls) == 2
    assert sum(n for n, _ in tokenizer.calls) == sum(text is not None for text in texts)
    for text, entry in zip(texts, entries, strict=True):
        if text is None:
            assert error_of(entry)[0] is ErrorCode.NULL_PROMPT
        else:
            assert text_of(entry) == text


@pytest.mark.feature("job", "null, empty, over-long and non-UTF-8 prompts, unknown roles ... are error rows")
@pytest.mark.parametrize("kind", [pa.string(), pa.binary()])
def test_bad_texts(kind: pa.DataType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_values, "MAX_PROMPT_CHARS", 5000)
    rows = [b"good", None, b"", b"12" + INVALID, b"x" * 1000, b"y" * 999, b"z" * 6000, b"nul \0 ok"]
    array = invalid_text(rows) if kind == pa.string() else pa.array(rows)
    entries = build(array, InputConfig(prompt_column="x"))
    assert text_of(entries[0]) == "good"
    assert error_of(entries[1]) == (ErrorCode.NULL_PROMPT, "the value is null")
    assert error_of(entries[2]) == (ErrorCode.EMPTY_PROMPT, "the prompt is an empty text")
    assert error_of(entries[3]) == (ErrorCode.INVALID_UTF8, "byte 2 of the text is not UTF-8")
    code, message = error_of(entries[4])
    assert code is ErrorCode.PROMPT_TOO_LONG
    assert "1000 prompt tokens" in message
    assert "the limit is 1000" in message
    assert entries[4].prompt_tokens == 1000
    assert text_of(entries[5]) == "y" * 999
    assert error_of(entries[6])[0] is ErrorCode.PROMPT_TOO_LONG
    assert text_of(entries[7]) == "nul \0 ok"


def chat(*messages: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content, "name": None} for role, content in messages]


@pytest.mark.feature("input", "prompts from chat messages, by the model's own template")
def test_messages():
    tokenizer = ByteTokenizer()
    rows = [chat(("system", "s"), ("user", "u"), ("assistant", ""), ("tool", "t"), ("developer", "d"))]
    (entry,) = build(pa.array(rows, MESSAGES), InputConfig(messages_column="x"), tokenizer)
    assert text_of(entry) == "<system>s<user>u<assistant><tool>t<developer>d"
    assert tokenizer.calls == [(1, False)]  # the template writes the special tokens


@pytest.mark.feature("job", "null, empty, over-long and non-UTF-8 prompts, unknown roles ... are error rows")
@pytest.mark.parametrize(
    ("row", "code", "expected"),
    [
        (None, ErrorCode.NULL_PROMPT, "null"),
        ([], ErrorCode.EMPTY_PROMPT, "empty"),
        (
            chat(("user", "a"), ("robot", "b")),
            ErrorCode.BAD_MESSAGES,
            "message 1 has the role 'robot'; allowed: system",
        ),
        (chat((None, "a")), ErrorCode.BAD_MESSAGES, "message 0, role: the value is null"),
        (chat(("user", None)), ErrorCode.BAD_MESSAGES, "message 0, content: the value is null"),
        ([None], ErrorCode.BAD_MESSAGES, "message 0, role"),
        (chat(("user", "refuse")), ErrorCode.BAD_MESSAGES, "only an assistant may speak"),
    ],
)
def test_bad_messages(row: Any, code: ErrorCode, expected: str):
    good = chat(("user", "fine"))
    entries = build(pa.array([good, row, good], MESSAGES), InputConfig(messages_column="x"))
    assert [text_of(entries[0]), text_of(entries[2])] == ["<user>fine"] * 2
    assert error_of(entries[1])[0] is code
    assert expected in error_of(entries[1])[1]


@pytest.mark.parametrize("kind", [pa.string(), pa.binary()])
def test_messages_that_are_not_utf8(kind: pa.DataType):
    contents = invalid_text([b"good", INVALID]).cast(kind)
    messages = pa.StructArray.from_arrays([pa.array(["user", "user"]), contents], ["role", "content"])
    entries = build(pa.ListArray.from_arrays([0, 1, 2], messages), InputConfig(messages_column="x"))
    assert text_of(entries[0]) == "<user>good"
    assert error_of(entries[1])[0] is ErrorCode.INVALID_UTF8


@pytest.mark.feature("input", "prompts from a sandboxed Jinja template over columns")
def test_templates():
    tokenizer = ByteTokenizer()
    column = invalid_text([b"a", b"b" + INVALID, None, b"d"])
    config = InputConfig(template="{{ x }}{{ 6 // y }}")
    entries = build(column, config, tokenizer, y=pa.array([3, 3, 3, 0]), unused=invalid_text([INVALID] * 4))
    assert text_of(entries[0]) == "a2"
    assert error_of(entries[1])[0] is ErrorCode.INVALID_UTF8
    assert "column 'x'" in error_of(entries[1])[1]
    assert error_of(entries[2])[0] is ErrorCode.TEMPLATE_ERROR
    assert "null" in error_of(entries[2])[1]
    assert error_of(entries[3])[0] is ErrorCode.TEMPLATE_ERROR
    assert "ZeroDivisionError" in error_of(entries[3])[1]
    assert tokenizer.calls == [(1, True)]


def test_a_template_may_give_an_empty_prompt():
    entries = build(pa.array(["", "a"]), InputConfig(template="{{ x }}"))
    assert error_of(entries[0])[0] is ErrorCode.EMPTY_PROMPT
    assert text_of(entries[1]) == "a"


@pytest.mark.feature("input", "prompts of ready token ids")
@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint64()])
def test_token_ids(kind: pa.DataType):
    tokenizer = ByteTokenizer()
    rows = [[1, 127], None, [], [1, None], [5]]
    entries = build(pa.array(rows, pa.list_(kind)).slice(0), InputConfig(token_ids_column="x"), tokenizer)
    assert entries[0].prompt.tolist() == [1, 127]
    assert entries[0].prompt.dtype == np.int32
    assert error_of(entries[1])[0] is ErrorCode.NULL_PROMPT
    assert error_of(entries[2])[0] is ErrorCode.EMPTY_PROMPT
    assert error_of(entries[3])[0] is ErrorCode.BAD_TOKEN_IDS
    assert entries[4].prompt.tolist() == [5]
    assert tokenizer.calls == []


def test_token_ids_outside_the_vocabulary():
    rows = [[0, 255], [7, 256], [-1], [2**40], [2**63 - 1]]
    entries = build(pa.array(rows, pa.list_(pa.int64())), InputConfig(token_ids_column="x"))
    assert entries[0].prompt.tolist() == [0, 255]
    assert error_of(entries[1])[1] == "token id 256 at position 1 is outside the vocabulary of 256"
    assert {error_of(entry)[0] for entry in entries[1:]} == {ErrorCode.BAD_TOKEN_IDS}


@pytest.mark.feature("input", "sampling settings per row, from columns")
def test_a_row_may_override_the_sampling():
    config = InputConfig(prompt_column="x", sampling_columns={"temperature": "t", "seed": "s"})
    heat, seeds = pa.array([0.5, None, float("nan")]), pa.array([None, 8, 8])
    one, two, three = build(pa.array(["a", "b", "c"]), config, t=heat, s=seeds)
    assert (one.sampling.temperature, one.seed) == (0.5, row_seed(3, one.id))
    assert (two.sampling.temperature, two.seed) == (0.0, row_seed(8, two.id))
    assert error_of(three)[0] is ErrorCode.BAD_SAMPLING
    assert three.prompt_tokens == 1


def test_the_wrong_number_of_rows():
    builder = PromptBuilder(InputConfig(), SamplingParams(), ByteTokenizer(), 10, 0)
    with pytest.raises(ValueError, match="1 rows do not make"):
        builder.build(pa.table({"prompt": ["a"]}), Chunk(0, 0, 0, 2))


def test_a_template_that_does_not_parse():
    with pytest.raises(JobError, match=r"input\.template, line 1"):
        PromptBuilder(InputConfig(template="{{ x"), SamplingParams(), ByteTokenizer(), 10, 0)


SCORED = InputConfig(prompt_column="x", continuation_column="y")


def scored(prompts_: list[Any], added: list[Any], limit: int = 1000) -> list[Request | Completion]:
    return build(pa.array(prompts_, pa.string()), SCORED, limit=limit, y=pa.array(added, pa.string()))


@pytest.mark.feature("input", "a continuation to be scored, from a column of texts or token ids")
def test_a_continuation():
    first, second, third = scored(["ab", "a  ", ""], ["cd", "b", "xyz"])
    assert (text_of(first), first.scored_from) == ("abcd", 2)
    assert (text_of(second), second.scored_from) == ("a  b", 1)  # the spaces are foretold too
    assert (text_of(third), third.scored_from) == ("xyz", 1)


def test_continuations_that_cannot_be_scored():
    entries = scored(["ab", None, "ab", "", "a" * 7], ["", "b", None, "x", "bcd"], limit=10)
    codes = [error_of(entry)[0] for entry in entries]
    assert codes == [
        ErrorCode.EMPTY_CONTINUATION,
        ErrorCode.NULL_PROMPT,
        ErrorCode.NULL_PROMPT,
        ErrorCode.EMPTY_CONTINUATION,
        ErrorCode.PROMPT_TOO_LONG,
    ]
    assert isinstance(scored(["a" * 7], ["bc"], limit=10)[0], Request)


def test_continuations_after_messages_and_token_ids():
    chat = pa.array([[{"role": "user", "content": "q", "name": None}]], MESSAGES)
    (entry,) = build(chat, InputConfig(messages_column="x", continuation_column="y"), y=pa.array(["a"]))
    assert (text_of(entry), entry.scored_from) == ("<user>qa", 7)
    ids = pa.array([[1, 2], [3], None], pa.list_(pa.int32()))
    more = pa.array([[5], [255, 7], [1]], pa.list_(pa.int64()))
    config = InputConfig(token_ids_column="x", continuation_column="y")
    first, second, third = build(ids, config, y=more)
    assert (first.prompt.tolist(), first.scored_from) == ([1, 2, 5], 2)
    assert (second.prompt.tolist(), second.scored_from) == ([3, 255, 7], 1)
    assert error_of(third)[0] is ErrorCode.NULL_PROMPT
