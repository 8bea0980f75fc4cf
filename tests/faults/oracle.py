"""Is an output folder right? Checks that know nothing of the product but its file names and its row identities.

I1 the rows of all parts are those of the input, each once; I2 every part passes full verification; I3 every answer is
the stub engine's function of its row; I4 the error rows are the planted ones; I5 nothing was written outside the output
folder; I6 what was published never changes; I7 every process ended within its bound (harness.wait); I8 exit codes are
those that the fault allows.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fake_engine import POISON, answer

from batchinfer.data.audit import verify
from batchinfer.types import ROW_BITS, ExitCode

PART = re.compile(r"part-[0-9]{6}\.parquet")
MAX_TOKENS = 16


@dataclass(frozen=True)
class Expected:
    """The output that a job over ``folder`` must have: ``rows[uid]`` is its (prompt, generated_text, error_code)."""

    rows: dict[int, tuple[str | None, str | None, str | None]]


def expect(folder: Path, seed: int = 0) -> Expected:
    """Read the input (columns uid and prompt) and say what the stub engine answers, without any code of a job but the
    published rule of a row's seed."""
    rows = {}
    for ordinal, path in enumerate(sorted(folder.glob("*.parquet"))):
        table = pq.read_table(path)
        for index, (uid, prompt) in enumerate(zip(table["uid"].to_pylist(), table["prompt"].to_pylist(), strict=True)):
            if uid != (ordinal << ROW_BITS | index):
                raise ValueError(f"{path}: row {index} has uid {uid}")
            rows[uid] = (prompt, *_answer(prompt, seed, uid))
    return Expected(rows)


def _answer(prompt: str | None, seed: int, uid: int) -> tuple[str | None, str | None]:
    """(generated_text, error_code)."""
    if prompt is None:
        return None, "NULL_PROMPT"
    if prompt == "":
        return None, "EMPTY_PROMPT"
    if POISON in prompt:
        return None, "KV_CAPACITY"
    ids = np.frombuffer(prompt.encode(), np.uint8)
    digest = hashlib.sha256(b"batchinfer row" + struct.pack("<QQ", seed, uid)).digest()
    return bytes(answer(ids, int.from_bytes(digest[:8], "little"), 0, MAX_TOKENS).astype(np.uint8)).decode(), None


@dataclass
class Witness:
    """Sees an output folder again and again while jobs work on it, and the folder around it."""

    output: Path
    expected: Expected
    _published: dict[str, tuple[int, str]] = field(default_factory=dict)  # name -> (inode, SHA-256)
    _around: dict[str, str] | None = None

    def __post_init__(self) -> None:
        self._around = self._outside()

    def look(self) -> set[str]:
        """After any end of any process: what is published is whole, right, and as it was (I2-I6). Its part names."""
        parts = {path.name: path for path in self.output.glob("part-*")} if self.output.exists() else {}
        if (self.output / "_SUCCESS").exists():
            parts["_SUCCESS"] = self.output / "_SUCCESS"
        now = {name: (path.stat().st_ino, _digest(path)) for name, path in parts.items()}
        for name, before in self._published.items():
            assert now.get(name) == before, f"I6: {name} has changed, or is gone"
        fresh = [name for name in now if name not in self._published]
        self._published = now
        for name in fresh:
            if name != "_SUCCESS":
                assert PART.fullmatch(name), f"{name} is no name of a part"
                self._check_rows(pq.read_table(parts[name], page_checksum_verification=True).to_pylist())
        if (self.output / "_batchinfer" / "plan.json").exists():
            report = verify(str(self.output))
            assert report.ok, f"I2: {report}"
        else:
            assert not parts, "parts without a plan"
        assert self._outside() == self._around, "I5: something was written outside the output folder"
        return set(now)

    def complete(self) -> None:
        """After a job that said it is complete: nothing is missing, nothing is there twice, no scrap is left."""
        names = self.look()
        assert "_SUCCESS" in names
        uids = Counter(uid for name in names if name != "_SUCCESS" for uid in self._uids(self.output / name))
        assert uids == Counter(self.expected.rows.keys()), "I1: " + _difference(uids, self.expected.rows)
        report = verify(str(self.output))
        assert (report.ok, report.rows_missing, report.rows_doubled) == (True, 0, 0), f"I2: {report}"

    def _check_rows(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            found = (row["prompt"], row["generated_text"], row["error_code"])
            assert found == self.expected.rows[row["uid"]], f"I3/I4: row {row['uid']} is {found}"
            assert row["status"] == ("error" if row["error_code"] else "ok")

    @staticmethod
    def _uids(path: Path) -> list[int]:
        return pq.read_table(path, columns=["uid"])["uid"].to_pylist()

    def _outside(self) -> dict[str, str]:
        """Every file of the folder in which the output lies, the output left out."""
        found = {}
        for here, folders, names in os.walk(self.output.parent):
            folders[:] = [name for name in folders if Path(here, name) != self.output]
            found |= {str(Path(here, name)): _digest(Path(here, name)) for name in names}
            found |= {str(Path(here, name)): "" for name in folders}
        return found


def allowed(code: int, codes: Iterable[int], what: str) -> None:
    """I8."""
    assert code in set(codes), f"I8: exit code {code} after {what}; allowed: {sorted(set(codes))}"


ANY_IO = (ExitCode.COMPLETE, ExitCode.OUTPUT, ExitCode.IO)
"""A failed call is either made good, or the job ends with the code for a place or for an operation that fails."""


def write_inputs(folder: Path, rows: Iterable[int] = (34, 26), poison: bool = True) -> Path:
    """Input files of so many rows; with ``poison``, up to three rows of the first can't be answered."""
    folder.mkdir(parents=True)
    for ordinal, count in enumerate(rows):
        prompts: list[str | None] = [f"file {ordinal} row {i} {'y' * (i % 13)}" for i in range(count)]
        if poison and ordinal == 0:
            planted = {3: None, 11: "", 17: f"a {POISON} here"}
            prompts = [planted.get(i, prompt) for i, prompt in enumerate(prompts)]
        uids = pa.array([ordinal << ROW_BITS | i for i in range(count)], pa.uint64())
        pq.write_table(pa.table({"uid": uids, "prompt": prompts}), folder / f"{ordinal}.parquet", row_group_size=15)
    return folder


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _difference(found: Counter[int], wanted: dict[int, Any]) -> str:
    doubled = [uid for uid, count in found.items() if count > 1]
    return (
        f"doubled {doubled[:9]}, missing {sorted(wanted.keys() - found)[:9]}, foreign {list(found - wanted.keys())[:9]}"
    )
