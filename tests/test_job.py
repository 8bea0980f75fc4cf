"""One rank's job with a fake engine: complete runs, crashes at any point, bad rows, refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engine import POISON, FakeEngine, answer, identify_fake, load_fake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchinfer import job
from batchinfer.cluster.world import World
from batchinfer.config import MISSING, Config, from_dict, to_dict
from batchinfer.data.audit import verify
from batchinfer.data.prompts import row_seed
from batchinfer.engine import probe
from batchinfer.engine.roofline import Ceilings
from batchinfer.inquire import show_plan, show_status, show_verify
from batchinfer.types import ROW_BITS, Completion, EngineStats, ExitCode, JobError, Request, StepWork


def prompts(rows: int, offset: int = 0) -> list[str]:
    return [f"prompt {offset + i} {'x' * (i % 7)}" for i in range(rows)]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Two files of 50 and 37 rows."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, rows, offset in (("a.parquet", 50, 0), ("b.parquet", 37, 100)):
        table = pa.table({"id": list(range(offset, offset + rows)), "prompt": prompts(rows, offset)})
        pq.write_table(table, folder / name, row_group_size=20)
    return folder


def configure(inputs: Path, output: Path, **changes: Any) -> Config:
    """``changes`` are dotted keys with "__" for the dot."""
    values = to_dict(Config())
    given = {
        "model__path": "fake",
        "input__path": str(inputs),
        "output__path": str(output),
        "output__rows_per_chunk": 10,
        "engine__max_slots": 8,
        "sampling__max_tokens": 16,
        **changes,
    }
    for key, value in given.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    return from_dict(values)


def run(config: Config, load: Callable[..., FakeEngine] = load_fake) -> int:
    return job.run(config, World(), load, identify_fake)


def parts(output: Path) -> list[Path]:
    return sorted(output.glob("part-*.parquet"))


def rows_of(output: Path) -> list[dict[str, Any]]:
    return pa.concat_tables([pq.read_table(path) for path in parts(output)]).to_pylist()


def given_up(rows: list[dict[str, Any]], whole: list[dict[str, Any]]) -> int:
    """How many rows are errors because they were alone in an engine that crashed again; all others are those of
    ``whole``."""
    innocent = [(row, other) for row, other in zip(rows, whole, strict=True) if row["error_code"] != "ENGINE_CRASH"]
    assert all(row == other for row, other in innocent)
    return len(rows) - len(innocent)


def success(output: Path) -> dict[str, Any]:
    return json.loads((output / "_SUCCESS").read_text())


def never(*_: object, **__: object) -> FakeEngine:
    raise AssertionError("an engine was loaded for nothing")


class Computing(FakeEngine):
    """It says that its steps take a second each, and half of what one of a gigaflop and a gigabyte a second needs."""

    def stats(self) -> EngineStats:
        work = StepWork(steps=2, seconds=2.0, tokens=20, least_flops=0.5e9, least_bytes=1e9)
        return dataclasses.replace(super().stats(), steps=4, prefill=work, decode=work)


@pytest.mark.feature("job", "the summary of a run of a minute or more: share of the roofline, measured at its end")
@pytest.mark.parametrize("fits", [True, False])
def test_a_long_run_is_held_against_what_the_device_reaches(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    def reached(*_: object) -> Ceilings:
        if not fits:
            raise MemoryError
        return Ceilings(flops=1e9, bandwidth=1e9)

    monkeypatch.setattr(job, "WORTH_MEASURING", 0.0)
    monkeypatch.setattr(probe, "measure", reached)
    assert run(configure(inputs, tmp_path / "out"), lambda *_, **__: Computing()) == ExitCode.COMPLETE
    line = re.search("^device .*", capfd.readouterr().err, re.M)[0]
    assert line.count("2 steps of 1,000.0 ms, 10 tok/s") == 2
    assert line.count(", 50.0% of the roofline") == (2 if fits else 0)


def test_one_output_row_per_input_row_in_order(inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = configure(inputs, tmp_path / "out", sampling__seed=3, sampling__n=2, output__token_ids=True)
    assert run(config) == ExitCode.COMPLETE

    rows = rows_of(tmp_path / "out")
    source = [*prompts(50), *prompts(37, 100)]
    assert [row["prompt"] for row in rows] == source
    assert [row["id"] for row in rows] == [*range(50), *range(100, 137)]
    tokenizer = FakeEngine().tokenizer
    for index, row in enumerate(rows):
        identity = index if index < 50 else (1 << ROW_BITS) + index - 50
        ids = tokenizer.encode_batch([row["prompt"]])[0]
        expected = [answer(ids, row_seed(3, identity), sample, 16).tolist() for sample in range(2)]
        assert row["token_ids"] == expected
        assert row["generated_text"] == [bytes(tokens).decode() for tokens in expected]
        assert row["completion_tokens"] == [len(tokens) for tokens in expected]
        assert row["prompt_tokens"] == len(ids)
        assert row["status"] == "ok"
    counts = success(tmp_path / "out")["counts"]
    assert (counts["ok"], counts["error"]) == (87, 0)
    assert counts["completion_tokens"] == sum(sum(row["completion_tokens"]) for row in rows)
    assert verify(str(tmp_path / "out")).ok

    printed = capfd.readouterr().err
    assert "87 rows in 2 files, 87 to do in 9 chunks" in printed
    assert "rows       87: 87 ok, 0 failed" in printed
    assert re.search(r"^waited     no chunk [\d.]+%, reading [\d.]+%, tokenising .* backlog [\d.]+%$", printed, re.M)
    assert re.search(r"^worked     read [\d.]+%, tokenise [\d.]+%, commit [\d.]+%; engine: ", printed, re.M)
    folder = tmp_path / "out" / "_batchinfer" / "attempts"
    assert {path.name for path in folder.iterdir()} == {"000001.begin.json", "000001.end.json"}
    began, ended = (json.loads((folder / f"000001.{name}.json").read_text()) for name in ("begin", "end"))
    assert (began["done"], began["ranks"]) == ([0, 0], 1)
    assert from_dict(began["config"]) == config
    assert ended["exit_code"] == 0
    assert ended["this_attempt"]["rows"] == 87
    assert ended["job"] == counts


class PatientEngine(FakeEngine):
    """Computes nothing before it has rows of three chunks of 2, or has waited for them for 20 s: however slow the
    machine reads, it is not done with a chunk before the next one comes."""

    def __init__(self) -> None:
        super().__init__(slots=8)
        self._until = time.monotonic() + 20

    def step(self) -> list[Completion]:
        if self.most_open <= 4 and time.monotonic() < self._until:
            time.sleep(0.001)
            return []
        return super().step()


def test_rows_of_several_chunks_are_in_the_engine_together(inputs: Path, tmp_path: Path) -> None:
    """With 2 rows per chunk and 8 slots: no chunk's end drains the batch."""
    engines = []

    def load(*_: object, **__: object) -> FakeEngine:
        engines.append(PatientEngine())
        return engines[0]

    assert run(configure(inputs, tmp_path / "out", output__rows_per_chunk=2), load) == 0
    assert engines[0].most_open > 4
    assert engines[0].closed
    assert len(parts(tmp_path / "out")) == 44


