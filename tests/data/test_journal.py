"""The journal: what was written comes back, damage costs only the records it hits, and nothing wrong is believed."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.data import journal as subject
from batchinfer.data.journal import Journal, clear_journals, decode, encode, journal_files, recall, resume
from batchinfer.types import Chunk, Completion, ErrorCode, Logprobs, Request, RowError, Sample, SamplingParams

PLAN = "a" * 64
CHUNK = Chunk(index=7, file=2, start=100, rows=50)


def sample(*tokens: int, reason: str = "stop", logprobs: int | None = None) -> Sample:
    ids = np.array(tokens, np.int32)
    if logprobs is None:
        return Sample(ids, "text é" if reason else "", reason)
    grid = np.arange(len(ids) * logprobs).reshape(len(ids), logprobs)
    return Sample(
        ids, "t", reason, Logprobs(-ids.astype(np.float32), grid.astype(np.int32), -grid.astype(np.float32)), "r"
    )


def completion(offset: int, *samples: Sample) -> Completion:
    return Completion(CHUNK.row_id(offset), prompt_tokens=9, samples=samples)


def same(one: Completion, other: Completion) -> bool:
    def plain(c: Completion) -> object:
        def arrays(lp: Logprobs | None) -> object:
            return None if lp is None else (lp.chosen.tolist(), lp.top_ids.tolist(), lp.top.tolist(), lp.top.shape)

        def of(s: Sample) -> object:
            vector = None if s.vector is None else (s.vector.tolist(), s.vector.dtype)
            texts = s.text, s.finish_reason, s.reasoning
            return s.token_ids.tolist(), s.token_ids.dtype, texts, arrays(s.logprobs), vector

        return c.id, c.prompt_tokens, c.error, [of(s) for s in c.samples], arrays(c.prompt_logprobs)

    return plain(one) == plain(other)


RECORDS = [
    completion(0, sample(1, 2, 3)),
    completion(3, sample(4, reason=""), sample(5, 6, reason="length")),
    completion(5, Sample(np.zeros(0, np.int32), "", "pooled", vector=np.array([0.25, -1e-30], np.float32))),
    completion(49, sample(7, 8, logprobs=3), sample(9, logprobs=0), sample(logprobs=0, reason="")),
    replace(completion(20, sample(1)), prompt_logprobs=sample(5, 6, 7, logprobs=2).logprobs),
    replace(completion(21, sample(1)), prompt_logprobs=sample(logprobs=0).logprobs),
]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(str(tmp_path), PLAN)


def written(tmp_path: Path) -> bytes:
    """The bytes of the only journal."""
    (path,) = journal_files(str(tmp_path))[CHUNK.index]
    return Path(path).read_bytes()


def recalled(tmp_path: Path, plan: str = PLAN, chunk: Chunk = CHUNK) -> dict[int, Completion]:
    return recall(journal_files(str(tmp_path)).get(chunk.index, []), plan, chunk)


def put(journal: Journal, *records: Completion) -> None:
    for record in records:
        journal.add(CHUNK, record)
    journal.write(journal.take())


@pytest.mark.feature("job", "finished rows of open chunks, and begun ones at a drain, are journaled and go on later")
def test_there_and_back(journal: Journal, tmp_path: Path) -> None:
    put(journal, RECORDS[0])
    put(journal)
    put(journal, *RECORDS[1:])
    got = recalled(tmp_path)
    assert list(got) == [record.id for record in RECORDS]
    assert all(same(got[record.id], record) for record in RECORDS)
    assert [got[record.id].finished for record in RECORDS] == [True, False, True, False, True, True]


def test_only_what_is_new_and_needed_is_taken(journal: Journal) -> None:
    other = replace(CHUNK, index=8)
    journal.add(CHUNK, RECORDS[0])
    journal.add(other, RECORDS[1])
    journal.add(CHUNK, Completion(CHUNK.row_id(1), 3, error=RowError(ErrorCode.KV_CAPACITY, "with this cache")))
    journal.drop(other)
    assert journal.take() == {CHUNK.index: [RECORDS[0]]}
    assert journal.take() == {}


def test_other_plans_and_other_chunks_are_passed_over(journal: Journal, tmp_path: Path) -> None:
    put(journal, *RECORDS)
    assert recalled(tmp_path, plan="b" * 64) == {}
    data = written(tmp_path)
    assert list(decode(data, PLAN, 8)) == []
    outside = replace(CHUNK, rows=10)
    assert set(recalled(tmp_path, chunk=outside)) == {record.id for record in RECORDS[:3]}


def test_the_fullest_record_is_taken(tmp_path: Path) -> None:
    begun, longer, finished = sample(1, reason=""), sample(1, 2, reason=""), sample(1, 2, 3)
    one, other = Journal(str(tmp_path), PLAN), Journal(str(tmp_path), PLAN)
    put(one, completion(0, finished), completion(1, longer), completion(2, begun, finished))
    put(other, completion(0, begun), completion(1, begun), completion(2, longer, longer))
    got = recalled(tmp_path)
    assert len(journal_files(str(tmp_path))[CHUNK.index]) == 2
    assert same(got[CHUNK.row_id(0)], completion(0, finished))
    assert same(got[CHUNK.row_id(1)], completion(1, longer))
    assert same(got[CHUNK.row_id(2)], completion(2, begun, finished))


@settings(max_examples=150)
@given(data=st.data())
def test_a_cut_or_flipped_file_gives_whole_records_or_none(data: st.DataObject) -> None:
    frames = [encode(PLAN, CHUNK.index, [record]) for record in RECORDS]
    whole = b"".join(frames)
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(whole) - 1))
        damaged = whole[:cut]
        expected = [r for r, end in zip(RECORDS, np.cumsum([len(f) for f in frames]), strict=True) if end <= cut]
    else:
        place = data.draw(st.integers(0, len(whole) - 1))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
        ends = np.cumsum([len(f) for f in frames])
        hit = int(np.searchsorted(ends, place, side="right"))
        in_header = place - (ends[hit] - len(frames[hit])) < subject.CHECKED.size
        expected = RECORDS[:hit] if in_header else [r for i, r in enumerate(RECORDS) if i != hit]
    got = list(decode(bytes(damaged), PLAN, CHUNK.index))
    assert len(got) == len(expected)
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_after_a_failed_append_a_new_file_is_begun(
    call: str, journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes later may not lie behind a torn frame, and no descriptor is synced twice."""
    put(journal, RECORDS[0])
    real_write, fsyncs = os.write, 0

    def write(fd: int, data: memoryview) -> int:
        if call == "write" and len(data) < 100:
            raise OSError(errno.ENOSPC, "no space")
        return real_write(fd, data[: max(20, len(data) - 50)])

    def fsync(fd: int) -> None:
        nonlocal fsyncs
        fsyncs += 1
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="no space"):
            put(journal, RECORDS[1])
    assert fsyncs == (call == "fsync")
    put(journal, RECORDS[2])
    assert len(journal_files(str(tmp_path))[CHUNK.index]) == 2
    assert {RECORDS[0].id, RECORDS[2].id} <= set(recalled(tmp_path))


