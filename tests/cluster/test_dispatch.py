"""Every chunk is handed out once and committed once, whatever the order in which messages travel."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.cluster.dispatch import ChunkQueue, RootDispatcher, WorkerDispatcher
from batchinfer.cluster.world import World
from batchinfer.types import Chunk


def chunks(count: int) -> list[Chunk]:
    return [Chunk(index=i, file=0, start=10 * i, rows=10) for i in range(count)]


class Network:
    """In-memory ranks: messages keep their order between two ranks, and nothing else."""

    def __init__(self, size: int):
        self.lines = {(a, b): deque() for a in range(size) for b in range(size)}
        self.ranks = [Post(self, rank, size) for rank in range(size)]


class Post:
    def __init__(self, network: Network, rank: int, size: int):
        self.network, self.rank, self.size = network, rank, size
        self.arrived: deque = deque()

    def send(self, rank: int, message: object) -> None:
        self.network.lines[self.rank, rank].append(message)

    def receive(self) -> tuple[int, object] | None:
        return self.arrived.popleft() if self.arrived else None

    def deliver(self, sender: int) -> None:
        line = self.network.lines[sender, self.rank]
        if line:
            self.arrived.append((sender, line.popleft()))


class Rank:
    """The job's loop without rows: holds up to two chunks, finishes the oldest when told to."""

    def __init__(self, dispatcher: RootDispatcher | WorkerDispatcher):
        self.dispatcher = dispatcher
        self.held: deque[Chunk] = deque()
        self.computed: list[int] = []

    def turn(self, finish: bool) -> None:
        self.dispatcher.poll(len(self.computed))
        if len(self.held) < 2 and (chunk := self.dispatcher.next_chunk(hungry=not self.held)):
            self.held.append(chunk)
        if finish and self.held:
            chunk = self.held.popleft()
            self.computed.append(chunk.index)
            self.dispatcher.done(chunk, len(self.computed))


def ranks_of(size: int, count: int) -> tuple[Network, list[Rank]]:
    network = Network(size)
    root = RootDispatcher(network.ranks[0], chunks(count))
    return network, [Rank(root), *(Rank(WorkerDispatcher(post)) for post in network.ranks[1:])]


@pytest.mark.feature("job", "rank 0 hands out chunks by messages and computes too")
@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 5), count=st.integers(1, 12), data=st.data())
def test_each_chunk_is_computed_once_under_any_interleaving(size: int, count: int, data: st.DataObject) -> None:
    network, ranks = ranks_of(size, count)
    rank_numbers = st.integers(0, size - 1)
    actions = st.tuples(st.sampled_from(["turn", "finish", "deliver"]), rank_numbers, rank_numbers)
    for kind, a, b in data.draw(st.lists(actions, max_size=120)):
        if kind == "deliver":
            network.ranks[b].deliver(a)
        else:
            ranks[a].turn(finish=kind == "finish")
        computed = Counter(i for rank in ranks for i in rank.computed)
        held = Counter(chunk.index for rank in ranks for chunk in rank.held)
        assert max((computed + held).values(), default=0) <= 1
        if any(rank.dispatcher.finished for rank in ranks):
            assert sum(computed.values()) == count

    for _ in range(20 * (count + size)):  # then a fair schedule: everybody ends
        for a in range(size):
            for b in range(size):
                network.ranks[b].deliver(a)
            ranks[a].turn(finish=True)
    assert all(rank.dispatcher.finished for rank in ranks)
    assert sorted(i for rank in ranks for i in rank.computed) == list(range(count))
    assert ranks[0].dispatcher.reports[1:] == [len(rank.computed) for rank in ranks[1:]]


def test_asking_ahead_is_served_while_there_is_plenty_and_not_at_the_tail() -> None:
    queue = ChunkQueue(chunks(6), ranks=3)
    assert [queue.take(rank, hungry=False).index for rank in (1, 1, 0, 2)] == [0, 1, 2, 3]
    assert queue.take(2, hungry=False) is None
    assert queue.take(2, hungry=True).index == 4
    assert queue.take(0, hungry=True).index == 5
    assert queue.take(0, hungry=True) is None
    assert not queue.finished


def test_the_first_rank_ready_leaves_the_others_their_share() -> None:
    queue = ChunkQueue(chunks(8), ranks=4)
    first = [queue.take(3, hungry=True) for _ in range(3)]
    assert [chunk and chunk.index for chunk in first] == [0, 1, None]
    queue.done(3, 0)
    assert queue.take(3, hungry=True).index == 2  # 7 are left, a share is still 2
    queue.done(3, 1)
    queue.done(3, 2)
    assert queue.take(3, hungry=True).index == 3
    assert queue.take(3, hungry=True).index == 4  # 5 left
    queue.done(3, 3)
    assert queue.take(3, hungry=True) is None  # 4 left: one each
    assert [queue.take(rank, hungry=True).index for rank in range(3)] == [5, 6, 7]


def test_a_rank_can_only_finish_what_it_holds() -> None:
    queue = ChunkQueue(chunks(2), ranks=2)
    chunk = queue.take(1, hungry=True)
    with pytest.raises(ValueError, match=r"rank 0 reports chunk 0.*hand of 1"):
        queue.done(0, chunk.index)
    queue.done(1, chunk.index)
    with pytest.raises(ValueError, match="hand of None"):
        queue.done(1, chunk.index)


def test_a_refused_worker_does_not_ask_again() -> None:
    """A rank with an empty hand polls every few milliseconds; thousands of them must not flood rank 0."""
    network, ranks = ranks_of(2, 1)
    ranks[0].turn(finish=False)  # takes the only chunk and keeps it
    asked = 0
    for _ in range(10):
        ranks[1].turn(finish=False)
        asked += sum(message[0] == "ask" for message in network.lines[1, 0])
        while network.lines[1, 0]:
            network.ranks[0].deliver(1)
        ranks[0].turn(finish=False)
        network.ranks[1].deliver(0)
    assert asked == 1
    assert not ranks[1].dispatcher.finished


def test_a_single_process_needs_no_messages() -> None:
    dispatcher = RootDispatcher(World(), chunks(3))
    seen = []
    while not dispatcher.finished:
        dispatcher.poll(None)
        chunk = dispatcher.next_chunk(hungry=True)
        seen.append(chunk.index)
        dispatcher.done(chunk, "latest")
    assert seen == [0, 1, 2]
    assert dispatcher.reports == ["latest"]