class NotedEngine(FakeEngine):
    """Keeps the prompts in the order in which they came."""

    def __init__(self) -> None:
        super().__init__(slots=2)
        self.seen: list[bytes] = []

    def add(self, request: Request) -> None:
        self.seen.append(bytes(request.prompt.astype(np.uint8)))
        super().add(request)


@pytest.mark.feature("job", "rows that begin alike are computed together, over chunks; the output keeps its order")
def test_rows_that_begin_alike_go_in_together_and_come_out_where_they_were(tmp_path: Path) -> None:
    """Four beginnings in turn: in the order of the rows, another one each time."""
    table = pa.table({"prompt": [f"{'abcd'[i % 4] * 40} {i}" for i in range(120)]})
    pq.write_table(table, tmp_path / "in.parquet")
    results, turns = {}, {}
    for reorder in (False, True):
        engine, output = NotedEngine(), tmp_path / f"out{reorder}"
        config = configure(tmp_path / "in.parquet", output, engine__reorder=reorder, sampling__temperature=1.0)
        assert run(config, lambda *_, engine=engine, **__: engine) == 0
        results[reorder] = rows_of(output)
        turns[reorder] = sum(a[:1] != b[:1] for a, b in pairwise(engine.seen))
        assert len(engine.seen) == 120
    assert results[True] == results[False]
    assert turns[False] == 119
    assert turns[True] <= 4 * 12  # no more than one turn for each beginning in each chunk


