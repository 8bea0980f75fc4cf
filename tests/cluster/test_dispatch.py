"""Every chunk is handed out once and committed once, whatever the order in which messages travel."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from threading import Lock, Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.cluster import dispatch
from batchinfer.cluster.array import ArrayDispatcher, Share
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


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Rank:
    """The job's loop without rows: holds up to two chunks, finishes the oldest when told to, and leaves at the end.
    ``output`` is what all ranks of the job have committed."""

    def __init__(self, dispatcher: RootDispatcher | WorkerDispatcher, output: set[int]):
        self.dispatcher = dispatcher
        self.output = output
        self.held: deque[Chunk] = deque()
        self.computed: list[int] = []

    def turn(self, finish: bool) -> None:
        self.dispatcher.poll(len(self.computed))
        if len(self.held) < 2 and (chunk := self.dispatcher.next_chunk(hungry=not self.held)):
            assert chunk not in self.held  # an engine can't have a row twice
            self.held.append(chunk)
        if finish and self.held:
            chunk = self.held.popleft()
            self.computed.append(chunk.index)
            self.output.add(chunk.index)
            self.dispatcher.done(chunk, len(self.computed))


class Job:
    """``size`` ranks and ``count`` chunks, a clock that stands still until a test moves it, and ranks that may die."""

    def __init__(self, size: int, count: int):
        self.network, self.clock, self.output, self.dead = Network(size), Clock(), set(), set()
        self.chunks = chunks(count)
        root = RootDispatcher(self.network.ranks[0], self.chunks, self.clock)
        workers = [WorkerDispatcher(post, self.alone(post.rank), self.clock) for post in self.network.ranks[1:]]
        self.ranks = [Rank(dispatcher, self.output) for dispatcher in (root, *workers)]

    def alone(self, rank: int) -> Callable[[set[int]], ArrayDispatcher]:
        def missing() -> list[Chunk]:
            return [chunk for chunk in self.chunks if chunk.index not in self.output]

        def exists(chunk: Chunk) -> bool:
            return chunk.index in self.output

        share = Share(rank, len(self.network.ranks))
        return lambda held: ArrayDispatcher(self.chunks, share, exists, missing, held, self.clock)

    def fair_turns(self, turns: int, seconds: float = 0.0, finish: bool = True) -> None:
        """Everybody gets its messages and a turn, ``turns`` times with ``seconds`` between them."""
        for _ in range(turns):
            for a, rank in enumerate(self.ranks):
                for b in range(len(self.ranks)):
                    self.network.ranks[b].deliver(a)
                if a not in self.dead:
                    rank.turn(finish)
            self.clock.now += seconds


@pytest.mark.feature("job", "rank 0 hands out chunks by messages and computes too")
@settings(max_examples=150)
@given(size=st.integers(1, 5), count=st.integers(1, 12), data=st.data())
def test_each_chunk_is_computed_once_under_any_interleaving(size: int, count: int, data: st.DataObject) -> None:
    job = Job(size, count)
    rank_numbers = st.integers(0, size - 1)
    actions = st.tuples(st.sampled_from(["turn", "finish", "deliver"]), rank_numbers, rank_numbers)
    for kind, a, b in data.draw(st.lists(actions, max_size=120)):
        if kind == "deliver":
            job.network.ranks[b].deliver(a)
        else:
            job.ranks[a].turn(finish=kind == "finish")
        computed = Counter(i for rank in job.ranks for i in rank.computed)
        held = Counter(chunk.index for rank in job.ranks for chunk in rank.held)
        assert max((computed + held).values(), default=0) <= 1
        if any(rank.dispatcher.finished for rank in job.ranks):
            assert sum(computed.values()) == count

    job.fair_turns(20 * (count + size))
    assert all(rank.dispatcher.finished for rank in job.ranks)
    assert sorted(i for rank in job.ranks for i in rank.computed) == list(range(count))
    assert job.ranks[0].dispatcher.reports[1:] == [len(rank.computed) for rank in job.ranks[1:]]


@settings(max_examples=150)
@given(size=st.integers(2, 5), count=st.integers(1, 12), data=st.data())
def test_the_survivors_finish_whoever_dies_whenever(size: int, count: int, data: st.DataObject) -> None:
    """Rank 0 too. Nothing is asked of the dead but what they had committed."""
    job = Job(size, count)
    rank_numbers = st.integers(0, size - 1)
    actions = st.tuples(st.sampled_from(["turn", "finish", "deliver"]), rank_numbers, rank_numbers)
    for kind, a, b in data.draw(st.lists(actions, max_size=80)):
        if kind == "deliver":
            job.network.ranks[b].deliver(a)
        else:
            job.ranks[a].turn(finish=kind == "finish")
    job.dead = data.draw(st.sets(rank_numbers, max_size=size - 1))
    finished = [rank for number, rank in enumerate(job.ranks) if number not in job.dead]
    job.fair_turns(20 * (count + size), seconds=dispatch.SILENCE_SECONDS / 4)
    assert job.output | job.ranks[0].dispatcher.aside == set(range(count))
    assert all(rank.dispatcher.finished for rank in finished)
    if 0 not in job.dead:
        assert job.ranks[0].dispatcher.lost <= job.dead
        assert not any(rank.dispatcher.lost for rank in finished[1:])


@settings(max_examples=150)
@given(size=st.integers(2, 4), count=st.integers(1, 10), data=st.data())
def test_ranks_that_sleep_and_wake_do_no_harm(size: int, count: int, data: st.DataObject) -> None:
    """Taken for dead, and back with what they had in hand: no rank gets a chunk that it is computing."""
    job = Job(size, count)
    asleep = st.sets(st.integers(0, size - 1), max_size=size - 1)
    for job.dead in data.draw(st.lists(asleep, max_size=12)):
        job.fair_turns(
            data.draw(st.integers(1, 6)), seconds=dispatch.SILENCE_SECONDS / 4, finish=data.draw(st.booleans())
        )
    job.dead = set()
    job.fair_turns(20 * (count + size), seconds=dispatch.SILENCE_SECONDS / 12)
    assert job.output | job.ranks[0].dispatcher.aside == set(range(count))
    assert all(rank.dispatcher.finished for rank in job.ranks)


def test_a_rank_that_was_only_slow_is_taken_back() -> None:
    job = Job(2, 4)
    slow = job.ranks[1]
    job.fair_turns(5, finish=False)
    assert slow.held
    job.dead = {1}
    job.fair_turns(3, seconds=dispatch.SILENCE_SECONDS / 2 + 1)
    assert job.ranks[0].dispatcher.lost == {1}
    slow.dispatcher.next_chunk(hungry=True)
    for _ in range(3):  # the root may give it what it has still in hand
        job.network.ranks[0].deliver(1)
        job.ranks[0].turn(finish=False)
        job.network.ranks[1].deliver(0)
        slow.turn(finish=False)
    for chunk in list(slow.held):  # what it had in hand comes late, perhaps for the second time
        slow.held.remove(chunk)
        job.output.add(chunk.index)
        slow.dispatcher.done(chunk, 1)
    job.network.ranks[0].deliver(1)
    job.ranks[0].turn(finish=False)
    assert job.ranks[0].dispatcher.lost == set()
    job.dead = set()
    job.fair_turns(20)
    assert job.output == set(range(4))


def test_a_chunk_that_dead_ranks_held_is_set_aside() -> None:
    """A row of it may have killed them; the other chunks of the dead were not to blame more than once."""
    queue = ChunkQueue(chunks(4), ranks=2)
    assert [queue.take(1, hungry=True, now=0).index for _ in range(2)] == [0, 1]
    queue.release(1, dead=True)
    assert [queue.take(0, hungry=True, now=1).index for _ in range(2)] == [1, 0]
    queue.done(1, now=2)
    queue.release(0, dead=False)  # it leaves: that is no death
    assert queue.take(2, hungry=True, now=3).index == 0
    queue.release(2, dead=True)
    assert queue.aside == {0}
    for index in (2, 3):
        assert queue.take(3, hungry=True, now=4).index == index
        queue.done(index, now=5)
    assert queue.finished
    assert queue.aside == {0}
    queue.done(0, now=6)  # one of the dead was only slow
    assert queue.aside == set()


def test_an_idle_rank_repeats_what_is_overdue_elsewhere() -> None:
    queue = ChunkQueue(chunks(3), ranks=3)
    taken = [queue.take(rank, hungry=True, now=0).index for rank in range(3)]
    queue.done(taken[0], now=10)
    limit = 10 * dispatch.SLOW_FACTOR
    assert queue.take(0, hungry=True, now=limit) is None
    assert queue.take(0, hungry=False, now=limit + 1) is None  # it has rows still
    assert queue.take(0, hungry=True, now=limit + 1).index == taken[1]
    assert queue.take(0, hungry=True, now=limit + 1) is None  # it has work again
    queue.done(taken[1], now=limit + 2)
    assert queue.take(1, hungry=True, now=limit + 20).index == taken[2]
    queue.done(taken[1], now=limit + 21)  # the second of the two that computed it
    queue.done(taken[2], now=limit + 21)
    assert queue.finished


def test_a_job_ends_with_no_message_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPI_Finalize with one under way hangs now and then."""
    job = Job(3, 5)
    job.fair_turns(30)
    root, workers = job.ranks[0].dispatcher, [rank.dispatcher for rank in job.ranks[1:]]
    ends: dict[int, object] = {}
    lock = Lock()

    def deliver_all(seconds: float) -> None:
        with lock:
            job.clock.now += 1e-6
            for a in range(3):
                for b in range(3):
                    job.network.ranks[b].deliver(a)

    def leave(rank: int) -> None:
        ends[rank] = workers[rank].leave(f"notice {rank}")

    monkeypatch.setattr(dispatch.time, "sleep", deliver_all)
    threads = [Thread(target=leave, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    assert sorted(root.gather("mine", 60.0)) == ["mine", "notice 0", "notice 1"]
    root.release(3)
    for thread in threads:
        thread.join(10)
    assert ends == {0: 3, 1: 3}
    assert not any(job.network.lines.values())
    assert not any(post.arrived for post in job.network.ranks)
    assert root.lost == set()


def test_who_does_not_come_to_the_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(3, 5)
    job.fair_turns(30)
    monkeypatch.setattr(dispatch.time, "sleep", lambda seconds: setattr(job.clock, "now", job.clock.now + 1.0))
    root = job.ranks[0].dispatcher
    assert root.gather("mine", 60.0) == ["mine"]
    root.release(0)
    assert root.lost == {1, 2}
    worker = job.ranks[1].dispatcher
    assert worker.leave("notice") is None  # rank 0 has not answered it in the same time
    assert worker.lost == {0}
    assert worker.finished


def test_messages_go_on_meanwhile() -> None:
    job = Job(2, 2)
    job.ranks[1].dispatcher.next_chunk(hungry=True)
    job.network.ranks[0].deliver(1)
    with dispatch.meanwhile(job.ranks[0].dispatcher, threads=True):
        deadline = time.monotonic() + 10
        while not job.network.lines[0, 1] and time.monotonic() < deadline:
            time.sleep(0.01)
    assert job.network.lines[0, 1][0][0] == "chunk"


def test_an_error_meanwhile_is_not_lost() -> None:
    class Broken:
        def poll(self, report: object) -> None:
            raise ValueError("chunk 7 is reported")

    with pytest.raises(ValueError, match="chunk 7"), dispatch.meanwhile(Broken(), threads=True):
        time.sleep(0.1)


def test_asking_ahead_is_served_while_there_is_plenty_and_not_at_the_tail() -> None:
    queue = ChunkQueue(chunks(6), ranks=3)
    assert [queue.take(rank, hungry=False, now=0).index for rank in (1, 1, 0, 2)] == [0, 1, 2, 3]
    assert queue.take(2, hungry=False, now=0) is None
    assert queue.take(2, hungry=True, now=0).index == 4
    assert queue.take(0, hungry=True, now=0).index == 5
    assert queue.take(0, hungry=True, now=0) is None
    assert not queue.finished


def test_the_first_rank_ready_leaves_the_others_their_share() -> None:
    queue = ChunkQueue(chunks(8), ranks=4)
    first = [queue.take(3, hungry=True, now=0) for _ in range(3)]
    assert [chunk and chunk.index for chunk in first] == [0, 1, None]
    queue.done(0, now=0)
    assert queue.take(3, hungry=True, now=0).index == 2  # 7 are left, a share is still 2
    queue.done(1, now=0)
    queue.done(2, now=0)
    assert queue.take(3, hungry=True, now=0).index == 3
    assert queue.take(3, hungry=True, now=0).index == 4  # 5 left
    queue.done(3, now=0)
    assert queue.take(3, hungry=True, now=0) is None  # 4 left: one each
    assert [queue.take(rank, hungry=True, now=0).index for rank in range(3)] == [5, 6, 7]


def test_only_what_was_given_can_be_finished() -> None:
    queue = ChunkQueue(chunks(2), ranks=2)
    queue.take(1, hungry=True, now=0)
    with pytest.raises(ValueError, match="chunk 1 is reported, which nobody was given"):
        queue.done(1, now=0)


def test_a_refused_worker_does_not_ask_again() -> None:
    """A rank with an empty hand polls every few milliseconds; thousands of them must not flood rank 0."""
    job = Job(2, 1)
    network, ranks = job.network, job.ranks
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
