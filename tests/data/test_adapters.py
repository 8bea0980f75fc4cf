"""The adapter of a row, by its name in a column."""

from __future__ import annotations

import pyarrow as pa
import pytest
from fake_engine import ByteTokenizer

from batchinfer.config import Config, InputConfig, ModelConfig
from batchinfer.data.prompts import PromptBuilder
from batchinfer.types import Chunk, Completion, ErrorCode, Request


def build(adapters: list[str], column: str | None, names: list[str | None]) -> list[Request | Completion]:
    model = ModelConfig(adapters={name: f"folder/{name}" for name in adapters})
    config = Config(model=model, input=InputConfig(adapter_column=column))
    table = pa.table({"prompt": ["text"] * len(names), "a": pa.array(names, pa.string())})
    return PromptBuilder.of(config, ByteTokenizer(), 64).build(table, Chunk(0, 0, 0, len(names)))


@pytest.mark.feature("LoRA", "each row's adapter by its name in a column; an unknown name is an error row")
def test_a_column_names_the_adapters() -> None:
    """Numbered in the order of their names; a null is the base model."""
    *good, bad = build(["zeta", "alpha"], "a", ["zeta", None, "alpha", "beta"])
    assert [row.adapter for row in good] == [1, None, 0]
    assert (bad.error.code, bad.prompt_tokens) == (ErrorCode.BAD_ADAPTER, 4)
    assert bad.error.message == "column 'a': there is no adapter 'beta'; there are alpha, zeta"


def test_one_adapter_is_for_all_rows() -> None:
    assert [row.adapter for row in build(["x"], None, ["y", None])] == [0, 0]
    assert [row.adapter for row in build([], None, ["y"])] == [None]
