"""Who computes which chunk, where nobody hands them out: processes without MPI, and ranks that have lost rank 0.

Each process takes its own share, then what is missing of the others'. Only the output folder tells what is done; two
processes may compute the same chunk, and the first commit wins.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batchinfer.types import Chunk, ExitCode, JobError

SURVEY_SECONDS = 5.0
"""Between two looks whether the others have finished the job: a listing of the output folder each."""


@dataclass(frozen=True)
class Share:
    """This process is number ``task`` (from 0) of ``tasks`` that do the job together."""

    task: int = 0
    tasks: int = 1


def array_share(environment: Mapping[str, str] | None = None) -> Share | None:
    """The place among the processes that Slurm started without MPI: the tasks of a job array, the tasks of a step, or
    steps of several tasks in an array. None outside Slurm, and for a step of one task. JobError(69) for numbers that
    make no sense.

    Array ids run from a minimum in steps (``--array=10-50:10`` is five tasks), or are a list with holes: then a share
    has two tasks or none, which stealing makes good."""
    env = os.environ if environment is None else environment
    try:
        rank, ranks = (int(env.get(name, default)) for name, default in (("SLURM_PROCID", "0"), _tasks_of(env)))
        if "SLURM_ARRAY_TASK_ID" not in env:
            return Share(rank, ranks) if ranks > 1 else None
        number, count, first, step = (
            int(env.get(f"SLURM_ARRAY_TASK_{name}", default))
            for name, default in (("ID", ""), ("COUNT", "1"), ("MIN", "0"), ("STEP", "1"))
        )
        return Share((number - first) // step % count * ranks + rank, count * ranks)
    except (ValueError, ZeroDivisionError):
        names = ("SLURM_ARRAY_TASK_", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
        given = ", ".join(f"{key}={value}" for key, value in sorted(env.items()) if key.startswith(names))
        raise JobError(f"these are no numbers of a job array: {given}; unset them", ExitCode.UNFIT) from None


def _tasks_of(env: Mapping[str, str]) -> tuple[str, str]:
    """Where the number of tasks stands, and its default. In the batch script itself there is one."""
    return ("SLURM_STEP_NUM_TASKS", "1") if "SLURM_STEP_ID" in env else ("", "1")


def in_order(chunks: Sequence[Chunk], share: Share) -> tuple[list[Chunk], list[Chunk]]:
    """(own chunks, chunks to steal), in the order in which this process tries them. It begins to steal with the next
    task's share, and takes each from its end, which its owner reaches last."""
    shares: list[list[Chunk]] = [[] for _ in range(share.tasks)]
    for chunk in chunks:
        shares[chunk.index % share.tasks].append(chunk)
    others = [(share.task + i) % share.tasks for i in range(1, share.tasks)]
    return shares[share.task], [chunk for other in others for chunk in reversed(shares[other])]


class ArrayDispatcher:
    """A Dispatcher without messages. ``chunks`` were missing at the start; ``exists`` says whether one is committed
    by now, ``missing`` which ones are not. ``held``: indices of chunks that this process computes already."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        share: Share,
        exists: Callable[[Chunk], bool],
        missing: Callable[[], list[Chunk]],
        held: Iterable[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        self._open = set(held)
        own, others = in_order([chunk for chunk in chunks if chunk.index not in self._open], share)
        self._own, self._others = deque(own), deque(others)
        self._exists, self._missing, self._clock = exists, missing, clock
        self._surveyed = clock()
        self._all_there = False
        self.reports: list[Any] = [None]
        self.lost: set[int] = set()
        self.draining = False

    @property
    def finished(self) -> bool:
        return self._all_there or not (self._own or self._others or self._open)

    def next_chunk(self, hungry: bool) -> Chunk | None:
        """Of the own share ahead of need; of the others' only when there is nothing left to do."""
        waiting = self._own or (self._others if hungry and not self._open else None)
        while waiting:
            chunk = waiting.popleft()
            if not self._exists(chunk):
                self._open.add(chunk.index)
                return chunk
        return None

    def done(self, chunk: Chunk, report: Any) -> None:
        self.reports = [report]
        self._open.discard(chunk.index)

    def poll(self, report: Any) -> None:
        self.reports = self.reports if report is None else [report]
        now = self._clock()
        if now - self._surveyed >= SURVEY_SECONDS:
            self._surveyed = now
            self._all_there = not self._missing()

    def drain(self) -> None:
        """Nobody else to tell."""
        self.draining = True

    def gather(self, value: Any, seconds: float) -> list[Any]:
        """Nobody else's value."""
        return [value]

    def release(self, value: Any) -> None:
        """Nobody waits."""
