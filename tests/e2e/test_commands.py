"""The commands as a user gives them, with the real model: rank counts, a killed job, bench and doctor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchinfer

pytestmark = [pytest.mark.model, pytest.mark.slow]

MPIEXEC = next((str(p) for p in [Path(sys.executable).with_name("mpiexec")] if p.exists()), shutil.which("mpiexec"))
ROWS = 24


def command(*arguments: str, ranks: int = 0) -> list[str]:
    start = [str(MPIEXEC), "-n", str(ranks)] if ranks else []
    return [*start, sys.executable, "-m", "batchinfer", *arguments]


def environment() -> dict[str, str]:
    """Without a launcher's variables, and with the package that these tests import, wherever it lies."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PMI", "OMPI_", "SLURM_", "MPI_"))}
    return clean | {"PYTHONPATH": str(Path(batchinfer.__file__).parent.parent)}


def call(where: Path, *arguments: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    run = {"cwd": where, "env": environment(), "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command(*arguments, ranks=ranks), **run)


@pytest.fixture(scope="module")
def settings(smollm_gguf: Path, prompts_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A job of 24 rows in six chunks, sampled at temperature 1, with one row that can't be answered."""
    path = tmp_path_factory.mktemp("in") / "prompts.parquet"
    table = pq.read_table(prompts_path).slice(0, ROWS)
    column = table.column_names.index("messages")
    messages = table["messages"].to_pylist()
    messages[5] = None
    pq.write_table(table.set_column(column, "messages", [messages]).cast(table.schema), path)
    return [
        f"model.path={smollm_gguf}",
        f"input.path={path}",
        "input.messages_column=messages",
        "output.rows_per_chunk=4",
        "output.token_ids=true",
        "sampling.temperature=1",
        "sampling.max_tokens=10",
        "job.max_error_fraction=0.1",
        "engine.kv_cache_gb=0.2",
    ]


def rows(output: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(output.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of a plain run."""
    output = tmp_path_factory.mktemp("whole") / "out"
    done = call(output.parent, "run", *settings, f"output.path={output}")
    assert done.returncode == 0, done.stderr
    assert (output / "_SUCCESS").exists()
    return rows(output)


@pytest.mark.feature("job", "one output row per input row, in input order, whatever happens to a row")
def test_every_row_has_its_result(whole: list[dict[str, Any]]) -> None:
    assert [row["id"] for row in whole] == list(range(ROWS))
    assert [row["status"] for row in whole] == ["error" if i == 5 else "ok" for i in range(ROWS)]
    assert whole[5]["error_code"] == "NULL_PROMPT"
    good = [row for row in whole if row["status"] == "ok"]
    assert all(0 < row["completion_tokens"] == len(row["token_ids"]) <= 10 for row in good)
    assert all(row["generated_text"].strip() for row in good)


@pytest.mark.mpi
@pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec: pip install 'batchinfer[mpi]'")
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.feature("job", "same row, same tokens on any number of MPI ranks, sampled ones too")
def test_the_rows_do_not_depend_on_the_number_of_ranks(
    ranks: int, settings: list[str], whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    done = call(tmp_path, "run", *settings, "output.path=out", ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "out") == whole


@pytest.mark.feature("job", "a killed job goes on with the same command and ends with the same rows")
def test_a_killed_job_goes_on_where_it_was(settings: list[str], whole: list[dict[str, Any]], tmp_path: Path) -> None:
    arguments = ["run", *settings, "output.path=out", "engine.max_slots=2"]
    job = subprocess.Popen(command(*arguments), cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("out/part-*.parquet"))) < 2:
        assert job.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    job.kill()
    job.wait()
    before = {path: path.read_bytes() for path in tmp_path.glob("out/part-*.parquet")}
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert call(tmp_path, "status", "output.path=out").returncode == 75
    done = call(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "out") == whole
    assert {path: path.read_bytes() for path in before} == before
    assert call(tmp_path, "verify", "output.path=out").returncode == 0
    again = call(tmp_path, *arguments)
    assert again.returncode == 0
    assert "nothing to do" in again.stderr


@pytest.mark.feature("commands", "bench: the engine alone, as JSON lines")
def test_bench_prints_a_line_of_json(settings: list[str], tmp_path: Path) -> None:
    done = call(tmp_path, "bench", *settings, "bench.rows=4", "sampling.ignore_eos=true")
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert line["requests"] == 4
    assert line["output_tokens"] == 40
    assert line["output_tokens_per_s"] == pytest.approx(40 / line["seconds"], rel=0.01)


@pytest.mark.feature("commands", "doctor: what was built and what the node has, for people and as JSON")
def test_doctor_looks_at_this_node(tmp_path: Path) -> None:
    """Whether it is fit depends on the machine: one with GPUs and a build for the CPU is not."""
    done = call(tmp_path, "doctor", ".", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["fit"] else 69), done.stdout + done.stderr
    assert report["build"]["error"] == report["torch"]["error"] == ""
    assert report["build"]["isa"] in report["build"]["usable"]
    assert report["packages"]["torch"] == report["torch"]["version"]
    assert report["file_systems"][0]["path"] == "."
    assert [finding for finding in report["findings"] if finding["subject"] in ("packages", "build")] == []
    text = call(tmp_path, "doctor")
    assert text.returncode == done.returncode
    assert report["build"]["compiler"] in text.stdout


@pytest.mark.feature("commands", "texts that follow a JSON schema for the job, or a list of choices for each row")
def test_constrained_texts(settings: list[str], tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"topic": {"enum": ["food", "travel", "other"]}, "stars": {"type": "integer", "maximum": 5}},
        "required": ["topic", "stars"],
        "additionalProperties": False,
    }
    (tmp_path / "form.json").write_text(json.dumps(schema))
    given = [*settings, f"output.path={tmp_path / 'out'}", "sampling.max_tokens=40"]
    done = call(tmp_path, "run", *given, "sampling.json_schema=form.json")
    assert done.returncode == 0, done.stderr
    answers = [row for row in rows(tmp_path / "out") if row["status"] == "ok"]
    assert len(answers) == ROWS - 1
    for row in answers:
        if row["finish_reason"] == "stop":
            value = json.loads(row["generated_text"])
            assert value["topic"] in schema["properties"]["topic"]["enum"]
            assert isinstance(value["stars"], int)
    assert sum(row["finish_reason"] == "stop" for row in answers) > ROWS // 2

    source = Path(next(s for s in settings if s.startswith("input.path=")).partition("=")[2])
    table = pq.read_table(source)
    choices = pa.array([["red", "green"] if i % 2 else ["one", "two", "three"] for i in range(ROWS)])
    pq.write_table(table.append_column("answers", choices), tmp_path / "rows.parquet")
    rest = [s for s in settings if not s.startswith("input.path=")]
    done = call(
        tmp_path,
        "run",
        *rest,
        "input.path=rows.parquet",
        f"output.path={tmp_path / 'each'}",
        "input.sampling_columns={choice: answers}",
    )
    assert done.returncode == 0, done.stderr
    for row in rows(tmp_path / "each"):
        assert row["status"] == "error" or row["generated_text"] in row["answers"]

    done = call(tmp_path, "run", *given, "sampling.regex=(", f"output.path={tmp_path / 'bad'}")
    assert done.returncode == 64
    assert "sampling.regex can't be used" in done.stderr
    assert not (tmp_path / "bad").exists()


@pytest.mark.feature("commands", "drafts by prompt lookup: the rows of a job without them")
def test_drafts_change_no_row(settings: list[str], whole: list[dict[str, Any]], tmp_path: Path) -> None:
    done = call(tmp_path, "run", *settings, "output.path=out", "engine.lookup=4")
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "out") == whole
    assert "tokens a sample and step" in done.stderr


@pytest.mark.feature("sampling", "logit_bias, best_of, prompt_logprobs and more, per job and from columns")
def test_settings_of_the_job_and_of_rows(settings: list[str], tmp_path: Path) -> None:
    source = Path(next(s for s in settings if s.startswith("input.path=")).partition("=")[2])
    table = pq.read_table(source)
    pushed = [[(28, 100.0)] if i % 3 == 0 else None for i in range(ROWS)]
    table = table.append_column("push", pa.array(pushed, pa.map_(pa.int32(), pa.float32())))
    table = table.append_column("keep", pa.array([4 if i % 2 else None for i in range(ROWS)], pa.int32()))
    pq.write_table(table, tmp_path / "rows.parquet")
    rest = [s for s in settings if not s.startswith("input.path=")]
    columns = "input.sampling_columns={logit_bias: push, truncate_prompt_tokens: keep}"
    more = ["sampling.best_of=3", "sampling.prompt_logprobs=2", "output.reasoning=auto"]
    done = call(tmp_path, "run", *rest, "input.path=rows.parquet", "output.path=out", columns, *more)
    assert done.returncode == 0, done.stderr
    for i, row in enumerate(rows(tmp_path / "out")):
        if row["status"] == "error":
            continue
        assert row["reasoning"] is None  # the model has no marks for thoughts
        assert (row["prompt_tokens"] == 4) == bool(i % 2)
        assert len(row["prompt_logprobs"]["chosen"]) == row["prompt_tokens"] - 1
        assert all(len(top) == 2 for top in row["prompt_logprobs"]["top"])
        assert (set(row["token_ids"]) == {28}) == (i % 3 == 0)
    bad = call(tmp_path, "run", *settings, "output.path=bad", "sampling.logit_bias={28: 101}")
    assert bad.returncode == 64
    assert "sampling.logit_bias[28]=101.0 is not allowed: a bias must lie in [-100, 100]" in bad.stderr
