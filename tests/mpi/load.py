"""Ranks that load the weights of MODEL together, for test_weights.py: run it under mpiexec.

Each prints what it has loaded (the digest of all tensors), or why not, and how many weight files it has opened.
FAIL_WHEN befalls rank FAIL_RANK in mid-load.
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import sys

import torch

from batchinfer.cluster import neighbours
from batchinfer.cluster.tree import tree
from batchinfer.cluster.weights import WeightStream
from batchinfer.cluster.world import join
from batchinfer.models import weights
from batchinfer.models.files import OwnReading
from batchinfer.models.spec import load_spec
from batchinfer.types import JobError

MODEL, SOURCE = sys.argv[1], sys.argv[2]
FATE = os.environ.get("FAIL_WHEN", "")
opened: set[str] = set()


def note(event: str, arguments: tuple) -> None:
    if event == "open" and str(arguments[0]).endswith(".safetensors"):
        opened.add(str(arguments[0]))


sys.addaudithook(note)
weights.BLOCK_BYTES = 300_000
neighbours.ALIVE_SECONDS, neighbours.PATIENCE_SECONDS = 0.2, 4.0
world = join("auto")


def befall(tensors: int) -> None:
    if world.rank != int(os.environ.get("FAIL_RANK", -1)) or tensors != 5:
        return
    if FATE == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if FATE == "cut":
        for path in opened:
            os.truncate(path, 1_000_000)
    if FATE == "EIO":

        def broken(*_: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        os.preadv = broken
    if FATE == "leaves":
        raise JobError("no memory for this rank", 69)


links = tree([world.hostname] * world.size, 64)[world.rank]
digest = hashlib.sha256()
with WeightStream(links, world.channel) as stream:
    try:
        spec = load_spec(MODEL)
        source = stream if SOURCE == "shared" else OwnReading()
        for count, (name, tensor) in enumerate(weights.load_weights(MODEL, spec, torch.bfloat16, source)):
            digest.update(name.encode())
            digest.update(tensor.view(torch.uint8).numpy())
            befall(count)
        result = digest.hexdigest()
    except JobError as error:
        result = f"{error.exit_code} {error}"
os.write(1, f"{result}|{len(opened)}\n".encode())  # at once: the launcher mixes the lines of all ranks
world.leave(0, whole=FATE != "stopped")
