"""Other people's files in, other people's lines out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.data import convert as module
from batchinfer.data.convert import convert
from batchinfer.types import ExitCode, JobError

CHAT = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hä?"}]


def lines(path: Path, *values: Any) -> str:
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values), encoding="utf-8")
    return str(path)


def request(custom_id: str = "a", **body: Any) -> dict[str, Any]:
    return CHAT | {"custom_id": custom_id, "body": {"model": "m", "messages": MESSAGES} | body}


def refusal(source: str, target: Path, code: ExitCode = ExitCode.INPUT) -> str:
    with pytest.raises(JobError) as caught:
        convert(source, str(target))
    assert caught.value.exit_code == code
    assert not list(target.parent.glob(f"*{target.name}*"))
    return str(caught.value)


@pytest.mark.feature("commands", "convert: JSON lines, OpenAI batch requests and datasets folders to Parquet")
def test_lines_of_any_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block is typed alone: a key may be absent, null, or look like a time in some of them."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    rows = [
        {"prompt": "2020-01-01", "n": 1},
        {"prompt": "no time", "n": None, "more": {"x": [1, 2]}},
        {"prompt": "", "n": 2.5, "nothing": None},
    ]
    made = convert(lines(tmp_path / "in.jsonl", rows[0], "", rows[1], "   ", rows[2]), str(tmp_path / "out.parquet"))
    assert (made.rows, made.columns, made.settings) == (3, ["prompt", "n", "more", "nothing"], [])
    table = pq.read_table(made.path)
    assert table["prompt"].to_pylist() == [row["prompt"] for row in rows]
    assert table["n"].to_pylist() == [1.0, None, 2.5]
    assert table["more"].to_pylist() == [None, {"x": [1, 2]}, None]
    assert [str(table.schema.field(name).type) for name in ("prompt", "nothing")] == ["string", "string"]


def test_packed_lines_and_a_last_line_without_end(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\r\n{"prompt": "b"}'))
    made = convert(str(path), str(tmp_path / "new" / "out.parquet"))
    assert pq.read_table(made.path).to_pylist() == [{"prompt": "a"}, {"prompt": "b"}]


def test_openai_requests(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]}]
    source = lines(
        tmp_path / "in.jsonl",
        request("a", max_completion_tokens=5, stop="x", temperature=0, user="me", stream=False, tools=None),
        request("b", logprobs=True, top_logprobs=2, stop=["x", "y"], n=3, messages=parts),
        request("c", logprobs=False, response_format={"type": "text"}),
    )
    made = convert(source, str(tmp_path / "out.parquet"))
    rows = pq.read_table(made.path).to_pylist()
    assert [row["custom_id"] for row in rows] == ["a", "b", "c"]
    assert [row["messages"] for row in rows] == [MESSAGES, [{"role": "user", "content": "in parts"}], MESSAGES]
    assert [row["sampling_max_tokens"] for row in rows] == [5, None, None]
    assert [row["sampling_temperature"] for row in rows] == [0.0, None, None]
    assert [row["sampling_stop"] for row in rows] == [["x"], ["x", "y"], None]
    assert [row["sampling_logprobs"] for row in rows] == [None, 2, None]
    assert made.settings == [
        "input.messages_column=messages",
        "'input.columns=[custom_id, model]'",
        "'input.sampling_columns={logprobs: sampling_logprobs, max_tokens: sampling_max_tokens, n: sampling_n, "
        "stop: sampling_stop, temperature: sampling_temperature}'",
    ]


def test_openai_text_completions(tmp_path: Path) -> None:
    value = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "Once", "logprobs": 3}}
    made = convert(lines(tmp_path / "in.jsonl", value), str(tmp_path / "out.parquet"))
    assert pq.read_table(made.path).to_pylist() == [{"custom_id": "a", "prompt": "Once", "sampling_logprobs": 3}]
    assert made.settings[:2] == ["input.prompt_column=prompt", "'input.columns=[custom_id]'"]


def test_biases_and_what_vllm_adds(tmp_path: Path) -> None:
    body = {"logit_bias": {"11": -5, "7": 1.5}, "best_of": 3, "skip_special_tokens": False}
    made = convert(lines(tmp_path / "in.jsonl", request("a", **body), request("b")), str(tmp_path / "out.parquet"))
    first, second = pq.read_table(made.path).to_pylist()
    assert first["sampling_logit_bias"] == [(11, -5.0), (7, 1.5)]
    assert (first["sampling_best_of"], first["sampling_skip_special_tokens"]) == (3, False)
    assert second["sampling_logit_bias"] is second["sampling_best_of"] is None
    assert "logit_bias: sampling_logit_bias" in made.settings[-1]


def test_forms(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    asked = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"choice": ["yes", "no"]}, "stop_token_ids": [5], "bad_words": ["no"]},
        {"structured_outputs": {"regex": "a+", "json": None, "disable_any_whitespace": False}},
        {"structured_outputs": {"json": schema}},
        {"structured_outputs": {"grammar": "root ::= [ab]"}},
    ]
    source = lines(tmp_path / "in.jsonl", *(request(str(i), **body) for i, body in enumerate(asked)))
    made = convert(source, str(tmp_path / "out.parquet"))
    rows = pq.read_table(made.path).to_pylist()
    schemas = [row["sampling_json_schema"] and json.loads(row["sampling_json_schema"]) for row in rows]
    assert schemas == [schema, {"type": "object"}, None, None, schema, None]
    assert [row["sampling_choice"] for row in rows] == [None, None, ["yes", "no"], None, None, None]
    assert rows[3]["sampling_regex"] == "a+"
    assert rows[5]["sampling_grammar"] == "root ::= [ab]"
    assert (rows[2]["sampling_stop_token_ids"], rows[2]["sampling_bad_words"]) == ([5], ["no"])
    assert "json_schema: sampling_json_schema" in made.settings[-1]


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (request("a"), "custom_id 'a' has been used"),
        (request("b", tools=[{"type": "function"}]), "body.tools="),
        (request("b", temperature="hot"), "body.temperature='hot' must be int or float"),
        (request("b", max_tokens=True), "body.max_tokens=True must be int"),
        (request("b", messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "a part that is not text"),
        (request("b", messages=["hi"]), "a message is not an object"),
        (request("b", logit_bias={"x": 1}), "body.logit_bias={'x': 1} must map token ids to numbers"),
        (request("b", logit_bias=[5]), "body.logit_bias=[5] must be dict"),
        (request("b", stop=["x", 5]), "body.stop=['x', 5] must be a list of str"),
        (request("b", stop_token_ids=["x"]), "body.stop_token_ids=['x'] must be a list of int"),
        (request("b", response_format={"type": "xml"}), "body.response_format={'type': 'xml'} is not supported"),
        (request("b", response_format={"type": "json_schema"}), "body.response_format="),
        (request("b", structured_outputs={"json": {}, "regex": "a"}), "give one of json, regex, choice, grammar"),
        (request("b", structured_outputs={"structural_tag": "x"}), "body.structured_outputs="),
        (request("b") | {"url": "/v1/embeddings"}, "url='/v1/embeddings' is not supported"),
        (request("b") | {"url": "/v1/completions"}, "differs from that of the first line"),
        ({"prompt": "x"}, "no custom_id and body"),
        ({"custom_id": 5, "body": {}}, "custom_id must be a text"),
        ("{", "is not JSON"),
    ],
)
def test_requests_that_cannot_be_done_are_named_by_line(second: Any, says: str, tmp_path: Path) -> None:
    text = refusal(lines(tmp_path / "in.jsonl", request("a"), "", second), tmp_path / "out.parquet")
    assert says in text
    assert "in.jsonl, line 3" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (["{", {"a": 1}], "line 1 is not JSON"),
        ([{"a": 1}, {"a": "text"}], "lines 1 to 2: a key has values of different types"),
        ([{"a": 1}, [1]], "line 2"),
        ([5], "line 1 is not an object"),
        ([], "has no lines"),
    ],
)
def test_lines_that_make_no_table(content: list[Any], says: str, tmp_path: Path) -> None:
    assert says in refusal(lines(tmp_path / "in.jsonl", *content), tmp_path / "out.parquet")


def test_a_datasets_folder(tmp_path: Path) -> None:
    """Laid out as Dataset.save_to_disk does: streams whose order state.json gives."""
    schema = pa.schema([("text", pa.large_string()), ("label", pa.int64())])
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    for number, name in enumerate(names):
        with pa.OSFile(str(tmp_path / name), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            for i in range(2):
                stream.write_table(pa.table({"text": [f"{number} {i}"], "label": [i]}, schema=schema))
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    made = convert(str(tmp_path), str(tmp_path / "out.parquet"))
    table = pq.read_table(made.path)
    assert table["text"].to_pylist() == ["0 0", "0 1", "1 0", "1 1"]
    assert str(table.schema.field("text").type) == "string"


def test_a_damaged_stream_is_the_inputs_fault(tmp_path: Path) -> None:
    schema = pa.schema([("text", pa.string())])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        stream.write_table(pa.table({"text": ["x" * 1000]}, schema=schema))
    whole = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "b.arrow").write_bytes(whole[: len(whole) // 2])
    names = [{"filename": name} for name in ("a.arrow", "b.arrow")]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": names}))
    assert "cannot be read" in refusal(str(tmp_path), tmp_path / "out.parquet")


def test_what_is_no_source(tmp_path: Path) -> None:
    assert "no state.json" in refusal(str(tmp_path), tmp_path / "out.parquet")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert f"give one of {tmp_path}/train" in refusal(str(tmp_path), tmp_path / "out.parquet")
    assert "takes a file ending in .jsonl" in refusal(str(tmp_path / "a.csv"), tmp_path / "out.parquet")
    assert "cannot be read" in refusal(str(tmp_path / "absent.jsonl"), tmp_path / "out.parquet")


def test_nothing_is_replaced(tmp_path: Path) -> None:
    source, target = lines(tmp_path / "in.jsonl", {"a": 1}), tmp_path / "out.parquet"
    target.write_text("mine")
    with pytest.raises(JobError, match="nothing is replaced"):
        convert(source, str(target))
    assert target.read_text() == "mine"