def test_the_record_tells_what_the_engine_waited_for(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine chunks, each read in 20 ms, of which the engine computes none in a tenth of that."""
    read = job.ChunkReader.read

    def slow(self: Any, chunk: Any) -> Any:
        time.sleep(0.02)
        return read(self, chunk)

    monkeypatch.setattr(job.ChunkReader, "read", slow)
    assert run(configure(inputs, tmp_path / "out")) == 0
    record = tmp_path / "out" / "_batchinfer" / "attempts" / "000001.end.json"
    seconds = json.loads(record.read_text())["this_attempt"]["seconds"]
    assert seconds["read"] >= 9 * 0.02
    assert seconds["reading"] >= 9 * 0.01
    assert seconds["idle"] >= 0.02
    assert seconds["commit"] > 0


def test_every_rank_has_a_timeline_of_its_own(inputs: Path, tmp_path: Path) -> None:
    paths = []

    def load(model: Any, engine: Any, **_: object) -> FakeEngine:
        paths.append(engine.profile)
        return FakeEngine()

    assert run(configure(inputs, tmp_path / "out", engine__profile="/scratch/trace.json"), load) == 0
    assert paths == ["/scratch/trace.0.json"]


def test_a_finished_job_ends_at_once_without_an_engine(inputs: Path, tmp_path: Path) -> None:
    config = configure(inputs, tmp_path / "out")
    assert run(config) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert run(config, never) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_parts_without_success_need_no_engine_either(inputs: Path, tmp_path: Path) -> None:
    config = configure(inputs, tmp_path / "out")
    assert run(config) == 0
    (tmp_path / "out" / "_SUCCESS").unlink()
    assert run(config, never) == 0
    assert success(tmp_path / "out")["counts"]["ok"] == 87


@pytest.mark.feature("job", "a killed job goes on with the same command and ends with the same rows")
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(crashes=st.lists(st.integers(1, 60), min_size=1, max_size=3), slots=st.integers(1, 12))
def test_after_any_crashes_the_output_is_that_of_one_run(
    crashes: list[int], slots: int, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    output = tmp_path_factory.mktemp("crash") / "out"
    whole = inputs.parent / "whole"
    if not whole.exists():
        assert run(configure(inputs, whole)) == 0
    config = configure(inputs, output)
    for step in crashes:
        seen = {path.name: path.read_bytes() for path in parts(output)}
        with contextlib.suppress(JobError):  # a late crash never happens: the job is done before
            run(config, lambda *_, step=step, **__: FakeEngine(slots=slots, fail_at_step=step))
        if not (output / "_SUCCESS").exists():
            assert all(pq.read_table(path).num_rows <= 10 for path in parts(output))
        assert seen.items() <= {path.name: path.read_bytes() for path in parts(output)}.items()
    assert run(config) in (ExitCode.COMPLETE, ExitCode.TOO_MANY_ERRORS)
    assert given_up(rows_of(output), rows_of(whole)) < len(crashes)
    assert verify(str(output)).ok
    assert not list(output.glob(".part-*"))


def test_a_failed_commit_ends_the_job(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's error reaches the main thread, and the job ends instead of waiting for the chunk for ever."""

    def full(*_: object) -> str:
        raise JobError("no space left", ExitCode.IO)

    monkeypatch.setattr("batchinfer.job.Ledger.commit", full)
    with pytest.raises(JobError, match="no space left"):
        run(configure(inputs, tmp_path / "out"))
    assert parts(tmp_path / "out") == []
    assert not [t for t in threading.enumerate() if t.name.startswith(("feeder", "writer"))]


def test_a_file_that_changes_under_way_ends_the_job(inputs: Path, tmp_path: Path) -> None:
    """The feeder's error reaches the main thread."""

    def load(*_: object, **__: object) -> FakeEngine:
        pq.write_table(pa.table({"id": [1], "prompt": ["other"]}), inputs / "b.parquet")
        return FakeEngine()

    with pytest.raises(JobError, match=r"b\.parquet has changed since the job was planned"):
        run(configure(inputs, tmp_path / "out"), load)


def test_bad_rows_become_error_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts = ["fine", None, "", "x" * 300, f"a {POISON} here", "also fine"]
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "in.parquet")
    config = configure(tmp_path / "in.parquet", tmp_path / "out", output__rows_per_chunk=2)
    assert run(config) == ExitCode.TOO_MANY_ERRORS

    rows = rows_of(tmp_path / "out")
    assert [row["prompt"] for row in rows] == texts
    codes = [None, "NULL_PROMPT", "EMPTY_PROMPT", "PROMPT_TOO_LONG", "KV_CAPACITY", None]
    assert [row["error_code"] for row in rows] == codes
    assert [row["status"] for row in rows] == ["error" if code else "ok" for code in codes]
    assert all((row["generated_text"] is None) == bool(code) for row, code in zip(rows, codes, strict=True))
    printed = capfd.readouterr().err
    assert "6: 2 ok, 4 failed (EMPTY_PROMPT 1, KV_CAPACITY 1, NULL_PROMPT 1, PROMPT_TOO_LONG 1)" in printed
    assert "job.max_error_fraction=0.01" in printed

    # the rows are kept, and the limit is no part of the job's identity
    assert run(config, never) == ExitCode.TOO_MANY_ERRORS
    lenient = configure(
        tmp_path / "in.parquet", tmp_path / "out", output__rows_per_chunk=2, job__max_error_fraction=0.67
    )
    assert run(lenient, never) == ExitCode.COMPLETE


