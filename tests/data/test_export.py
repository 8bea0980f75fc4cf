"""A job's rows as lines of JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from data.fakes import rows_of, small_plan

from batchinfer.data.export import export
from batchinfer.data.ledger import Ledger, open_job
from batchinfer.data.openai_batch import JobFacts, result_line
from batchinfer.types import ExitCode, JobError

FACTS = JobFacts(plan="p" * 64, model="smol", chat=True, created=7)
ROW = {
    "custom_id": "a",
    "model": None,
    "generated_text": "Hi",
    "finish_reason": "stop",
    "prompt_tokens": 5,
    "completion_tokens": 2,
    "status": "ok",
    "error_code": None,
    "error": None,
}


@pytest.fixture
def job(tmp_path: Path) -> Ledger:
    """A job of 10 rows, not finished."""
    job = open_job(str(tmp_path / "out"), small_plan(tmp_path / "input", rows=10))
    for chunk in job.plan.chunks:
        job.commit(chunk, rows_of(chunk), {"counts": {"ok": chunk.rows, "error": 0}})
    return job


def test_a_result_of_the_batch_api() -> None:
    line = result_line(ROW, 3, FACTS)
    assert line["custom_id"] == "a"
    assert line["error"] is None
    assert line["response"]["status_code"] == 200
    body = line["response"]["body"]
    assert (body["object"], body["created"], body["model"]) == ("chat.completion", 7, "smol")
    message = {"role": "assistant", "content": "Hi"}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    assert result_line(ROW, 4, FACTS)["id"] != line["id"]


def test_several_samples_of_a_text_completion() -> None:
    many = {"generated_text": ["x", "y"], "finish_reason": ["stop", "length"], "completion_tokens": [1, 2]}
    row = {f"p_{key}" if key not in ("custom_id", "model") else key: v for key, v in (ROW | many).items()}
    row["model"] = "of the row"
    body = result_line(row, 0, JobFacts("p" * 64, "smol", False, 7, "p_"))["response"]["body"]
    assert (body["object"], body["model"]) == ("text_completion", "of the row")
    assert [(c["index"], c["text"], c["finish_reason"]) for c in body["choices"]] == [
        (0, "x", "stop"),
        (1, "y", "length"),
    ]
    assert body["usage"]["completion_tokens"] == 3


def test_thoughts_go_beside_the_answer() -> None:
    line = result_line(ROW | {"reasoning": "hm"}, 3, FACTS)
    (choice,) = line["response"]["body"]["choices"]
    assert choice["message"] == {"role": "assistant", "content": ROW["generated_text"], "reasoning": "hm"}
    (plain,) = result_line(ROW | {"reasoning": None}, 3, FACTS)["response"]["body"]["choices"]
    assert "reasoning" not in plain["message"]


def test_an_error_row() -> None:
    row = ROW | {"status": "error", "error_code": "EMPTY_PROMPT", "error": "no tokens", "generated_text": None}
    line = result_line(row, 0, FACTS)
    assert (line["response"], line["error"]) == (None, {"code": "EMPTY_PROMPT", "message": "no tokens"})


@pytest.mark.feature("commands", "export: a finished job's rows as JSON lines or OpenAI batch results")
def test_rows_in_order(job: Ledger, tmp_path: Path) -> None:
    target = tmp_path / "new" / "rows.jsonl"
    with pytest.raises(JobError, match="not complete") as caught:
        export(job.path, str(target), "rows")
    assert caught.value.exit_code == ExitCode.INCOMPLETE
    job.finish()
    assert export(job.path, str(target), "rows") == 10
    expected = pa.concat_tables([rows_of(chunk) for chunk in job.plan.chunks]).to_pylist()
    assert [json.loads(line) for line in target.read_text().splitlines()] == expected
    with pytest.raises(JobError, match="nothing is replaced"):
        export(job.path, str(target), "rows")


def test_a_damaged_part_leaves_no_file(job: Ledger, tmp_path: Path) -> None:
    job.finish()
    part = sorted(Path(job.path).glob("part-*"))[-1]
    data = bytearray(part.read_bytes())
    data[20] ^= 1
    part.write_bytes(data)
    with pytest.raises(JobError, match=part.name) as caught:
        export(job.path, str(tmp_path / "rows.jsonl"), "rows")
    assert caught.value.exit_code == ExitCode.IO
    assert not list(tmp_path.glob("*rows.jsonl*"))
