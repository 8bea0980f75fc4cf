"""Weights are read once for many ranks: each passes the blocks that it gets on to its children in a tree.

A rank whose parent dies or stops reads the rest itself, and goes on for its own children.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import queue
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any, Protocol, TypeVar

from batchinfer.cluster.channel import Buffer, Channel
from batchinfer.cluster.neighbours import BLOCK, DONE, ERROR, GONE, VALUE, Neighbour, Neighbours, Transfer
from batchinfer.cluster.tree import Links
from batchinfer.types import ExitCode, JobError

BUFFERS = 4
"""Blocks in a rank's memory: one comes in, one is passed on, one is hashed, one is converted."""

HASH_THREADS = 2
"""SHA-256 makes 2 GB/s in a thread, and 0.4 on a CPU without instructions for it."""

CLOSE_SECONDS = 10.0
"""Most time that a rank which stops waits for the last words of its neighbours."""

SHORTEST_PAUSE, LONGEST_PAUSE = 50e-6, 1e-3
"""Between two looks at what is under way: large messages advance only in calls of MPI, and waiting must not spin."""

IDLE_PAUSE = 5e-3
"""The same before the first block."""

STOP_SECONDS = 0.2
"""Between two questions whether to stop, while no block comes."""

T = TypeVar("T")


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


B = TypeVar("B", bound=Sized)


class Sharing(Protocol):
    """A rank's end of the packed weights that the ranks of a node share (sharing.py)."""

    leads: bool
    """Whether it is this rank that packs them."""

    def take(self) -> tuple[int | None, Loaded | None]:
        """The descriptor of the memory and what was loaded into it; None: this rank packs for itself."""

    def give(self, fd: int, loaded: Loaded | None) -> None:
        """Hand the memory on."""


class LoadingStopped(Exception):
    """``stop()`` has become true."""


@dataclass(frozen=True)
class Loaded:
    """What a rank has loaded: ``bytes`` in ``seconds``, of which it ``read`` so many from files itself. ``digest``:
    SHA-256 (hex) over the SHA-256s of the blocks. ``readers`` of the ``ranks`` that loaded together read files, and
    ``packers`` of them packed the weights (0: each for itself)."""

    bytes: int
    seconds: float
    read: int
    digest: str
    readers: int = 1
    packers: int = 0
    ranks: int = 1

    def __str__(self) -> str:
        rate = self.bytes / max(self.seconds, 1e-9) / 1e9
        by = f", read {_times(self.readers)} for {self.ranks} ranks" if self.ranks > 1 else ""
        by += f", packed {_times(self.packers)}" if 0 < self.packers < self.ranks else ""
        return f"weights {self.bytes / 1e9:.2f} GB in {self.seconds:.1f} s ({rate:.2f} GB/s){by}"


@dataclass
class Block:
    """A block in memory: its buffer is free again when all of ``uses`` are over."""

    data: Buffer
    uses: list[Callable[[], bool]] = field(default_factory=list)
    sends: list[Transfer] = field(default_factory=list)

    def free(self) -> bool:
        return all(use() for use in self.uses) and all(send.over() for send in self.sends)


