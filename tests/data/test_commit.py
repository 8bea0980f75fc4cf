"""Publication: complete, once, or not at all, whatever call fails and wherever the process dies."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data.fakes import SpiedOs

from batchinfer.data import commit
from batchinfer.data.commit import probe, publish, publish_bytes, read_bytes, write_new
from batchinfer.types import ExitCode, JobError

DATA = b"complete " * 1000


def spy(monkeypatch: pytest.MonkeyPatch, interfere: Callable[[int, str, str], None] | None = None) -> SpiedOs:
    spied = SpiedOs(interfere) if interfere else SpiedOs()
    monkeypatch.setattr(commit, "os", spied)
    return spied


def failing(name: str, code: int, when: str = "before") -> Callable[[int, str, str], None]:
    """Every call of ``name`` fails with ``code``, without having happened, or having happened ("after")."""

    def interfere(number: int, called: str, now: str) -> None:
        if (called, now) == (name, when):
            raise OSError(code, os.strerror(code))

    return interfere


def lacking(*calls: str) -> Callable[[int, str, str], None]:
    """A file system without these calls."""

    def interfere(number: int, called: str, now: str) -> None:
        if called in calls and now == "before":
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    return interfere


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.feature("job", "parts appear whole: written aside, synced, read back, linked without replace")
def test_the_order_of_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spied = spy(monkeypatch)
    temporary, final = str(tmp_path / ".x.tmp"), str(tmp_path / "x")
    write_new(temporary, DATA)
    assert [name for name, _ in spied.calls] == ["open", "write", "fsync", "close"]
    assert publish(temporary, final)
    steps = ["stat", "link", "open", "fsync", "close", "unlink"]
    assert [name for name, _ in spied.calls[4:]] == steps
    assert spied.calls[5] == ("link", temporary)
    assert spied.calls[6] == ("open", str(tmp_path))  # the folder that is synced
    assert spied.calls[9] == ("unlink", temporary)
    assert names(tmp_path) == ["x"]
    assert read_bytes(final) == DATA


def test_the_second_one_loses_and_leaves_the_first_as_it_is(tmp_path: Path):
    assert publish_bytes(str(tmp_path), "x", b"first")
    assert not publish_bytes(str(tmp_path), "x", b"second")
    assert (tmp_path / "x").read_bytes() == b"first"
    assert names(tmp_path) == ["x"]


def test_a_file_is_never_written_over_nor_through_a_link(tmp_path: Path):
    (tmp_path / "there").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            write_new(str(tmp_path / name), DATA)
    assert (tmp_path / "there").read_bytes() == b"old"
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(OSError, match="symbolic"):
        read_bytes(str(tmp_path / "link"))


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spied = spy(monkeypatch)
    monkeypatch.setattr(spied, "write", lambda fd, data: os.write(fd, bytes(data[:1000])), raising=False)
    write_new(str(tmp_path / "x"), DATA)
    assert (tmp_path / "x").read_bytes() == DATA


@pytest.mark.parametrize("name", ["write", "fsync", "close"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_a_failed_write_leaves_nothing_and_is_not_synced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
):
    spied = spy(monkeypatch, failing(name, code, "after"))
    with pytest.raises(OSError, match=os.strerror(code)):
        write_new(str(tmp_path / "x"), DATA)
    assert names(tmp_path) == []
    assert [called for called, _ in spied.calls].count("fsync") == (name != "write")
    assert [called for called, _ in spied.calls].count("close") == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EEXIST, errno.ENOENT, errno.EPERM])
def test_a_lost_reply_to_link_is_a_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
    write_new(str(tmp_path / ".x.tmp"), DATA)
    spy(monkeypatch, failing("link", code, "after"))
    assert publish(str(tmp_path / ".x.tmp"), str(tmp_path / "x"))
    assert names(tmp_path) == ["x"]


def test_a_lost_reply_where_the_new_name_is_not_visible_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A network file system may still say that the name does not exist; the link count of our file tells."""
    write_new(str(tmp_path / ".x.tmp"), DATA)
    spied = spy(monkeypatch, failing("link", errno.EIO, "after"))
    real = os.stat

    def stat(path: str, **options: Any) -> os.stat_result:
        if path.endswith("/x"):
            raise FileNotFoundError(errno.ENOENT, "stale entry", path)
        return real(path, **options)

    monkeypatch.setattr(spied, "stat", stat, raising=False)
    assert publish(str(tmp_path / ".x.tmp"), str(tmp_path / "x"))


