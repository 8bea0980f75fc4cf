"""Rows of a query and a document: one prompt each, or the row's error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fake_engine import ByteTokenizer
from omegaconf import OmegaConf

from batchinfer.__main__ import config_folder
from batchinfer.config import Config, InputConfig, RerankConfig, TaskConfig
from batchinfer.data.prompts import PromptBuilder
from batchinfer.types import Chunk, Completion, ErrorCode, ExitCode, JobError, Request

INPUT = InputConfig(query_column="q", document_column="d")


def build(rows: dict[str, list], rerank: RerankConfig | None = None) -> list[Request | Completion]:
    config = Config(TaskConfig("rerank"), input=INPUT, rerank=rerank or RerankConfig())
    table = pa.table(rows)
    return PromptBuilder.of(config, ByteTokenizer(), 64).build(table, Chunk(0, 0, 0, table.num_rows))


def text(row: Request | Completion) -> str:
    assert isinstance(row, Request)
    return bytes(row.prompt.astype(np.uint8)).decode()


@pytest.mark.feature("input", "a query and a document, as the tokenizer joins a pair or through a template")
def test_pairs_with_and_without_a_template(tmp_path: Path) -> None:
    rows = {"q": ["what", "é"], "d": ["this", "{{ query }}"]}
    assert [text(row) for row in build(rows)] == ["what|this", "é|{{ query }}"]
    assert [row.second_from for row in build(rows)] == [5, 3]
    template = "{{ instruction }}: {{ query }} ~ {{ document }}"
    assert [text(row) for row in build(rows, RerankConfig(template, "find"))] == [
        "find: what ~ this",
        "find: é ~ {{ query }}",
    ]
    file = tmp_path / "pair.j2"
    file.write_text("{{ document }}<{{ query }}")
    assert text(build(rows, RerankConfig(str(file)))[0]) == "this<what"


def test_pairs_that_are_no_prompt() -> None:
    rows = {"q": ["a", None, "", "q", b"\xff".decode("latin1"), "x" * 70], "d": ["b", "b", "b", None, "b", "b"]}
    first, *bad, last, long = build(rows)
    assert text(first) == "a|b"
    found = [(row.error.code, row.error.message) for row in bad]
    assert found == [
        (ErrorCode.NULL_PROMPT, "column 'q': the value is null"),
        (ErrorCode.EMPTY_PROMPT, "column 'q': the prompt is an empty text"),
        (ErrorCode.NULL_PROMPT, "column 'd': the value is null"),
    ]
    assert text(last) == "ÿ|b"
    assert long.error.code is ErrorCode.PROMPT_TOO_LONG
    (failed,) = build({"q": ["a"], "d": ["b"]}, RerankConfig("{{ 1 // (query | length - 1) }}"))
    assert failed.error.code is ErrorCode.TEMPLATE_ERROR


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ question }}", r"rerank\.template has the variable 'question'; it may have query, document, instruction"),
        ("{{ query", r"rerank\.template, line 1"),
        ("nowhere.j2", r"rerank\.template=nowhere\.j2 cannot be read"),
    ],
)
def test_templates_that_cannot_be_used(template: str, message: str) -> None:
    with pytest.raises(JobError, match=message) as caught:
        build({"q": ["a"], "d": ["b"]}, RerankConfig(template))
    assert caught.value.exit_code == ExitCode.USAGE


def test_the_prompt_of_qwen3_ends_where_the_answer_begins() -> None:
    values = OmegaConf.load(config_folder() / "rerank" / "qwen3.yaml")
    template = str(values.template)
    assert "{{ query }}" in template
    table = {"q": ["a"], "d": ["b"]}
    config = Config(TaskConfig("rerank"), input=INPUT, rerank=RerankConfig(template, "find"))
    (row,) = PromptBuilder.of(config, ByteTokenizer(), 4096).build(pa.table(table), Chunk(0, 0, 0, 1))
    assert text(row).endswith(
        "<Instruct>: find\n<Query>: a\n<Document>: b<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