class WeightStream:
    """One rank's end; a ``models.files.Source``. Every rank of the tree closes it (``with``), used or not.

    ``stop``: asked between two blocks; true raises LoadingStopped. ``channel`` may be None without links. ``sharing``:
    this rank's end of what the ranks of a node share, None where it shares nothing. ``loaded`` is None before the last
    block, or before the memory of another rank is taken.
    """

    def __init__(
        self,
        links: Links,
        channel: Channel | None = None,
        stop: Callable[[], bool] = lambda: False,
        sharing: Sharing | None = None,
    ):
        self._near = Neighbours(links, channel)
        self._stop, self._sharing = stop, sharing
        self._blocks: list[Block] = []
        self._free: list[Buffer] = []
        self._ending = Event()
        self._reader = ThreadPoolExecutor(1, "weights-read")
        self._hasher = ThreadPoolExecutor(HASH_THREADS, "weights-hash")
        self._begun = Event()
        self._thread = Thread(target=self._wait_to_begin, name="weights", daemon=True)
        self._read = 0
        self.loaded: Loaded | None = None

    def __enter__(self) -> WeightStream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end_thread()
        self._near.say_last(GONE)
        end = time.monotonic() + CLOSE_SECONDS
        while not self._near.parted() and time.monotonic() < end:
            time.sleep(LONGEST_PAUSE)
        self._near.give_up()
        self._reader.shutdown(wait=False)
        self._hasher.shutdown(wait=False)

    @property
    def shares(self) -> bool:
        return self._sharing is not None and self._sharing.leads

    def take(self) -> int | None:
        """The descriptor of the memory in which another rank has packed the weights; None: there is none to be had."""
        fd, loaded = self._sharing.take() if self._sharing else (None, None)
        self.loaded = self.loaded or loaded
        return fd

    def give(self, fd: int) -> None:
        """Hand on the memory in which this rank has packed the weights."""
        self._sharing.give(fd, self.loaded)

    def value(self, make: Callable[[], T]) -> T:
        """On all ranks what ``make`` returns on the one that reads; anything that pickle takes. Raises its JobError."""
        self._begin()
        data = self._from_parent(VALUE, None, None)
        if data is None:
            data = self._own(lambda: pickle.dumps(make()))
        for child in self._near.children:
            if child.open:
                self._near.send(child, VALUE, data)
        return pickle.loads(data)

    def stream(self, blocks: Sequence[B], read: Callable[[B, memoryview], None]) -> Iterator[memoryview]:
        """The bytes of each of ``blocks``, the same list on all ranks; valid until the next are asked for.

        ``read`` fills in a block from its file; it is called in a thread, for the blocks that this rank has to read.
        Raises the JobError of the rank that reads, and JobError(74) if something else came here than was sent.
        """
        self._begin()
        ready: queue.Queue[Any] = queue.Queue()

        def run() -> None:
            try:
                self._run(blocks, read, ready)
                ready.put(None)
            except BaseException as error:
                ready.put(error)

        self._thread = Thread(target=run, name="weights", daemon=True)
        self._thread.start()
        try:
            while not self._stop():
                try:
                    item = ready.get(timeout=STOP_SECONDS)
                except queue.Empty:
                    continue
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                view, used = item
                yield view
                used.set()
            raise LoadingStopped
        finally:
            self._end_thread()

    def _wait_to_begin(self) -> None:
        """The thread, at first: others begin earlier, and shall hear that this rank lives while it imports torch."""
        while not self._begun.wait(IDLE_PAUSE):
            self._near.attend()

    def _begin(self) -> None:
        if not self._begun.is_set():
            self._begun.set()
            self._thread.join()

    def _end_thread(self) -> None:
        self._begun.set()
        self._ending.set()
        self._thread.join()

    def _run(self, blocks: Sequence[B], read: Callable[[B, memoryview], None], ready: queue.Queue[Any]) -> None:
        """The thread: get each block, pass it on, have it hashed, hand it to the caller; then part."""
        start = time.monotonic()
        size = max((block.nbytes for block in blocks), default=0)
        digests: list[Future[bytes]] = []
        for wanted in blocks:
            block = self._next(wanted, size, read)
            view, used = memoryview(block.data)[: wanted.nbytes], Event()
            sends = [self._near.send(child, BLOCK, view) for child in self._near.children if child.open]
            digest = self._hasher.submit(_sha256, view)
            block.sends = [send for send in sends if send]
            block.uses = [used.is_set, digest.done]
            digests.append(digest)
            self._blocks.append(block)
            ready.put((view, used))
        self._wait(lambda: all(digest.done() for digest in digests))
        mine = _sha256(b"".join(digest.result() for digest in digests))
        self._near.say_last(DONE, mine)
        self._wait(self._near.parted)
        if self._near.digest not in (None, mine):
            raise JobError(
                f"the weights have come here from rank {self._near.parent.rank} with other bytes than it has "
                f"(SHA-256 {mine.hex()[:12]}, there {self._near.digest.hex()[:12]}): memory or network of one of "
                "the two nodes is faulty; run again without them",
                ExitCode.IO,
            )
        total = sum(block.nbytes for block in blocks)
        self.loaded = Loaded(total, time.monotonic() - start, self._read, mine.hex())

    def _next(self, wanted: B, size: int, read: Callable[[B, memoryview], None]) -> Block:
        block = Block(self._buffer(size))
        if self._from_parent(BLOCK, wanted.nbytes, block.data) is None:
            if self._near.parent and self._near.parent.lost:
                block = Block(bytearray(size))  # MPI may still write to the other
            view = memoryview(block.data)[: wanted.nbytes]
            self._own(lambda: read(wanted, view))
            self._read += wanted.nbytes
        return block

    def _own(self, make: Callable[[], T]) -> T:
        """``make()``, in a thread while this one says that it is alive."""
        future = self._reader.submit(make)
        try:
            self._wait(future.done)
            return future.result()
        except LoadingStopped:
            wait([future])  # it uses a file that the caller will close
            raise
        except JobError as error:
            self._near.say_last(ERROR, pickle.dumps((str(error), error.exit_code)))
            raise

    def _from_parent(self, kind: int, size: int | None, out: Buffer | None) -> Buffer | None:
        """The next message: into ``out``, of ``size`` bytes, or a new buffer. None: there is no parent, or no more."""
        parent = self._near.parent
        if parent is None or parent.told:
            return None
        self._wait(lambda: parent.head is not None or not parent.open)
        if self._near.error:
            self._near.say_last(ERROR, pickle.dumps((str(self._near.error), self._near.error.exit_code)))
            raise self._near.error
        if parent.head is None:
            return self._orphaned(parent)
        head, length = parent.head
        if head != kind or size not in (None, length):
            raise JobError(f"rank {parent.rank} sends other blocks than this rank waits for", ExitCode.INTERNAL)
        out = bytearray(length) if out is None else out
        transfer = self._near.receive(parent, memoryview(out)[:length])
        if transfer:
            self._wait(transfer.over)
        return out if transfer and not transfer.failed else self._orphaned(parent)

    def _orphaned(self, parent: Neighbour) -> None:
        what = "is silent" if parent.lost else "has stopped"
        text = f"rank {parent.rank}, from which the weights came to {os.uname().nodename}, {what}: they are read there"
        print(f"batchinfer: {text}", file=sys.stderr, flush=True)
        self._near.leave_parent()

    def _buffer(self, size: int) -> Buffer:
        """One of BUFFERS. Waits until the caller, the hash and the children have done with one."""

        def found() -> bool:
            for block in [block for block in self._blocks if block.free()]:
                self._blocks.remove(block)
                if not any(send.failed for send in block.sends):
                    self._free.append(block.data)
            return bool(self._free) or len(self._blocks) < BUFFERS

        self._wait(found)
        return self._free.pop() if self._free else bytearray(size)

    def _wait(self, ready: Callable[[], bool]) -> None:
        pause = SHORTEST_PAUSE
        while not ready():
            if self._ending.is_set():
                raise LoadingStopped
            self._near.attend()
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _sha256(data: Buffer) -> bytes:
    return hashlib.sha256(data).digest()
