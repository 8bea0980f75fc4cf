"""Requests that are all in hand, through an engine: no files, no chunks, nobody who could interrupt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from batchinfer.engine.planner import Planner
from batchinfer.types import Completion, Request


class Engine(Protocol):
    """What of an engine this needs (engine/engine.py)."""

    max_slots: int
    kv_tokens: int

    @property
    def num_open(self) -> int: ...

    @property
    def wants_more(self) -> bool: ...

    def expected_tokens(self, request: Request) -> int: ...

    def add(self, request: Request) -> None: ...

    def step(self) -> list[Completion]: ...


def steps(engine: Engine, requests: Iterable[Request], reorder: bool = True) -> Iterator[list[Completion]]:
    """Give the engine requests as it wants them, and yield what each step completed, until all have come out.
    ``reorder``: in the order of the planner."""
    planner = Planner(engine, reorder)
    planner.add(requests)
    while len(planner) or engine.num_open:
        while engine.wants_more and (request := planner.next(more=False)) is not None:
            engine.add(request)
        yield engine.step()
