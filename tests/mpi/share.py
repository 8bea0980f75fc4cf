"""Ranks that share the packed weights of MODEL, for test_sharing.py: run under mpiexec, or without MPI as RANK of SIZE.

Each prints a digest of what its engine generates, the bytes of shared weights in its memory, its share of them (PSS),
and how many weight files it has opened. FAIL_WHEN befalls rank 0 when it has packed five weights.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np

from batchinfer.cluster import neighbours
from batchinfer.cluster.binding import place
from batchinfer.cluster.sharing import leaders, sharing
from batchinfer.cluster.tree import tree
from batchinfer.cluster.weights import WeightStream
from batchinfer.cluster.world import join
from batchinfer.config import EngineConfig, ModelConfig
from batchinfer.engine.loading import load_engine
from batchinfer.engine.no_text import NoText
from batchinfer.ops.shared import Filling
from batchinfer.types import Request, SamplingParams

MODEL, JOB = sys.argv[1], sys.argv[2]
neighbours.ALIVE_SECONDS, neighbours.PATIENCE_SECONDS = 0.2, 4.0
opened: set[str] = set()
world = join("auto")
rank, size = int(os.environ.get("RANK", world.rank)), int(os.environ.get("SIZE", world.size))


def note(event: str, arguments: tuple) -> None:
    if event == "open" and str(arguments[0]).endswith(".safetensors"):
        opened.add(str(arguments[0]))


def befall(fate: str) -> None:
    put = Filling.put

    def last(self: Filling, *arguments: object) -> None:
        put(self, *arguments)
        if len(self._entries) == 5:
            os.kill(os.getpid(), signal.SIGKILL if fate == "killed" else signal.SIGSTOP)

    Filling.put = last


def shared_bytes() -> tuple[int, int]:
    """RSS and PSS of the mapped weights."""
    found = [0, 0]
    for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if "memfd:batchinfer-weights" in mapping:
            for i, field in enumerate(("Rss", "Pss")):
                found[i] += 1024 * int(re.search(rf"(?m)^{field}:\s+(\d+) kB", mapping)[1])
    return found[0], found[1]


sys.addaudithook(note)
if rank == 0 and os.environ.get("FAIL_WHEN"):
    befall(os.environ["FAIL_WHEN"])
leader = leaders([place(world.hostname, rank, gpus=False, shares=True)] * size)
links = tree([world.hostname] + [None] * (size - 1), 64)
with (
    sharing(JOB, leader, rank, lambda: False) as shared,
    WeightStream(links[rank], world.channel, sharing=shared) as source,
):
    config = EngineConfig(device="cpu", threads=1, num_pages=64)
    engine = load_engine(ModelConfig(MODEL), config, tokenizer=NoText(), source=source)
for i in range(4):
    engine.add(
        Request(i, np.arange(1, 20 + 7 * i, dtype=np.int32), SamplingParams(max_tokens=20, ignore_eos=True), seed=i)
    )
digest = hashlib.sha256()
while engine.num_open:
    for completion in engine.step():
        digest.update(str((completion.id, list(completion.samples[0].token_ids))).encode())
whole = "FAIL_WHEN" not in os.environ
if whole:
    world.gather(rank)
    world.bcast(None)  # all map the weights
resident, own = shared_bytes()
if whole:
    world.gather(rank)
loaded = source.loaded and source.loaded.digest[:8]
os.write(1, f"{digest.hexdigest()}|{resident}|{own}|{len(opened)}|{loaded}\n".encode())
world.leave(0, whole)