def test_an_error_without_the_deed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_new(str(tmp_path / ".x.tmp"), DATA)
    spy(monkeypatch, failing("link", errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        publish(str(tmp_path / ".x.tmp"), str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_a_temporary_file_that_somebody_removed_has_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    temporary = tmp_path / ".x.tmp"
    assert not publish(str(temporary), str(tmp_path / "x"))
    write_new(str(temporary), DATA)
    spy(monkeypatch, lambda number, name, when: temporary.unlink() if (name, when) == ("link", "before") else None)
    assert not publish(str(temporary), str(tmp_path / "x"))
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for code, refused in ((errno.EINVAL, False), (errno.EIO, True)):
        write_new(str(tmp_path / ".x.tmp"), DATA)
        spy(monkeypatch, failing("fsync", code))
        if refused:
            with pytest.raises(OSError, match="Input/output"):
                publish(str(tmp_path / ".x.tmp"), str(tmp_path / "y"))
        else:
            assert publish(str(tmp_path / ".x.tmp"), str(tmp_path / "x"))
        monkeypatch.undo()


@pytest.mark.feature("job", "file systems without hard links, and refusal of those where nothing is safe")
@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS])
def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
    spy(monkeypatch, failing("link", code))
    assert probe(str(tmp_path)) == "renameat2"
    assert publish_bytes(str(tmp_path), "x", b"first")
    assert not publish_bytes(str(tmp_path), "x", b"second")
    assert names(tmp_path) == ["x"]
    assert read_bytes(str(tmp_path / "x")) == b"first"
    monkeypatch.undo()
    assert not publish_bytes(str(tmp_path), "x", b"third")  # link() respects what renameat2 published


@pytest.mark.feature("job", "file systems without hard links, and refusal of those where nothing is safe")
def test_without_any_primitive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spy(monkeypatch, lacking("link", "symlink"))
    monkeypatch.setattr(commit.ctypes, "CDLL", lambda *_, **__: object())
    with pytest.raises(JobError, match="cannot publish a file without replacing another") as caught:
        probe(str(tmp_path))
    assert caught.value.exit_code == ExitCode.OUTPUT
    assert "link: Operation not permitted; renameat2: this C library has no renameat2; symlink: Op" in str(caught.value)
    with pytest.raises(OSError, match="not permitted"):
        publish_bytes(str(tmp_path), "x", b"first")
    assert names(tmp_path) == []


def test_a_primitive_that_replaces_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spied = spy(monkeypatch)
    monkeypatch.setattr(spied, "link", os.replace, raising=False)
    assert probe(str(tmp_path)) == "renameat2"
    assert names(tmp_path) == []


def test_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert probe(str(tmp_path)) == "link"
    assert names(tmp_path) == []
    spy(monkeypatch, failing("write", errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        probe(str(tmp_path))
    assert names(tmp_path) == []


@pytest.fixture
def only_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither hard links nor renameat2."""
    spy(monkeypatch, lacking("link"))
    monkeypatch.setattr(commit.ctypes, "CDLL", lambda *_, **__: object())


def test_claims(tmp_path: Path, only_claims: None):
    assert probe(str(tmp_path)) == "symlink"
    assert names(tmp_path) == []
    assert publish_bytes(str(tmp_path), "x", b"first")
    assert not publish_bytes(str(tmp_path), "x", b"second")
    assert read_bytes(str(tmp_path / "x")) == b"first"
    assert names(tmp_path) == ["._claim-x.0", "x"]
    (tmp_path / "._claim-x.0").unlink()  # as at the end of a job
    assert not publish_bytes(str(tmp_path), "x", b"third")
    assert read_bytes(str(tmp_path / "x")) == b"first"


def test_a_claim_is_carried_out_for_one_who_died(tmp_path: Path, only_claims: None):
    (tmp_path / ".theirs.tmp").write_bytes(b"theirs")
    (tmp_path / "._claim-x.0").symlink_to(".theirs.tmp")
    assert not publish_bytes(str(tmp_path), "x", b"ours")
    assert read_bytes(str(tmp_path / "x")) == b"theirs"


def test_a_claim_on_what_is_gone_is_passed_over_and_left(tmp_path: Path, only_claims: None):
    for number in range(3):
        (tmp_path / f"._claim-x.{number}").symlink_to(f".gone-{number}.tmp")
    assert publish_bytes(str(tmp_path), "x", b"ours")
    assert read_bytes(str(tmp_path / "x")) == b"ours"
    assert names(tmp_path) == [*(f"._claim-x.{number}" for number in range(4)), "x"]


def test_a_claim_cannot_lead_out_of_the_folder(tmp_path: Path, only_claims: None):
    (tmp_path / "out").mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "out" / "._claim-x.0").symlink_to("../secret")
    assert publish_bytes(str(tmp_path / "out"), "x", b"ours")
    assert (tmp_path / "secret").read_bytes() == b"secret"


@pytest.mark.feature("job", "killed at any system call, or many processes racing: no row lost, none twice")
@pytest.mark.parametrize("without_links", [False, True])
def test_killed_at_every_call(tmp_path: Path, without_links: bool):
    """The final name is absent or complete, and whoever comes next completes the work."""

    def die(at: int, folder: Path) -> None:
        events = itertools.count()

        def interfere(number: int, name: str, when: str) -> None:
            if next(events) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            if without_links and (name, when) == ("link", "before"):
                raise OSError(errno.EPERM, "no links here")

        commit.os = SpiedOs(interfere)
        publish_bytes(str(folder), "x", DATA)

    seen = []
    for event in itertools.count():
        folder = tmp_path / str(event)
        folder.mkdir()
        child = multiprocessing.get_context("fork").Process(target=die, args=(event, folder))
        child.start()
        child.join(30)
        if child.exitcode == 0:  # it went through all calls before this event
            break
        assert child.exitcode == -signal.SIGKILL
        there = (folder / "x").exists()
        seen.append(there)
        assert not there or (folder / "x").read_bytes() == DATA
        assert publish_bytes(str(folder), "x", DATA) == (not there)
        assert (folder / "x").read_bytes() == DATA
    assert len(seen) >= 20
    assert seen == sorted(seen)  # absent up to one call, there from then on
    assert set(seen) == {False, True}


@pytest.mark.feature("job", "killed at any system call, or many processes racing: no row lost, none twice")
def test_of_many_racing_processes_one_wins(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    workers, rounds = 4, 40
    barrier = context.Barrier(workers)
    results = context.Queue()

    def race(me: int) -> None:
        won = []
        for i in range(rounds):
            barrier.wait(30)
            if publish_bytes(str(tmp_path), f"x{i}", b"%d" % me * 1000):
                won.append(i)
        results.put((me, won))

    processes = [context.Process(target=race, args=(me,)) for me in range(workers)]
    for process in processes:
        process.start()
    won = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert sorted(i for mine in won.values() for i in mine) == list(range(rounds))
    for me, mine in won.items():
        for i in mine:
            assert (tmp_path / f"x{i}").read_bytes() == b"%d" % me * 1000
    assert len(names(tmp_path)) == rounds
