"""The Python side of shim.c: building it, arming it in a process, reading its record of calls."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SOURCE = Path(__file__).with_name("shim.c")
KINDS = ("none", "kill before", "kill after", "refused", "lost", "replayed", "short")
FOR_EVER = 2**62

Kind = Literal["none", "kill before", "kill after", "refused", "lost", "replayed", "short"]


@dataclass(frozen=True)
class Fault:
    """What happens to the calls with the numbers ``first`` to ``last`` (from 1) below the output folder.

    refused: not done, error returned; lost: done, error returned; replayed: done, and the error is the one that a
    server gives which carries the same request out again; short: half of the data. ``call``: count this call alone.
    ``reads``: count calls that change nothing as well. ``record``: file that gets a line per counted call. ``denied``:
    calls that are not there at all, and say ``denied_error``.
    """

    kind: Kind = "none"
    first: int = 0
    last: int = 0
    error: int = errno.EIO
    call: str = ""
    reads: bool = False
    record: str = ""
    denied: tuple[str, ...] = ()
    denied_error: int = errno.EPERM


@dataclass(frozen=True)
class Call:
    """A line of the record: ``path`` (and ``other``, the second of two) are relative to the root."""

    number: int
    name: str
    path: str
    other: str = ""


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build(folder: Path) -> Path:
    """The shared object, made in ``folder``."""
    target = folder / "shim.so"
    command = [compiler(), "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", str(target), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return target


def arm(root: str, fault: Fault) -> None:
    """Start counting in this process, which was started with the shim in LD_PRELOAD."""
    library: Any = ctypes.CDLL(os.environ["LD_PRELOAD"])
    record = os.open(fault.record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if fault.record else -1
    kind = KINDS.index(fault.kind)
    library.shim_deny(" ".join(fault.denied).encode(), fault.denied_error)
    library.shim_arm.argtypes = [ctypes.c_char_p] * 2 + [ctypes.c_long] * 2 + [ctypes.c_int] * 4
    library.shim_arm(
        os.fsencode(root), fault.call.encode(), fault.first, fault.last, kind, fault.error, fault.reads, record
    )


def read_record(record: Path, root: Path) -> list[Call]:
    """The calls in the order in which they began; of a process that died, one or two may be missing at the end."""
    calls = []
    for line in record.read_text().splitlines():
        number, name, path, other = line.split("\t")
        calls.append(
            Call(int(number), name, os.path.relpath(path, root), os.path.relpath(other, root) if other else "")
        )
    return calls
