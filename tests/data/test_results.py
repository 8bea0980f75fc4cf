"""Completions -> output table: row for row, with a schema that no data can change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from data.fakes import INVALID, complete, invalid_text

from batchinfer.config import InputConfig, OutputConfig
from batchinfer.data.results import LOGPROBS, ResultOptions, count_results, result_schema, result_table
from batchinfer.types import (
    Completion,
    ErrorCode,
    ExitCode,
    JobError,
    PoolSpec,
    Request,
    RowError,
    Sample,
    SamplingParams,
)

SOURCE = pa.table({"id": [7, 8], "prompt": ["ab", None]})
GENERATED = ["generated_text", "finish_reason", "prompt_tokens", "completion_tokens", "status", "error_code", "error"]


def answers(samples: int = 1) -> list[Completion]:
    good = Request(0, np.array([97, 98], np.int32), SamplingParams())
    return [complete(good, samples), Completion(1, 0, error=RowError(ErrorCode.NULL_PROMPT, "the value is null"))]


def test_one_sample():
    table = result_table(SOURCE, answers(), ResultOptions())
    assert table.to_pylist() == [
        {
            **{"id": 7, "prompt": "ab", "generated_text": "0:6261", "finish_reason": "stop", "prompt_tokens": 2},
            **{"completion_tokens": 3, "status": "ok", "error_code": None, "error": None},
        },
        {
            **{"id": 8, "prompt": None, "generated_text": None, "finish_reason": None, "prompt_tokens": 0},
            **{"completion_tokens": None, "status": "error", "error_code": "NULL_PROMPT", "error": "the value is null"},
        },
    ]
    assert table.column_names == ["id", "prompt", *GENERATED]


@pytest.mark.feature("output", "n samples per row as list columns")
def test_several_samples_are_lists_in_their_order():
    options = ResultOptions(columns=(), token_ids=True, logprobs=True, many=True)
    first, second = result_table(SOURCE, answers(samples=2), options).to_pylist()
    assert first["generated_text"] == ["0:6261", "1:6261"]
    assert first["finish_reason"] == ["stop", "stop"]
    assert first["completion_tokens"] == [3, 3]
    assert first["token_ids"] == [[0, 98, 97], [1, 98, 97]]
    assert first["logprobs"][1] == {
        "chosen": [-1.0, -98.0, -97.0],
        "top_ids": [[1, 2], [98, 99], [97, 98]],
        "top": [[-1.0, -2.0], [-98.0, -99.0], [-97.0, -98.0]],
    }
    assert [second[name] for name in ("generated_text", "token_ids", "logprobs", "status")] == [
        None,
        None,
        None,
        "error",
    ]


@pytest.mark.feature("output", "log-probabilities of chosen and top-k tokens")
def test_logprobs_of_one_sample():
    (row, _) = result_table(SOURCE, answers(), ResultOptions(logprobs=True))["logprobs"].to_pylist()
    assert row["chosen"] == [0.0, -98.0, -97.0]
    assert row["top_ids"] == [[0, 1], [98, 99], [97, 98]]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("token_ids", [False, True])
def test_the_schema_follows_from_the_configuration_alone(many: bool, logprobs: bool, token_ids: bool):
    options = ResultOptions(
        token_ids=token_ids, logprobs=logprobs, prompt_logprobs=logprobs, reasoning=logprobs, many=many
    )
    schema = result_schema(SOURCE.schema, options)
    good, bad = answers()
    for completions in ([good, bad], [bad, bad], [good, good]):
        assert result_table(SOURCE, completions, options).schema == schema
    assert result_table(SOURCE.slice(0, 0), [], options).schema == schema
    assert schema.field("prompt_tokens").type == pa.int32()
    for name, kind, there in (("token_ids", pa.list_(pa.int32()), token_ids), ("logprobs", LOGPROBS, logprobs)):
        assert (name in schema.names) == there
        if there:
            assert schema.field(name).type == (pa.list_(kind) if many else kind)
    assert ("reasoning" in schema.names) == ("prompt_logprobs" in schema.names) == logprobs
    if logprobs:
        assert schema.field("prompt_logprobs").type == LOGPROBS  # of the row, however many samples it has


def test_thoughts_and_the_logprobs_of_a_prompt():
    good, bad = answers(samples=2)
    samples = (replace(good.samples[0], reasoning="hm"), good.samples[1])
    good = replace(good, samples=samples, prompt_logprobs=samples[0].logprobs)
    options = ResultOptions(prompt_logprobs=True, reasoning=True, many=True)
    rows = result_table(SOURCE, [good, bad], options).to_pylist()
    assert [row["reasoning"] for row in rows] == [["hm", None], None]
    assert rows[0]["prompt_logprobs"]["top_ids"] == [[0, 1], [98, 99], [97, 98]]
    assert rows[1]["prompt_logprobs"] is None


def test_options_of_a_configuration():
    def options(input: dict[str, Any], sampling: dict[str, Any]) -> ResultOptions:
        return ResultOptions.of(InputConfig(**input), OutputConfig(prefix="p_"), SamplingParams(**sampling))

    assert options({}, {}) == ResultOptions(prefix="p_")
    assert options({"columns": ["a", "b", "a"]}, {"n": 2}) == ResultOptions(("a", "b"), "p_", many=True)
    assert options({"sampling_columns": {"n": "x"}}, {}) == ResultOptions(prefix="p_", many=True)
    assert options({}, {"logprobs": 0}) == ResultOptions(prefix="p_", logprobs=True)
    assert options({}, {"prompt_logprobs": 0}) == ResultOptions(prefix="p_", prompt_logprobs=True)
    assert options({"sampling_columns": {"prompt_logprobs": "x"}}, {}).prompt_logprobs
    assert ResultOptions.of(InputConfig(), OutputConfig(reasoning="auto"), SamplingParams()).reasoning
    assert options({"sampling_columns": {"logprobs": "x"}}, {}) == ResultOptions(prefix="p_", logprobs=True)


@pytest.mark.feature("output", "all or chosen input columns are passed through")
def test_columns_passed_through():
    assert result_table(SOURCE, answers(), ResultOptions(columns=("prompt",))).column_names == ["prompt", *GENERATED]
    assert result_table(SOURCE, answers(), ResultOptions(columns=(), prefix="m_")).column_names == [
        f"m_{name}" for name in GENERATED
    ]


def test_text_that_is_not_utf8_passes_through():
    source = pa.table({"x": invalid_text([b"a", INVALID])})
    table = result_table(source, answers(), ResultOptions())
    assert table["x"].cast(pa.binary()).to_pylist() == [b"a", INVALID]


@pytest.mark.feature("output", "a name collision with a passed column is refused; the prefix is configurable")
def test_a_name_that_the_input_has_already():
    source = pa.table({"status": ["new", "old"], "x": [1, 2]})
    with pytest.raises(JobError, match="the input has a column 'status'") as caught:
        result_table(source, answers(), ResultOptions())
    assert caught.value.exit_code == ExitCode.USAGE
    assert "output.prefix" in str(caught.value)
    assert "input.columns" in str(caught.value)
    assert result_table(source, answers(), ResultOptions(prefix="m_"))["m_status"].to_pylist() == ["ok", "error"]
    assert result_table(source, answers(), ResultOptions(columns=("x",)))["status"].to_pylist() == ["ok", "error"]


@pytest.mark.parametrize("message", ["x" * 5000, "é" * 5000, "\U0001f600" * 5000, "\ud800 lone"])
def test_long_messages_are_cut_between_characters(message: str):
    bad = Completion(0, 0, error=RowError(ErrorCode.TEMPLATE_ERROR, message))
    (text,) = result_table(SOURCE.slice(0, 1), [bad], ResultOptions())["error"].to_pylist()
    assert len(text.encode()) <= 1000
    assert len(text.encode()) > 996 or text == "? lone"
    assert message.startswith(text[:100]) or text == "? lone"


def test_the_wrong_number_of_completions():
    with pytest.raises(ValueError, match="1 completions for 2 rows"):
        result_table(SOURCE, answers()[:1], ResultOptions())


def test_counts():
    long = Completion(2, 900, error=RowError(ErrorCode.PROMPT_TOO_LONG, "..."))
    assert count_results([*answers(samples=2), long]) == {
        **{"ok": 1, "error": 2, "prompt_tokens": 902, "completion_tokens": 6},
        **{"error:NULL_PROMPT": 1, "error:PROMPT_TOO_LONG": 1},
    }


def vectors(task: str, pool: PoolSpec, values: list[float]) -> pa.Table:
    sample = Sample(np.zeros(0, np.int32), "", "pooled", vector=np.array(values, np.float32))
    rows = [Completion(0, 9, (sample,)), Completion(1, 0, error=RowError(ErrorCode.NULL_PROMPT, "the value is null"))]
    options = ResultOptions.of(InputConfig(columns=[]), OutputConfig(prefix="p_"), SamplingParams(), task, pool)
    return result_table(SOURCE, rows, options)


@pytest.mark.feature("output", "embeddings as fixed-size lists of float32, labels and scores, relevance")
def test_vectors_become_the_columns_of_their_task() -> None:
    table = vectors("embed", PoolSpec("last", 3), [0.5, 0.25, -1.0])
    assert table.schema.field("p_embedding").type == pa.list_(pa.float32(), 3)
    assert table["p_embedding"].to_pylist() == [[0.5, 0.25, -1.0], None]
    names = ["p_embedding", "p_prompt_tokens", "p_status", "p_error_code", "p_error"]
    assert table.column_names == names
    table = vectors("classify", PoolSpec("last", 2, "classes", "softmax", ("no", "yes")), [0.25, 0.75])
    assert table["p_label"].to_pylist() == ["yes", None]
    assert table["p_scores"].to_pylist() == [[0.25, 0.75], None]
    assert table.column_names == ["p_label", "p_scores", *names[1:]]
    table = vectors("rerank", PoolSpec("last", 2, "tokens", "softmax"), [0.25, 0.75])
    assert table["p_relevance"].to_pylist() == [0.25, None]
    assert table.schema.field("p_relevance").type == pa.float32()
    assert table["p_prompt_tokens"].to_pylist() == [9, 0]