@pytest.mark.feature("job", "the neighbours of a bad row are what they would be without it")
def test_neighbours_of_a_bad_row_do_not_notice(tmp_path: Path) -> None:
    for name, third in (("good", "fine"), ("bad", None)):
        table = pa.table({"prompt": ["a", "b", third, "c", "d"]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        run(configure(tmp_path / f"{name}.parquet", tmp_path / f"out_{name}", sampling__temperature=1.0))
    good, bad = rows_of(tmp_path / "out_good"), rows_of(tmp_path / "out_bad")
    assert [row for i, row in enumerate(good) if i != 2] == [row for i, row in enumerate(bad) if i != 2]


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"sampling__max_tokens": 8}, "sampling.max_tokens"),
        ({"sampling__seed": 1}, "sampling.seed"),
        ({"sampling__stop": ["END"]}, "sampling.stop"),
        ({"model__path": "other"}, "model.weights"),
        ({"input__template": "{{ prompt }}!"}, "input.template"),
        ({"input__columns": ["id"]}, "input.columns"),
        ({"input__sampling_columns": {"max_tokens": "id"}}, "input.sampling_columns.max_tokens"),
        ({"output__prefix": "model_"}, "output.prefix"),
        ({"output__token_ids": True}, "output.token_ids"),
        ({"engine__max_model_len": 100}, "engine.max_model_len"),
    ],
)
def test_another_configuration_is_refused(change: dict[str, Any], shown: str, inputs: Path, tmp_path: Path) -> None:
    assert run(configure(inputs, tmp_path / "out")) == 0
    with pytest.raises(JobError, match=r"planned +\| now") as caught:
        run(configure(inputs, tmp_path / "out", **change), never)
    assert caught.value.exit_code == ExitCode.MISMATCH
    assert shown in str(caught.value)


