"""Where compiled kernels are kept: on the node, a folder for each of its ranks. Triton's own place is in $HOME, which
the nodes of a job share over the network, and ranks that fill one folder at once have met half-written files there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

VARIABLE = "TRITON_CACHE_DIR"


def use_local_cache(rank: int, environment: MutableMapping[str, str] = os.environ, temporary: str = "") -> Path:
    """Name the folder of the node's rank ``rank`` to Triton and return it; one that is given already stays.

    It lies in $TMPDIR (``temporary``), outlives the job and serves the next one. What another user has put in its place
    is not touched: then a new folder serves this process alone.
    """
    if environment.get(VARIABLE):
        return Path(environment[VARIABLE])
    base = Path(temporary or tempfile.gettempdir())
    mine = base / f"batchinfer-triton-{os.getuid()}"
    try:
        mine.mkdir(mode=0o700, exist_ok=True)
        status = mine.lstat()
        usable = status.st_uid == os.getuid() and not mine.is_symlink() and not status.st_mode & 0o022
    except OSError:
        usable = False
    folder = mine / f"rank{rank}" if usable else Path(tempfile.mkdtemp(prefix="batchinfer-triton-", dir=base))
    folder.mkdir(exist_ok=True)
    environment[VARIABLE] = str(folder)
    return folder
