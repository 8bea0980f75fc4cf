"""Blocks go down the tree whole and in order, whoever dies, stops or fails on the way."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from batchinfer.cluster import neighbours, weights
from batchinfer.cluster.tree import Links, tree
from batchinfer.cluster.weights import Loaded, LoadingStopped, WeightStream
from batchinfer.types import JobError

HOSTS = ["a", "a", "b", "b", "c", "c", "c"]
"""Rank 0 reads; 1, 2 and 4 hang on it, 3 on 2, 5 and 6 on 4."""

DEADLINE = 30


@dataclass(frozen=True)
class Part:
    number: int
    nbytes: int


PARTS = [Part(i, 5000 + 1000 * (i % 3)) for i in range(20)]


def content(part: Part) -> bytes:
    return random.Random(part.number).randbytes(part.nbytes)


class Network:
    """A channel for each rank: a message is under way until its receiver takes it, as with large ones of MPI. ``harm``
    may change what rank ``harmed`` receives. ``dead`` ranks take nothing, and nobody is told."""

    def __init__(self) -> None:
        self.lines: dict[tuple[int, int], deque] = {(a, b): deque() for a in range(7) for b in range(7)}
        self.dead: set[int] = set()
        self.harmed: int | None = None


class Post:
    def __init__(self, network: Network, rank: int):
        self.network, self.rank = network, rank
        self.abandoned: list[Any] = []

    def send(self, rank: int, kind: int, data: Any) -> Callable[[], bool]:
        message = [kind, data, False]
        if self.rank not in self.network.dead:
            self.network.lines[self.rank, rank].append(message)
        return lambda: message[2]

    def probe(self, rank: int) -> tuple[int, int] | None:
        line = self.network.lines[rank, self.rank]
        return (line[0][0], len(line[0][1])) if line and self.rank not in self.network.dead else None

    def receive(self, rank: int, kind: int, out: Any) -> Callable[[], bool]:
        message = self.network.lines[rank, self.rank].popleft()
        assert (message[0], len(message[1])) == (kind, len(out))
        out[:] = message[1]
        if self.network.harmed == self.rank and kind == neighbours.BLOCK:
            out[17] ^= 1
        message[2] = True
        return lambda: True

    def abandon(self, data: Any) -> None:
        self.abandoned.append(data)


class Rank:
    """Loads all parts, in a thread. ``fate(rank, part)`` is called with every part that has come, and ``fate(~rank,
    part)`` before one is read."""

    def __init__(self, network: Network, rank: int, links: Links, fate: Callable[[int, Part], Any], **options: Any):
        self.rank, self.post, self.fate = rank, Post(network, rank), fate
        self.read: list[int] = []
        self.got: list[bytes] = []
        self.header: Any = None
        self.error: BaseException | None = None
        self.loaded: Loaded | None = None
        self.stream = WeightStream(links, self.post, **options)
        self.thread = threading.Thread(target=self.load, daemon=True)

    def fill(self, part: Part, out: memoryview) -> None:
        self.read.append(part.number)
        self.fate(~self.rank, part)
        out[:] = content(part)

    def make(self) -> dict[str, int]:
        return {"made by": self.rank}

    def load(self) -> None:
        try:
            with self.stream as stream:
                self.header = stream.value(self.make)
                for part, data in zip(PARTS, stream.stream(PARTS, self.fill), strict=True):
                    self.got.append(bytes(data))
                    self.fate(self.rank, part)
            self.loaded = stream.loaded
        except BaseException as error:
            self.error = error


def load(
    fate: Callable[[int, Part], Any] = lambda *_: None,
    network: Network | None = None,
    hosts: list[str] = HOSTS,
    per_reader: int = 64,
    victim: int | None = None,
) -> list[Rank]:
    """The ranks after all but ``victim`` have ended."""
    network = network or Network()
    ranks = [Rank(network, i, links, fate) for i, links in enumerate(tree(hosts, per_reader))]
    for rank in ranks:
        rank.thread.start()
    for rank in ranks:
        if rank.rank != victim:
            rank.thread.join(DEADLINE)
            assert not rank.thread.is_alive(), rank.rank
    return ranks


def complete(rank: Rank) -> bool:
    return rank.error is None and rank.got == [content(part) for part in PARTS]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ALIVE_SECONDS", 0.05)
    monkeypatch.setattr(neighbours, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(weights, "CLOSE_SECONDS", 1.0)


@pytest.mark.feature("job", "weights are read once and passed on from rank to rank, checked by SHA-256")
def test_one_rank_reads_for_all() -> None:
    ranks = load()
    assert all(complete(rank) for rank in ranks)
    assert ranks[0].read == [part.number for part in PARTS]
    assert [rank.read for rank in ranks[1:]] == [[]] * 6
    assert all(rank.header == {"made by": 0} for rank in ranks)
    assert not any(rank.post.abandoned for rank in ranks)
    assert len({rank.loaded.digest for rank in ranks}) == 1
    assert ranks[3].loaded.bytes == sum(part.nbytes for part in PARTS)
    assert (ranks[0].loaded.read, ranks[3].loaded.read) == (ranks[0].loaded.bytes, 0)


def test_a_reader_for_every_host() -> None:
    ranks = load(per_reader=1)
    assert all(complete(rank) for rank in ranks)
    assert [bool(rank.read) for rank in ranks] == [True, False, True, False, True, False, False]


def test_alone_without_a_channel() -> None:
    with WeightStream(Links()) as stream:
        assert stream.value(lambda: "header") == "header"
        got = [
            bytes(data) for data in stream.stream(PARTS, lambda part, out: out.__setitem__(slice(None), content(part)))
        ]
    assert got == [content(part) for part in PARTS]
    assert stream.loaded.digest == load(hosts=["a"])[0].loaded.digest
    with pytest.raises(ValueError, match="need a channel"):
        WeightStream(Links(0))


def test_no_more_blocks_in_memory_than_buffers() -> None:
    read: list[int] = []
    most: list[int] = []

    def fate(rank: int, part: Part) -> None:
        if rank == ~0:
            read.append(part.number)
        if rank == 5 and part.number == 0:
            time.sleep(0.5)  # all others could run ahead meanwhile
            most.append(len(read))

    assert all(complete(rank) for rank in load(fate))
    assert most[0] <= 3 * weights.BUFFERS  # those of ranks 0, 4 and 5


@pytest.mark.feature("job", "a rank whose source of weights dies reads the rest itself, and passes it on")
@pytest.mark.parametrize("victim", [0, 2, 4, 6])
def test_a_dead_rank_takes_no_other_along(victim: int, impatient: None, capfd: pytest.CaptureFixture[str]) -> None:
    network, over = Network(), threading.Event()

    def fate(rank: int, part: Part) -> None:
        if part.number == 5 and rank == (victim or ~0):
            network.dead.add(victim)
            over.wait(DEADLINE)

    ranks = load(fate, network, victim=victim)
    over.set()
    said = capfd.readouterr().err
    others = [rank for rank in ranks if rank.rank != victim]
    orphans = [rank for rank in ranks if rank.stream._near.parent and rank.stream._near.parent.rank == victim]
    assert all(complete(rank) for rank in others)
    assert all(bool(rank.read) == (rank in orphans or rank.rank == 0) for rank in others)
    assert all(rank.read[-1] == PARTS[-1].number and len(rank.read) < len(PARTS) for rank in orphans)
    assert said.count(f"rank {victim}, from which the weights came") == len(orphans)


def test_a_slow_file_system_is_no_death(impatient: None) -> None:
    ranks = load(lambda rank, part: time.sleep(2.5 if rank == ~0 and part.number == 3 else 0))
    assert all(complete(rank) for rank in ranks)
    assert not any(rank.read for rank in ranks[1:])


@pytest.mark.feature("job", "an error of reading the weights is the same on every rank")
def test_the_readers_error_is_everybodys() -> None:
    def fate(rank: int, part: Part) -> None:
        if rank == ~0 and part.number == 4:
            raise JobError("/models/x cannot be read at byte 7: Input/output error", 74)

    for rank in load(fate):
        assert isinstance(rank.error, JobError)
        assert (str(rank.error), rank.error.exit_code) == ("/models/x cannot be read at byte 7: Input/output error", 74)


def test_an_error_in_the_headers_is_everybodys(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(rank: Rank) -> None:
        raise JobError("model lacks 1 tensors", 64)

    monkeypatch.setattr(Rank, "make", broken)
    assert {str(rank.error) for rank in load()} == {"model lacks 1 tensors"}


@pytest.mark.parametrize("victim", [0, 4, 6])
def test_a_rank_that_stops_parts_from_the_others(victim: int, impatient: None) -> None:
    """Nothing is under way afterwards, so that MPI can be finalised."""

    def fate(rank: int, part: Part) -> None:
        if rank == victim and part.number == 5:
            raise MemoryError

    ranks = load(fate)
    assert isinstance(ranks[victim].error, MemoryError)
    assert all(complete(rank) for rank in ranks if rank.rank != victim)
    assert not any(rank.post.abandoned for rank in ranks)


def test_a_rank_that_never_begins_parts_too(impatient: None) -> None:
    network = Network()
    ranks = [Rank(network, i, links, lambda *_: None) for i, links in enumerate(tree(["a"] * 3, 64))]
    for rank in ranks[1:]:
        rank.thread.start()
    with ranks[0].stream:
        time.sleep(1.5)  # longer than anybody's patience, but it says that it lives
        assert not ranks[1].read
    for rank in ranks[1:]:
        rank.thread.join(DEADLINE)
        assert complete(rank)
        assert len(rank.read) == len(PARTS)


def test_being_told_to_stop() -> None:
    told = threading.Event()
    rank = Rank(Network(), 0, Links(), lambda rank, part: told.set() if part.number == 5 else None, stop=told.is_set)
    rank.load()
    assert isinstance(rank.error, LoadingStopped)
    assert 0 < len(rank.got) < len(PARTS)
    assert rank.stream.loaded is None


@pytest.mark.parametrize("harmed", [1, 2, 4])
def test_a_flipped_bit_is_found_on_the_rank_where_it_happened(harmed: int) -> None:
    network = Network()
    network.harmed = harmed
    ranks = load(network=network)
    assert [rank.rank for rank in ranks if rank.error] == [harmed]
    assert ranks[harmed].error.exit_code == 74
    assert "have come here from rank 0 with other bytes" in str(ranks[harmed].error)


def test_what_is_said_of_a_load() -> None:
    loaded = Loaded(bytes=270_000_000, seconds=0.5, read=270_000_000, digest="")
    assert str(loaded) == "weights 0.27 GB in 0.5 s (0.54 GB/s)"
    assert str(Loaded(270_000_000, 0.5, 0, "", readers=1, ranks=8)).endswith(", read once for 8 ranks")
    assert str(Loaded(270_000_000, 0.5, 0, "", 1, packers=2, ranks=8)).endswith("for 8 ranks, packed 2 times")
    assert str(Loaded(270_000_000, 0.5, 0, "", readers=3, ranks=800)).endswith(", read 3 times for 800 ranks")
