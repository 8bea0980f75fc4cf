"""Ranks that talk, for test_ranks.py: run it under mpiexec."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from batchinfer.cluster.world import join

world = join("auto")
large = world.bcast({"bytes": bytes(range(256)) * 20_000} if world.rank == 0 else None)
assert large == {"bytes": bytes(range(256)) * 20_000}
assert 0 <= world.local_rank < world.local_size <= world.size

for i in range(50):
    if world.rank != 0:
        world.send(0, (i, "x" * i))
first = world.gather(world.rank)
second = world.gather(world.rank * 10)  # may begin on one rank while another is in the first
if world.rank == 0:
    assert first == list(range(world.size))
    assert second == [10 * rank for rank in first]
    got: dict[int, list] = {rank: [] for rank in range(1, world.size)}
    while (message := world.receive()) is not None:  # all that was sent before the gathers is here
        got[message[0]].append(message[1])
    assert all(messages == [(i, "x" * i) for i in range(50)] for messages in got.values())
    print("all arrived", len(got))
else:
    assert first is None
