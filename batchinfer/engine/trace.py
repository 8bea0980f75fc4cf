"""A timeline of the engine's steps, for chrome://tracing or ui.perfetto.dev: the JSON array form of Google's "Trace
Event Format". What the host does in a step is one track, what the device computes another."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import PurePath

from batchinfer.types import ExitCode, JobError

BUFFERED = 4096
"""Events between two writes: half a megabyte, so that a step never waits for the file system."""

TRACKS = ("host", "device")


def path_of_rank(path: str, rank: int) -> str:
    """The file of one rank: its number stands before the ending."""
    name = PurePath(path)
    return str(name.with_name(f"{name.stem}.{rank}{name.suffix}"))


class Trace:
    """Events into a file. Raises JobError (73) if it can't be made; a write that fails later ends the trace and nothing
    else. The file is good for the viewers also without its last bytes, after a crash."""

    def __init__(self, path: str):
        try:
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (open until close)
        except OSError as error:
            raise JobError(f"engine.profile={path!r} can't be written: {error}", ExitCode.OUTPUT) from None
        self._lines = [
            {"ph": "M", "name": "thread_name", "pid": os.getpid(), "tid": tid, "args": {"name": track}}
            for tid, track in enumerate(TRACKS)
        ]
        self._separator = "[\n"
        self._ended = False

    def span(self, track: str, name: str, begin: float, end: float, **args: int) -> None:
        """Something that lasted from ``begin`` to ``end``, seconds of time.perf_counter(); on one track spans follow or
        contain one another. ``args`` are shown with it."""
        times = {"ts": round(begin * 1e6, 3), "dur": round((end - begin) * 1e6, 3)}
        event = {"ph": "X", "name": name, "pid": os.getpid(), "tid": TRACKS.index(track), **times, "args": args}
        self._lines.append(event)
        if len(self._lines) >= BUFFERED:
            self._write()

    def close(self) -> None:
        """Write the rest. Once, and the last call."""
        self._write("\n]\n")
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, end: str = "") -> None:
        text = ",\n".join(json.dumps(line) for line in self._lines)
        self._lines = []
        if self._ended:
            return
        try:
            self._file.write((self._separator + text if text else "") + end)
            self._file.flush()
        except OSError as error:
            self._ended = True
            print(f"batchinfer: engine.profile={self._file.name} ends here: {error}", file=sys.stderr, flush=True)
        self._separator = ",\n"