def test_every_append_is_synced(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    put(journal, RECORDS[0])
    assert [Path(path).suffix for path in synced] == [".journal", ""]  # the file, then its folder


def test_a_committed_chunk_and_a_finished_job_leave_nothing(journal: Journal, tmp_path: Path) -> None:
    put(journal, RECORDS[0])
    other = Journal(str(tmp_path), PLAN)
    put(other, RECORDS[1])
    other.add(replace(CHUNK, index=8), RECORDS[2])
    other.write(other.take())
    journal.forget(CHUNK, journal_files(str(tmp_path))[CHUNK.index])
    assert set(journal_files(str(tmp_path))) == {8}
    clear_journals(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    clear_journals(str(tmp_path))


def test_files_that_went_away_or_are_links_are_passed_over(journal: Journal, tmp_path: Path) -> None:
    put(journal, RECORDS[0])
    (path,) = journal_files(str(tmp_path))[CHUNK.index]
    link = tmp_path / "link"
    link.symlink_to(path)
    assert recall([str(tmp_path / "gone"), str(link)], PLAN, CHUNK) == {}


def test_rows_go_on_from_their_records() -> None:
    prompt = np.array([1], np.int32)

    def request(offset: int, n: int = 1, max_tokens: int = 8, best_of: int = 0) -> Request:
        return Request(
            CHUNK.row_id(offset), prompt, SamplingParams(n=n, best_of=best_of, max_tokens=max_tokens), seed=5
        )

    bad = Completion(CHUNK.row_id(4), 0, error=RowError(ErrorCode.NULL_PROMPT, "null"))
    rows = [request(0), request(1, n=2), request(2), request(3), bad, request(5, n=2), request(6, max_tokens=2)]
    known = {
        rows[0].id: completion(0, sample(1, 2)),
        rows[1].id: completion(1, sample(1, reason=""), sample(3)),
        rows[2].id: completion(2),
        rows[4].id: completion(4, sample(1)),
        rows[5].id: completion(5, sample(1)),
        rows[6].id: completion(6, sample(1, 2, reason="")),
    }
    best = [request(7, n=1, best_of=2), request(8, n=1, best_of=2)]
    begun = {best[0].id: completion(7, sample(1)), best[1].id: completion(8, sample(1, reason=""), sample(2))}
    assert resume(best, begun) == [begun[best[0].id], replace(best[1], so_far=begun[best[1].id].samples)]
    got = resume(rows, known)
    assert got[0] is known[rows[0].id]
    assert got[1] == replace(rows[1], so_far=known[rows[1].id].samples)
    # no record, or one that does not fit the row: from the start; a row that can't be answered stays what it is
    assert got[2:] == rows[2:]
