"""One rank's talk with the ranks above and below it in a tree (tree.py): pieces of data, and signs of life.

All is polled and point to point: no rank hangs because another one has died. Between two neighbours messages keep their
order, and each side ends with one last word, after which nothing is under way:

    VALUE, BLOCK ...   from parent to child: data, for whoever uses this module
    ALIVE              both ways, while there is nothing else to say
    DONE               last word of a rank that has all; from the parent with its digest
    ERROR              last word of a parent that can't go on: pickled message and exit code
    GONE               last word of a rank that stops

A neighbour that is silent for ``PATIENCE_SECONDS`` counts as dead. What was under way to or from it is abandoned.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from batchinfer.cluster.channel import Buffer, Channel, Test
from batchinfer.cluster.tree import Links
from batchinfer.types import JobError

VALUE, BLOCK, ALIVE, DONE, ERROR, GONE = range(6)

ALIVE_SECONDS = 5.0
"""Longest time between two messages to a neighbour."""

PATIENCE_SECONDS = 60.0
"""Slow file systems don't count: a rank that waits for one says ALIVE."""


class Transfer:
    """A message under way. ``data`` may not be touched before it is over, and never if it has ``failed``."""

    def __init__(self, data: Buffer, test: Test):
        self.data, self._test = data, test
        self.failed = self._over = False

    def over(self) -> bool:
        try:
            self._over = self._over or self.failed or self._test()
        except ConnectionError:
            self.failed = self._over = True
        return self._over


@dataclass
class Neighbour:
    """``head``: kind and bytes of the VALUE or BLOCK that waits to be received. ``last``: its last word. ``told``: ours
    is said. ``lost``: it is dead, or taken for it. ``heard`` and ``said``: when, last."""

    rank: int
    heard: float
    said: float
    head: tuple[int, int] | None = None
    last: int | None = None
    told: bool = False
    lost: bool = False
    word: tuple[int, Transfer] | None = None  # coming in, of another kind than VALUE and BLOCK
    transfers: list[Transfer] = field(default_factory=list)

    @property
    def open(self) -> bool:
        """Whether more may come from it."""
        return self.last is None and not self.lost


class Neighbours:
    """``error`` is the parent's if it has said ERROR, ``digest`` its own if it has said DONE."""

    def __init__(self, links: Links, channel: Channel | None, clock: Callable[[], float] = time.monotonic):
        if channel is None and links != Links():
            raise ValueError(f"{links} need a channel")
        self._channel, self._clock = channel, clock
        self.parent = None if links.parent is None else Neighbour(links.parent, clock(), clock())
        self.children = [Neighbour(rank, clock(), clock()) for rank in links.children]
        self.all = [self.parent, *self.children] if self.parent else self.children
        self.error: JobError | None = None
        self.digest: bytes | None = None

    def attend(self) -> None:
        """Hear all, and let them hear. Never waits."""
        for one in self.all:
            self._hear(one)
            one.transfers = [transfer for transfer in one.transfers if not transfer.over() or transfer.failed]
            now = self._clock()
            silent = (one.open or one.transfers) and now - one.heard > PATIENCE_SECONDS
            if silent or any(transfer.failed for transfer in one.transfers):
                self._give_up(one)
            if not one.told and now - one.said > ALIVE_SECONDS:
                self.send(one, ALIVE, b"")

    def send(self, one: Neighbour, kind: int, data: Buffer) -> Transfer | None:
        """None: it is lost."""
        if one.lost:
            return None
        one.said = self._clock()
        return self._start(one, data, lambda: self._channel.send(one.rank, kind, data))

    def receive(self, one: Neighbour, data: Buffer) -> Transfer | None:
        """The message at ``one.head``, into ``data`` of its size. None: it is lost."""
        kind, _ = one.head
        one.head = None
        return self._start(one, data, lambda: self._channel.receive(one.rank, kind, data))

    def say_last(self, kind: int, data: bytes = b"") -> None:
        """The last word to all that have not got one. An error and its text are for those below."""
        for one in self.all:
            if one is self.parent:
                self._say_last(one, GONE if kind == ERROR else kind)
            else:
                self._say_last(one, kind, data)

    def leave_parent(self) -> None:
        self._say_last(self.parent, GONE)

    def parted(self) -> bool:
        """Whether all last words are said and heard, both ways. What comes before them is dropped."""
        self.attend()
        if self.parent and self.parent.head:
            self.receive(self.parent, bytearray(self.parent.head[1]))
        return all(one.lost or (one.told and not one.open and not one.transfers) for one in self.all)

    def give_up(self) -> None:
        """Those that have not parted."""
        for one in self.all:
            if one.open or one.transfers:
                self._give_up(one)

    def _say_last(self, one: Neighbour, kind: int, data: bytes = b"") -> None:
        if not one.told:
            one.told = True
            self.send(one, kind, data)

    def _hear(self, one: Neighbour) -> None:
        try:
            while not one.lost:
                if one.word:
                    kind, transfer = one.word
                    if not transfer.over():
                        return
                    one.word = None
                    self._take(one, kind, transfer.data)
                elif one.head or not one.open or (found := self._channel.probe(one.rank)) is None:
                    return
                else:
                    one.heard, one.head = self._clock(), found
                    if found[0] not in (VALUE, BLOCK):
                        transfer = self.receive(one, bytearray(found[1]))
                        one.word = transfer and (found[0], transfer)
        except ConnectionError:
            self._give_up(one)

    def _take(self, one: Neighbour, kind: int, data: Buffer) -> None:
        if kind == ALIVE:
            return
        one.last = kind
        if one is not self.parent and kind != DONE:
            self._say_last(one, GONE)  # it has stopped, and waits for that
        elif one is self.parent and kind == ERROR:
            self.error = JobError(*pickle.loads(data))
        elif one is self.parent and kind == DONE:
            self.digest = bytes(data)

    def _start(self, one: Neighbour, data: Buffer, start: Callable[[], Test]) -> Transfer | None:
        try:
            transfer = Transfer(data, start())
        except ConnectionError:
            self._give_up(one)
            return None
        one.transfers.append(transfer)
        return transfer

    def _give_up(self, one: Neighbour) -> None:
        one.lost = True
        for transfer in one.transfers:
            transfer.failed = True
            self._channel.abandon(transfer.data)
        one.transfers = []
