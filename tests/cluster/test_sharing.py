"""Who shares with whom, and how the memory gets from one process to the other."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchinfer.cluster import neighbours
from batchinfer.cluster.binding import Place
from batchinfer.cluster.sharing import Follower, Leader, address, leaders, no_gpu, sharing
from batchinfer.cluster.tree import Links, tree
from batchinfer.cluster.weights import Loaded, LoadingStopped

LOADED = Loaded(bytes=100, seconds=0.5, read=100, digest="ab" * 32)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return address(f"{request.node.name}-{os.getpid()}", 0)


@pytest.fixture
def gift() -> int:
    fd = os.memfd_create("gift")
    os.write(fd, b"weights")
    return fd


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(neighbours, "ALIVE_SECONDS", 0.2)
    monkeypatch.setattr(neighbours, "PATIENCE_SECONDS", 1.0)


class Taking(threading.Thread):
    def __init__(self, name: str):
        super().__init__(daemon=True)
        self.follower, self.got = Follower(name), None
        self.start()

    def run(self) -> None:
        self.got = self.follower.take()

    def result(self) -> tuple[int | None, Loaded | None]:
        self.join(10)
        assert not self.is_alive()
        return self.got


def test_the_first_rank_of_a_numa_domain_leads() -> None:
    def at(host: str, *numa: int, shares: bool = True) -> Place:
        return Place(host, (0,), numa, shares=shares)

    assert leaders([at("a", 0), at("a", 1), at("a", 0), at("b", 0), at("a", 1), at("b", 0)]) == [0, 1, 0, 3, 1, 3]
    assert leaders([at("a", 0, 1), at("a", 0), at("a", 0, 1)]) == [0, 1, 0]
    assert leaders([at("a", shares=False)] * 3) == [0, 1, 2]
    assert leaders([at("a")] * 3) == [0, 0, 0]  # where Linux names no domains


def test_only_leaders_are_in_the_tree() -> None:
    assert tree(["a", None, "a", "b", None], 64) == [Links(None, (3, 2)), Links(), Links(0), Links(0), Links()]


def test_who_has_nobody_to_share_with() -> None:
    def stop() -> bool:
        return False

    with sharing("job", [0, 1, 0], 1, stop) as alone, sharing("job", [0, 0], 2, stop) as late:
        assert (alone, late) == (None, None)
    with sharing("job", [0, 1, 0], 2, stop) as follower:
        assert not follower.leads
    with sharing(f"job {os.getpid()}", [0, 1, 0], 0, stop) as leader:
        assert leader.leads
        assert leader.take() == (None, None)


def test_all_get_the_memory(name: str, gift: int) -> None:
    """Those that ask before it is ready, and after the leader has gone on; from one that starts late."""
    early = Taking(name)
    time.sleep(0.3)
    with Leader(name, 3) as leader:
        second = Taking(name)
        time.sleep(0.3)
        leader.give(gift, LOADED)
    late = Taking(name)
    for taking in (early, second, late):
        fd, loaded = taking.result()
        assert (os.pread(fd, 9, 0), loaded) == (b"weights", LOADED)
        os.close(fd)
    leader._thread.join(10)
    assert not leader._thread.is_alive()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(gift)


def test_a_leader_that_stops_leaves_nobody_waiting(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with Leader(name, 1):
        taking = Taking(name)
        time.sleep(0.5)
    assert taking.result() == (None, None)
    assert "(the rank that packs them has stopped): it packs its own" in capfd.readouterr().err


def test_no_leader_at_all(name: str, impatient: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert Follower(name).take() == (None, None)
    assert "(the rank that packs them is silent): it packs its own" in capfd.readouterr().err


def test_a_slow_leader_is_waited_for(name: str, gift: int, impatient: None) -> None:
    with Leader(name, 1) as leader:
        taking = Taking(name)
        time.sleep(2.0)
        leader.give(gift, None)
        fd, loaded = taking.result()
    assert loaded is None
    os.close(fd)


def test_being_told_to_stop(name: str) -> None:
    with Leader(name, 1), pytest.raises(LoadingStopped):
        Follower(name, lambda: True).take()


def test_an_address_is_one_jobs() -> None:
    assert len({address("a", 0), address("a", 1), address("b", 0)}) == 3
    assert len(address("x" * 500, 10**6)) < 108  # sockaddr_un


def test_a_node_with_a_gpu(tmp_path: Path) -> None:
    assert no_gpu(tmp_path)
    (tmp_path / "kfd").touch()
    assert not no_gpu(tmp_path)
