"""Requests that are all in hand, through an engine: no files, no chunks, nobody who could interrupt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from batchinfer.types import Completion, Request


class Engine(Protocol):
    """What of an engine this needs (engine/engine.py)."""

    @property
    def num_open(self) -> int: ...

    @property
    def wants_more(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def step(self) -> list[Completion]: ...


def steps(engine: Engine, requests: Iterable[Request]) -> Iterator[list[Completion]]:
    """Give the engine requests as it wants them, and yield what each step completed, until all have come out."""
    waiting = list(requests)
    waiting.reverse()
    while waiting or engine.num_open:
        while waiting and engine.wants_more:
            engine.add(waiting.pop())
        yield engine.step()
