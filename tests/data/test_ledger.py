"""A job's state: open, commit, finish and resume, under faults and races."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.fakes import ByteTokenizer, SpiedOs, complete, rows_of, small_plan, write
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.config import InputConfig, OutputConfig
from batchinfer.data import commit, ledger
from batchinfer.data.audit import verify
from batchinfer.data.ledger import Ledger, open_job
from batchinfer.data.part import BadPart, decode_part, part_name
from batchinfer.data.plan import Plan, make_plan
from batchinfer.data.prompts import PromptBuilder
from batchinfer.data.reader import ChunkReader
from batchinfer.data.results import ResultOptions, count_results, result_table
from batchinfer.data.tables import list_inputs
from batchinfer.types import ExitCode, JobError, SamplingParams


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return small_plan(tmp_path / "input")  # 10 rows, chunks of 3, 3 and 4


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def refusal(action: Callable[[], Any], code: int) -> str:
    with pytest.raises(JobError) as caught:
        action()
    assert caught.value.exit_code == code, caught.value
    return str(caught.value)


def run(job: Ledger) -> dict[str, Any]:
    for chunk in job.missing():
        assert job.commit(chunk, rows_of(chunk), {"counts": {"ok": chunk.rows}}) == "won"
    return job.finish({"attempt": 1})


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_whole_job(plan: Plan, out: Path):
    job = open_job(str(out), plan)
    assert (job.missing(), job.success()) == (list(plan.chunks), None)
    record = run(job)
    assert job.missing() == []
    assert job.success() == record
    assert (record["plan"], record["rows"], record["counts"], record["run"]) == (
        plan.id,
        10,
        {"ok": 10},
        {"attempt": 1},
    )
    parts = [f"part-00000{i}.parquet" for i in range(3)]
    assert [part["name"] for part in record["parts"]] == parts
    assert [part["bytes"] for part in record["parts"]] == [(out / name).stat().st_size for name in parts]
    assert names(out) == ["_SUCCESS", "_batchinfer", *parts]
    assert names(out / "_batchinfer") == ["plan.json"]
    assert pq.read_table(out, columns=["row"])["row"].to_pylist() == list(range(10))
    assert verify(str(out)).ok


def test_the_same_command_again_finds_what_is_done(plan: Plan, out: Path):
    first = open_job(str(out), plan)
    first.commit(plan.chunks[1], rows_of(plan.chunks[1]))
    before = (out / "part-000001.parquet").read_bytes()
    again = open_job(str(out), plan)
    assert again.plan == plan
    assert [chunk.index for chunk in again.missing()] == [0, 2]
    run(again)
    assert (out / "part-000001.parquet").read_bytes() == before


def test_other_ranks_attach(plan: Plan, out: Path, tmp_path: Path):
    assert "is no output folder of batchinfer" in refusal(lambda: Ledger.attach(str(out)), ExitCode.OUTPUT)
    open_job(str(out), plan)
    before = names(out / "_batchinfer")
    other = Ledger.attach(str(out))
    assert other.plan == plan
    assert other.plan.files[0].root == str(tmp_path / "input")
    assert Ledger.attach(str(out), "/elsewhere").plan.files[0].full_path == "/elsewhere/input.parquet"
    assert names(out / "_batchinfer") == before
    assert other.commit(plan.chunks[0], rows_of(plan.chunks[0])) == "won"


def test_the_input_may_have_moved(plan: Plan, out: Path, tmp_path: Path):
    open_job(str(out), plan)
    (tmp_path / "input").rename(tmp_path / "moved")
    moved = make_plan(list_inputs(str(tmp_path / "moved" / "input.parquet")), 4, plan.fingerprint)
    assert open_job(str(out), moved).plan.files[0].root == str(tmp_path / "moved")


def test_a_second_commit_loses(plan: Plan, out: Path):
    job, zombie = open_job(str(out), plan), Ledger.attach(str(out))
    chunk = plan.chunks[0]
    assert job.commit(chunk, rows_of(chunk)) == "won"
    before = (out / part_name(chunk)).read_bytes()
    assert zombie.commit(chunk, rows_of(chunk)) == "lost"
    assert zombie.notices == []
    other = rows_of(chunk).set_column(1, "generated_text", pa.array(["other"] * chunk.rows))
    assert zombie.commit(chunk, other) == "lost"
    assert len(zombie.notices) == 1
    assert "with other values" in zombie.notices[0]
    assert (out / part_name(chunk)).read_bytes() == before
    assert [name for name in names(out) if name.startswith(".")] == []


def test_the_rows_must_be_those_of_the_chunk(plan: Plan, out: Path):
    with pytest.raises(ValueError, match="2 rows do not make"):
        open_job(str(out), plan).commit(plan.chunks[0], rows_of(plan.chunks[0]).slice(1))


@pytest.mark.feature("job", "other input, model, template or sampling is refused with a table field, planned, now")
def test_another_plan_is_refused_with_a_table(plan: Plan, out: Path, tmp_path: Path):
    run(open_job(str(out), plan))
    other = replace(plan, fingerprint={"model": {"path": "n"}})
    text = refusal(lambda: open_job(str(out), other), ExitCode.MISMATCH)
    assert "field      | planned | now" in text
    assert 'model.path | "m"     | "n"' in text
    assert "new output.path, or restore the planned values" in text
    edited = small_plan(tmp_path / "other", rows=11)
    assert "input file input.parquet" in refusal(lambda: open_job(str(out), edited), ExitCode.MISMATCH)


def test_other_chunk_sizes_have_no_effect(plan: Plan, out: Path):
    open_job(str(out), plan)
    job = open_job(str(out), make_plan(plan.files, 2, plan.fingerprint))
    assert job.plan.chunks == plan.chunks
    assert job.notices == ["output.rows_per_chunk=2 has no effect: the job was planned with 4"]
    run(job)


def test_folders_that_are_not_ours(plan: Plan, out: Path):
    write(out / "part-000000.parquet", {"x": [1]})
    text = refusal(lambda: open_job(str(out), plan), ExitCode.OUTPUT)
    assert "holds other files (part-000000.parquet): give a new or empty folder" in text
    assert names(out) == ["part-000000.parquet"]


def test_an_output_path_that_is_a_file(plan: Plan, out: Path):
    out.write_text("x")
    assert str(out) in refusal(lambda: open_job(str(out), plan), ExitCode.OUTPUT)
    assert str(out) in refusal(lambda: open_job(str(out / "below"), plan), ExitCode.OUTPUT)


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b'{"schema_version": 2}'])
def test_a_plan_file_that_cannot_be_used(plan: Plan, out: Path, content: bytes):
    open_job(str(out), plan)
    (out / "_batchinfer" / "plan.json").write_bytes(content)
    assert "plan.json cannot be used" in refusal(lambda: open_job(str(out), plan), ExitCode.OUTPUT)


def test_a_start_that_died_before_its_plan(plan: Plan, out: Path):
    (out / "_batchinfer").mkdir(parents=True)
    (out / "_batchinfer" / ".plan.json.0.tmp").write_text("half a pl")
    assert open_job(str(out), plan).missing() == list(plan.chunks)


def test_the_loser_of_a_race_for_the_plan_compares(plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch):
    """Another job publishes its plan between our look and our own attempt."""
    other = replace(plan, fingerprint={"model": {"path": "other"}})
    publish_bytes = ledger.publish_bytes

    def slow(folder: str, name: str, data: bytes) -> bool:
        assert publish_bytes(folder, name, other.to_json())
        return publish_bytes(folder, name, data)

    monkeypatch.setattr(ledger, "publish_bytes", slow)
    assert "model.path" in refusal(lambda: open_job(str(out), plan), ExitCode.MISMATCH)


def test_finish_needs_every_part(plan: Plan, out: Path):
    job = open_job(str(out), plan)
    job.commit(plan.chunks[1], rows_of(plan.chunks[1]))
    text = refusal(job.finish, ExitCode.INCOMPLETE)
    assert "2 of 3 parts are missing" in text
    assert "part-000000.parquet, part-000002.parquet" in text
    assert job.success() is None


def test_an_output_folder_that_went_away(plan: Plan, out: Path):
    job = open_job(str(out), plan)
    shutil.rmtree(out)
    assert str(out) in refusal(job.missing, ExitCode.IO)
    assert str(out) in refusal(lambda: job.commit(plan.chunks[0], rows_of(plan.chunks[0])), ExitCode.IO)


def test_finish_opens_every_part(plan: Plan, out: Path):
    job = open_job(str(out), plan)
    for chunk in plan.chunks:
        job.commit(chunk, rows_of(chunk))
    (out / "part-000001.parquet").write_bytes((out / "part-000000.parquet").read_bytes())
    assert "part-000001.parquet is damaged: it is chunk 0" in refusal(job.finish, ExitCode.IO)
    (out / "part-000001.parquet").write_bytes(b"")
    assert "part-000001.parquet is damaged" in refusal(job.finish, ExitCode.IO)
    assert job.success() is None


def test_finish_twice_and_what_it_clears_away(plan: Plan, out: Path):
    job = open_job(str(out), plan)
    (out / ".part-000002.dead-0.tmp").write_bytes(b"half")
    (out / ".keep").write_bytes(b"the user's")
    record = run(job)
    assert ".part-000002.dead-0.tmp" not in names(out)
    assert ".keep" in names(out)
    assert Ledger.attach(str(out)).finish({"attempt": 2}) == record


def test_a_success_file_of_another_plan(plan: Plan, out: Path):
    run(open_job(str(out), plan))
    (out / "_SUCCESS").write_text(json.dumps({"plan": "f" * 64}))
    assert "belongs to plan ffffffffffff" in refusal(open_job(str(out), plan).success, ExitCode.MISMATCH)
    (out / "_SUCCESS").write_text("")
    assert "_SUCCESS cannot be read" in refusal(open_job(str(out), plan).success, ExitCode.OUTPUT)


@pytest.mark.feature("job", "no space, quota and I/O errors end the job with 73 or 74 and leave nothing half")
@pytest.mark.parametrize(
    ("code", "tries", "expected"),
    [
        (errno.ENOSPC, 1, "No space left on device"),
        (errno.EDQUOT, 1, "a quota may be used up"),
        (errno.EIO, 3, "Input/output error"),
        (errno.ESTALE, 3, "Stale file handle"),
    ],
)
def test_no_space_and_io_errors(
    plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch, code: int, tries: int, expected: str
):
    job = open_job(str(out), plan)

    def interfere(number: int, name: str, when: str) -> None:
        if (name, when) == ("fsync", "before"):
            raise OSError(code, os.strerror(code))

    spied = SpiedOs(interfere)
    monkeypatch.setattr(commit, "os", spied)
    text = refusal(lambda: job.commit(plan.chunks[0], rows_of(plan.chunks[0])), ExitCode.IO)
    assert expected in text
    assert str(out) in text
    assert "GiB and" in text
    temporaries = [path for name, path in spied.calls if name == "open"]
    assert len(temporaries) == len(set(temporaries)) == tries  # each try has a file of its own
    assert names(out) == ["_batchinfer"]


def test_a_folder_that_became_read_only(plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch):
    job = open_job(str(out), plan)

    def interfere(number: int, name: str, when: str) -> None:
        if name == "open":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(commit, "os", SpiedOs(interfere))
    text = refusal(lambda: job.commit(plan.chunks[0], rows_of(plan.chunks[0])), ExitCode.OUTPUT)
    assert "Read-only file system" in text


@pytest.mark.parametrize("bad_reads", [1, 2, 3])
def test_what_is_not_read_back_as_it_was_written_is_not_published(
    plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch, bad_reads: int
):
    job = open_job(str(out), plan)
    left = iter([True] * bad_reads)
    read_bytes = ledger.read_bytes

    def unreliable(path: str) -> bytes:
        data = bytearray(read_bytes(path))
        if next(left, False):
            data[len(data) // 2] ^= 4
        return bytes(data)

    monkeypatch.setattr(ledger, "read_bytes", unreliable)
    chunk = plan.chunks[0]
    if bad_reads < 3:
        assert job.commit(chunk, rows_of(chunk)) == "won"
        assert decode_part((out / part_name(chunk)).read_bytes())[1].equals(rows_of(chunk))
    else:
        assert "read back" in refusal(lambda: job.commit(chunk, rows_of(chunk)), ExitCode.IO)
        assert names(out) == ["_batchinfer"]


def commit_or_fail(job: Ledger) -> str:
    try:
        return job.commit(job.plan.chunks[0], rows_of(job.plan.chunks[0]))
    except JobError as error:
        return f"error {error.exit_code}"


def outcome_is_sound(out: Path, plan: Plan) -> bool:
    """What there is of chunk 0 is whole; whether it is there."""
    path = out / part_name(plan.chunks[0])
    if path.exists():
        assert decode_part(path.read_bytes())[1].equals(rows_of(plan.chunks[0]))
    return path.exists()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ESTALE])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_at_every_call_of_a_commit(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, when: str
):
    """Each call fails once, not done or done with its reply lost: an error or a part, and the next run ends the job."""
    chunk = plan.chunks[0]
    for at in itertools.count():
        out = tmp_path / f"out-{at}"
        job = open_job(str(out), plan)
        hit = []

        def interfere(number: int, name: str, now: str, at: int = at, hit: list[str] = hit) -> None:
            if (number, now) == (at, when):
                hit.append(name)
                raise OSError(code, os.strerror(code))

        monkeypatch.setattr(commit, "os", SpiedOs(interfere))
        result = commit_or_fail(job)
        monkeypatch.undo()
        there = outcome_is_sound(out, plan)
        assert there or result == f"error {ExitCode.IO}"
        assert result != "lost"
        assert Ledger.attach(str(out)).commit(chunk, rows_of(chunk)) == ("lost" if there else "won")
        assert outcome_is_sound(out, plan)
        if not hit:
            break
    assert at >= 11


@pytest.mark.feature("job", "killed at any system call, or many processes racing: no row lost, none twice")
def test_killed_at_every_call_of_a_job(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SIGKILL before and after each call of open, commit and finish; then the same again, which ends the job."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a killed process loses nothing that it wrote; saves seconds
    plan = make_plan(plan.files, 10, plan.fingerprint)  # one chunk
    for at in itertools.count():
        out = tmp_path / f"out-{at}"
        child = multiprocessing.get_context("fork").Process(target=run_and_die, args=(str(out), plan, at))
        child.start()
        child.join(60)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        done = out.exists() and outcome_is_sound(out, plan)
        finished = (out / "_SUCCESS").exists()
        assert done or not finished
        job = open_job(str(out), plan)
        assert len(job.missing()) == (not done)
        assert run(job)["rows"] == 10
        assert outcome_is_sound(out, plan)
    assert at > 60  # three files published, with eleven calls each


def run_and_die(out: str, plan: Plan, at: int) -> None:
    events = itertools.count()

    def interfere(number: int, name: str, when: str) -> None:
        if next(events) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    ledger.probe = lambda folder: "link"  # its files are its own, and test_commit.py looks at it
    commit.os = SpiedOs(interfere)
    run(open_job(out, plan))


@pytest.mark.feature("job", "killed at any system call, or many processes racing: no row lost, none twice")
def test_jobs_that_race_for_everything(tmp_path: Path):
    """Four processes start the same job at once and compute all of it: one plan, one winner for each chunk."""
    plan = small_plan(tmp_path / "input", rows=60)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()

    def compute(me: int) -> None:
        barrier.wait(30)
        job = open_job(str(tmp_path / "out"), plan)
        order = plan.chunks[me:] + plan.chunks[:me]
        results.put([chunk.index for chunk in order if job.commit(chunk, rows_of(chunk)) == "won"])
        job.finish()

    processes = [context.Process(target=compute, args=(me,)) for me in range(4)]
    for process in processes:
        process.start()
    won = [index for _ in processes for index in results.get(timeout=60)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(won) == [chunk.index for chunk in plan.chunks]
    report = verify(str(tmp_path / "out"))
    assert report.ok
    assert report.complete


@settings(max_examples=10)
@given(
    st.lists(st.lists(st.none() | st.text(max_size=6), max_size=12), min_size=1, max_size=3).filter(any),
    st.integers(1, 5),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
    st.integers(1, 2),
)
def test_rows_through_chunks_to_parts_and_back(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[list[str | None]],
    rows_per_group: int,
    rows_per_chunk: int,
    order: Any,
    samples: int,
):
    """Whatever the files, chunks and order of work: the parts put together are the input with its answers."""
    folder = tmp_path_factory.mktemp("job")
    for i, rows in enumerate(texts):
        columns = {
            "id": pa.array([f"{i}/{j}" for j in range(len(rows))], pa.string()),
            "prompt": pa.array(rows, pa.string()),
        }
        write(folder / "in" / f"{i}.parquet", columns, row_group_size=rows_per_group)
    config, sampling = InputConfig(), SamplingParams(n=samples)
    options = ResultOptions.of(config, OutputConfig(token_ids=True), sampling)
    plan = make_plan(list_inputs(str(folder / "in")), rows_per_chunk, {})
    job = open_job(str(folder / "out"), plan)
    builder = PromptBuilder(config, sampling, ByteTokenizer(), 100, 0)
    with ChunkReader(plan.files) as reader:
        for chunk in order.sample(plan.chunks, len(plan.chunks)):
            table = reader.read(chunk)
            answers = [complete(entry, samples) for entry in builder.build(table, chunk)]
            counts = {"counts": count_results(answers)}
            assert job.commit(chunk, result_table(table, answers, options), counts) == "won"
    record = job.finish()
    parts = [pq.read_table(folder / "out" / part["name"]) for part in record["parts"]]
    assert len({part.schema.remove_metadata().to_string() for part in parts}) == 1
    rows = pa.concat_tables(parts).to_pylist()
    assert [row["id"] for row in rows] == [f"{i}/{j}" for i, group in enumerate(texts) for j in range(len(group))]
    assert [row["prompt"] for row in rows] == [text for group in texts for text in group]
    for row in rows:
        backwards = row["prompt"] and row["prompt"].encode()[::-1].hex()
        answers = [f"{i}:{backwards}" for i in range(samples)] if backwards else [None]
        assert row["generated_text"] == (answers[0] if samples == 1 or not backwards else answers)
        assert row["status"] == ("ok" if backwards else "error")
    assert record["counts"]["ok"] + record["counts"]["error"] == len(rows)
    assert verify(str(folder / "out")).ok


def test_bad_part_is_no_os_error():
    """_write tells the two apart: one is a fault of the disk's contents, the other of a call."""
    assert not issubclass(BadPart, OSError)