def test_what_does_not_change_the_results_may_change(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configure(inputs, tmp_path / "out")
    with pytest.raises(JobError, match="went away"):
        run(config, lambda *_, **__: FakeEngine(fail_at_step=12))
    inputs = inputs.rename(inputs.parent / "moved")
    other = configure(
        inputs, tmp_path / "out", engine__max_slots=3, output__rows_per_chunk=7, job__progress_seconds=1.0
    )
    assert run(other) == 0
    assert "rows_per_chunk=7 has no effect" in capfd.readouterr().err
    assert verify(str(tmp_path / "out")).ok


def test_changed_input_is_refused(inputs: Path, tmp_path: Path) -> None:
    config = configure(inputs, tmp_path / "out")
    assert run(config) == 0
    pq.write_table(pa.table({"id": [1], "prompt": ["new"]}), inputs / "c.parquet")
    with pytest.raises(JobError, match=r"input file c\.parquet") as caught:
        run(config, never)
    assert caught.value.exit_code == ExitCode.MISMATCH


def refusal(config: Config) -> JobError:
    with pytest.raises(JobError) as caught:
        run(config, never)
    return caught.value


def test_bad_places_are_refused_before_any_work(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("important")
    error = refusal(configure(inputs, tmp_path / "mine"))
    assert error.exit_code == ExitCode.OUTPUT
    assert "thesis.txt" in str(error)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]

    assert refusal(configure(tmp_path / "nowhere", tmp_path / "out")).exit_code == ExitCode.INPUT
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), empty)
    error = refusal(configure(empty, tmp_path / "out"))
    assert error.exit_code == ExitCode.INPUT
    assert "no rows" in str(error)

    error = refusal(configure(inputs, tmp_path / "out", input__prompt_column="prompts"))
    assert error.exit_code == ExitCode.USAGE
    assert "input.prompt_column" in str(error)
    assert "id, prompt" in str(error)

    table = pa.table({"prompt": ["a"], "status": ["new"]})
    pq.write_table(table, tmp_path / "clash.parquet")
    error = refusal(configure(tmp_path / "clash.parquet", tmp_path / "out"))
    assert error.exit_code == ExitCode.USAGE
    assert "output.prefix" in str(error)
    assert not (tmp_path / "out").exists()


def test_a_template_is_compared_by_its_text_not_its_file(inputs: Path, tmp_path: Path) -> None:
    template = tmp_path / "ask.j2"
    template.write_text("Q: {{ prompt }}")
    config = configure(inputs, tmp_path / "out", input__template=str(template))
    assert run(config) == 0
    moved = template.rename(tmp_path / "moved.j2")
    assert run(configure(inputs, tmp_path / "out", input__template=str(moved)), never) == 0
    moved.write_text("Question: {{ prompt }}")
    config = configure(inputs, tmp_path / "out", input__template=str(moved))
    assert refusal(config).exit_code == ExitCode.MISMATCH


@pytest.mark.feature("commands", "plan: rows, chunks, columns and prompt, nothing written")
def test_plan_status_and_verify(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure(inputs, tmp_path / "out")
    assert show_plan(configure(inputs, tmp_path / "out", model__path=MISSING)) == 0
    shown = capsys.readouterr().out
    assert "2 files, 87 rows" in shown
    assert "input.prompt_column=prompt" in shown
    assert "id, prompt" in shown
    assert "9 of up to 10 rows" in shown
    assert not (tmp_path / "out").exists()

    with pytest.raises(JobError) as caught:
        show_status(config)
    assert caught.value.exit_code == ExitCode.OUTPUT
    with pytest.raises(JobError, match="went away"):
        run(config, lambda *_, **__: FakeEngine(fail_at_step=40))
    capsys.readouterr()
    assert show_status(config) == ExitCode.INCOMPLETE
    shown = capsys.readouterr().out
    assert "not complete" in shown
    assert "attempts   1: exit code 71" in shown
    assert re.search(r"speed      [\d,.]+ rows/s \(rank 0 [\d,.]+\); \d+:\d\d left at that speed", shown)
    assert show_verify(config) == ExitCode.INCOMPLETE
    assert run(config) == 0
    capsys.readouterr()
    assert show_status(config) == ExitCode.COMPLETE
    assert "rows       87 of 87, 0 failed" in capsys.readouterr().out
    assert show_verify(config) == ExitCode.COMPLETE

    victim = parts(tmp_path / "out")[3]
    data = bytearray(victim.read_bytes())
    data[len(data) // 3] ^= 1
    victim.write_bytes(data)
    capsys.readouterr()
    assert show_verify(config) == ExitCode.IO
    assert f"BAD {victim.name}" in capsys.readouterr().out


def test_an_interrupt_leaves_only_complete_parts(inputs: Path, tmp_path: Path) -> None:
    class Interrupted(FakeEngine):
        def step(self) -> list:
            if parts(tmp_path / "out"):
                raise KeyboardInterrupt
            time.sleep(0.001)
            return super().step()

    config = configure(inputs, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run(config, lambda *_, **__: Interrupted())
    assert 0 < len(parts(tmp_path / "out")) < 9
    assert show_verify(config) == ExitCode.INCOMPLETE
    assert run(config) == 0
