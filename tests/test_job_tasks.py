"""Jobs that are not a plain generation from Parquet: scores of given texts, and the lines of the OpenAI batch API."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fake_engine import FakeEngine, identify_fake, load_fake
from test_job import configure, inputs, prompts  # noqa: F401

from batchinfer import job
from batchinfer.cluster.world import World
from batchinfer.data.audit import verify
from batchinfer.data.convert import convert
from batchinfer.data.export import export
from batchinfer.types import JobError, PoolSpec


def test_openai_requests_in_and_results_out(tmp_path: Path) -> None:
    """The settings that convert prints are those with which the job reads its file."""
    requests = [
        {"custom_id": f"r{i}", "url": "/v1/completions", "body": {"prompt": text, "max_tokens": 3 + i, "n": 1 + i % 2}}
        for i, text in enumerate([*prompts(5), ""])
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(request) for request in requests))
    made = convert(str(tmp_path / "in.jsonl"), str(tmp_path / "in.parquet"))
    values = [yaml.safe_load(setting.strip("'").partition("=")[2]) for setting in made.settings]
    names = ["prompt_column", "columns", "sampling_columns"]
    changes = {f"input__{name}": value for name, value in zip(names, values, strict=True)}
    changes["job__max_error_fraction"] = 1.0
    assert (
        job.run(configure(tmp_path / "in.parquet", tmp_path / "out", **changes), World(), load_fake, identify_fake) == 0
    )
    assert export(str(tmp_path / "out"), str(tmp_path / "out.jsonl"), "openai") == 6
    *results, failed = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [result["custom_id"] for result in results] == [f"r{i}" for i in range(5)]
    for i, result in enumerate(results):
        choices = result["response"]["body"]["choices"]
        assert len(choices) == 1 + i % 2
        assert all(choice["text"] for choice in choices)
        assert result["response"]["body"]["usage"]["completion_tokens"] <= (3 + i) * len(choices)
    assert (failed["custom_id"], failed["response"], failed["error"]["code"]) == ("r5", None, "EMPTY_PROMPT")


def test_scores_of_continuations(
    inputs: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Drained in the middle and gone on with, like every other job."""
    changes = {"task__name": "score", "input__continuation_column": "prompt", "input__template": "{{ id }}:"}
    output = tmp_path / "out"
    config = configure(inputs, output, output__token_ids=True, **changes)
    assert job.run(config, World(), load_fake, identify_fake) == 0
    assert verify(str(output)).ok
    table = pa.concat_tables([pq.read_table(part) for part in sorted(output.glob("part-*.parquet"))])
    generated = ["logprob", "perplexity", "is_greedy", "prompt_tokens", "completion_tokens", "token_ids"]
    assert table.column_names == ["id", "prompt", *generated, "token_logprobs", "status", "error_code", "error"]
    for row in table.to_pylist():
        tokens = row["prompt"].encode()
        assert row["token_ids"] == list(tokens)
        assert (row["prompt_tokens"], row["completion_tokens"]) == (len(f"{row['id']}:"), len(tokens))
        assert row["logprob"] == pytest.approx(-sum(tokens) / 100, rel=1e-6)
        assert row["perplexity"] == pytest.approx(math.exp(sum(tokens) / 100 / len(tokens)), rel=1e-6)
        assert row["is_greedy"] is True
    with pytest.raises(JobError, match="task"):
        job.run(configure(inputs, output), World(), load_fake, identify_fake)


POOLS = {
    "embed": PoolSpec("mean", 5, activation="normalise"),
    "classify": PoolSpec("last", 2, "classes", "softmax", ("no", "yes")),
    "rerank": PoolSpec("last", 2, "tokens", "softmax", tokens=(3, 4)),
}


@pytest.mark.feature("job", "vectors, classes and relevance: crashes and resume as for every other job")
@pytest.mark.parametrize("task", POOLS)
def test_what_is_made_of_vectors(task: str, inputs: Path, tmp_path: Path) -> None:  # noqa: F811
    """The engine fails in the middle; the next attempt goes on from the journal."""
    pool, output = POOLS[task], tmp_path / "out"
    failures = iter([FakeEngine(pool=pool, fail_at_step=5)])
    changes: dict[str, Any] = {"task__name": task, "job__journal_seconds": 0.0}
    if task == "rerank":
        changes |= {"input__query_column": "prompt", "input__document_column": "prompt"}

    def load(*_: object, **given: Any) -> FakeEngine:
        assert given["pool"] == pool
        return next(failures, FakeEngine(pool=pool))

    def attempt(pool: PoolSpec = pool) -> int:
        return job.run(configure(inputs, output, **changes), World(), load, identify_fake, lambda _: pool)

    with pytest.raises(JobError, match="the device went away"):
        attempt()
    assert attempt() == 0
    assert verify(str(output)).ok
    table = pa.concat_tables([pq.read_table(part) for part in sorted(output.glob("part-*.parquet"))])
    assert table["status"].to_pylist() == ["ok"] * 87
    for row in table.to_pylist():
        text = row["prompt"] if task != "rerank" else f"{row['prompt']}|{row['prompt']}"
        vector = (np.resize(list(text.encode()), pool.width).astype(np.float32) / 256).tolist()
        if task == "classify":
            assert (row["scores"], row["label"]) == (vector, pool.labels[int(np.argmax(vector))])
        else:
            assert (row["embedding"] if task == "embed" else row["relevance"]) == (
                vector if task == "embed" else vector[0]
            )
        assert row["prompt_tokens"] == len(text)
    with pytest.raises(JobError, match=r"pool\.width"):
        attempt(replace(pool, width=pool.width + 1))
