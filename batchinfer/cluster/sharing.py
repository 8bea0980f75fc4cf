"""One copy of the packed weights for the ranks of a NUMA domain: the first of them packs, and hands the memory on.

What it hands on is the descriptor of an anonymous file, over a Unix socket in Linux' abstract name space. That takes no
file and no common PID namespace, the kernel tells each end whose process the other one is, and both ends hear at once
when the other one dies. A rank that gets nothing packs a copy of its own; once it has the memory it needs nobody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Event, Thread

from batchinfer.cluster import neighbours
from batchinfer.cluster.binding import Place
from batchinfer.cluster.weights import STOP_SECONDS, Loaded, LoadingStopped

ALIVE, READY = b"alive", b"ready"
"""Messages of the leader. READY is followed by JSON of what it has loaded, and carries the descriptor."""

MESSAGE_BYTES = 4096

GPUS = ("nvidiactl", "kfd", "dri/renderD128")
"""What Linux has in /dev where there is a GPU to compute on."""


def no_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether this process would not find one."""
    return not any((devices / name).exists() for name in GPUS)


def leaders(places: Sequence[Place]) -> list[int]:
    """For each rank the one whose packed weights it uses: the first of its host with the same NUMA domains, or itself
    where it is not to share."""
    first: dict[tuple[str, tuple[int, ...]], int] = {}
    return [first.setdefault((at.host, at.numa), rank) if at.shares else rank for rank, at in enumerate(places)]


def address(job: str, leader: int) -> str:
    """Where a leader listens. ``job`` is the same on all its ranks, and no other job's."""
    return f"\0batchinfer-{hashlib.sha256(job.encode()).hexdigest()[:24]}-{leader}"


def sharing(
    job: str, leader: Sequence[int], rank: int, stop: Callable[[], bool]
) -> AbstractContextManager[Leader | Follower | None]:
    """This rank's end. ``leader`` as from :func:`leaders`, of those that begin together; None for a rank that has no
    others to share with, or is none of them."""
    if rank >= len(leader) or leader.count(leader[rank]) == 1:
        return contextlib.nullcontext()
    name = address(job, leader[rank])
    if leader[rank] != rank:
        return contextlib.nullcontext(Follower(name, stop))
    return Leader(name, leader.count(rank) - 1)


class Leader:
    """Packs for ``followers`` other ranks, which ask at ``name``; they are answered in a thread. When it is closed
    (``with``) before it has given anything, they hear that nothing will come; what is given still reaches those that
    come later."""

    leads = True

    def __init__(self, name: str, followers: int):
        self._left = followers
        self._gift: tuple[bytes, int] | None = None
        self._closed = Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._listener.bind(name)
        self._listener.listen(followers)
        self._listener.settimeout(STOP_SECONDS)
        self._thread = Thread(target=self._serve, name="weights-share", daemon=True)

    def __enter__(self) -> Leader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._gift is None:
            self._thread.join()

    def take(self) -> tuple[None, None]:
        """Nobody packs for this rank."""
        return None, None

    def give(self, fd: int, loaded: Loaded | None) -> None:
        """Hand on the memory ``fd``, which belongs to this object then, and what has been ``loaded`` for it."""
        self._gift = READY + json.dumps(loaded and dataclasses.asdict(loaded)).encode(), fd

    def _serve(self) -> None:
        waiting: list[socket.socket] = []
        said = time.monotonic()
        while self._left > 0 and (self._gift or not self._closed.is_set()):
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                if _user(connection) == os.getuid():
                    waiting.append(connection)
            if self._gift:
                message, fd = self._gift
                for one in waiting:
                    _send(one, message, fd)
                    one.close()
                self._left -= len(waiting)
                waiting = []
            elif time.monotonic() - said > neighbours.ALIVE_SECONDS:
                said = time.monotonic()
                for one in waiting:
                    _send(one, ALIVE)
        for one in (*waiting, self._listener):
            one.close()
        if self._gift:
            os.close(self._gift[1])


class Follower:
    """Takes the memory of the leader that listens at ``name``. ``stop``: asked while nothing comes; true raises
    LoadingStopped."""

    leads = False

    def __init__(self, name: str, stop: Callable[[], bool] = lambda: False):
        self._name, self._stop = name, stop

    def give(self, fd: int, loaded: Loaded | None) -> None:
        raise ValueError("nobody waits for these weights")

    def take(self) -> tuple[int | None, Loaded | None]:
        """The descriptor of the memory, the caller's to close, and what the leader has loaded. None: it has stopped, is
        silent, or can't be reached; a line says so."""
        self._heard = time.monotonic()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as line:
                line.settimeout(STOP_SECONDS)
                self._connect(line)
                return self._receive(line)
        except OSError as error:
            text = f"no weights are shared with this process on {os.uname().nodename} ({error}): it packs its own"
            print(f"batchinfer: {text}", file=sys.stderr, flush=True)
            return None, None

    def _connect(self, line: socket.socket) -> None:
        """Leaders may start later than their followers."""
        while True:
            try:
                line.connect(self._name)
            except ConnectionRefusedError:
                self._wait()
                time.sleep(STOP_SECONDS)
            else:
                break
        if _user(line) != os.getuid():
            raise PermissionError("another user's process has the leader's address")

    def _receive(self, line: socket.socket) -> tuple[int, Loaded | None]:
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(line, MESSAGE_BYTES, 1)
            except TimeoutError:
                self._wait()
                continue
            if not message:
                raise ConnectionError("the rank that packs them has stopped")
            self._heard = time.monotonic()
            if fds:
                values = json.loads(message.removeprefix(READY))
                return fds[0], values and Loaded(**values)

    def _wait(self) -> None:
        if self._stop():
            raise LoadingStopped
        if time.monotonic() - self._heard > neighbours.PATIENCE_SECONDS:
            raise TimeoutError("the rank that packs them is silent")


def _send(line: socket.socket, message: bytes, *fds: int) -> None:
    with contextlib.suppress(OSError):  # the other end has died
        socket.send_fds(line, [message], fds)


def _user(line: socket.socket) -> int:
    """Of the process at the other end (``man 7 unix``)."""
    _, uid, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return uid
