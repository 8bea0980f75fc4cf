"""The plan: which rows make which chunk, and what the results depend on. Made at the first start and never changed."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from batchinfer.data.tables import InputFile
from batchinfer.types import Chunk

SCHEMA_VERSION = 1
MAX_DIFFERENCES = 20  # lines of a table that a person still reads
MAX_VALUE = 60  # characters per cell


@dataclass(frozen=True)
class Plan:
    """``fingerprint`` holds everything beside the input files that decides the results (nested dicts of JSON values);
    ``numeric`` holds what may change results in their last bits: compared, but no part of the plan's identity. ``free``
    is recorded and never compared. ``chunks`` cover all rows of all files, in order. ``extends``: (id, number
    of chunks) of the plans that this one continues with further files, oldest first."""

    files: tuple[InputFile, ...]
    chunks: tuple[Chunk, ...]
    rows_per_chunk: int
    fingerprint: dict[str, Any]
    free: dict[str, Any] = field(default_factory=dict)
    extends: tuple[tuple[str, int], ...] = ()
    numeric: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """SHA-256 (hex) over everything but ``numeric``, ``free`` and the input's root folder."""
        content = [SCHEMA_VERSION, [_file_json(f) for f in self.files], _chunks_json(self.chunks), self.fingerprint]
        content += [self.extends] if self.extends else []
        return hashlib.sha256(_json(content, sort_keys=True)).hexdigest()

    def owner(self, chunk: Chunk) -> str:
        """Id of the plan that the chunk's part names: the first one that has the chunk."""
        return next((plan for plan, chunks in self.extends if chunk.index < chunks), self.id)

    @property
    def earlier(self) -> set[str]:
        """Ids of the plans that this one extends."""
        return {plan for plan, _ in self.extends}

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    def with_root(self, root: str) -> Plan:
        """The same plan for an input that lies in another folder now."""
        return replace(self, files=tuple(replace(file, root=root) for file in self.files))

    def to_json(self) -> bytes:
        return _json(
            {
                "schema_version": SCHEMA_VERSION,
                "id": self.id,
                "rows": self.rows,
                "rows_per_chunk": self.rows_per_chunk,
                "fingerprint": self.fingerprint,
                "free": self.free,
                "extends": self.extends,
                "numeric": self.numeric,
                "input_root": self.files[0].root,
                "files": [_file_json(file) for file in self.files],
                "chunks": _chunks_json(self.chunks),
            }
        )

    @staticmethod
    def from_json(data: bytes) -> Plan:
        """ValueError if this is no plan, not a plan of this version, or a damaged one."""
        try:
            content = json.loads(data)
            if content["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"its schema version is {content['schema_version']}, this program's {SCHEMA_VERSION}")
            root = content["input_root"]
            files = [InputFile(i, root=root, **_file_fields(f)) for i, f in enumerate(content["files"])]
            chunks = [Chunk(i, *map(int, c)) for i, c in enumerate(content["chunks"])]
            extends = tuple((str(plan), int(count)) for plan, count in content["extends"])
            more = (content["rows_per_chunk"], content["fingerprint"], content["free"], extends, content["numeric"])
            plan = Plan(tuple(files), tuple(chunks), *more)
            damaged = plan.id != content["id"]
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"it is not a plan ({type(error).__name__}: {error})") from None
        if damaged:
            raise ValueError("it is damaged: its content does not have the id that it names")
        return plan


def make_plan(
    files: Sequence[InputFile],
    rows_per_chunk: int,
    fingerprint: dict[str, Any],
    free: dict[str, Any] | None = None,
    numeric: dict[str, Any] | None = None,
) -> Plan:
    """The plan of ``files``; it depends on the arguments alone, never on ranks, nodes or devices."""
    chunks: list[Chunk] = []
    for file in files:
        for start, rows in cut(file.row_group_rows, rows_per_chunk):
            chunks.append(Chunk(len(chunks), file.ordinal, start, rows))
    fingerprint = json.loads(_json(fingerprint))  # what a plan file would give back: tuples become lists
    return Plan(tuple(files), tuple(chunks), rows_per_chunk, fingerprint, free or {}, numeric=numeric or {})


def extended(planned: Plan, now: Plan) -> Plan | None:
    """``planned``, and then the files that only ``now`` has, in further chunks. None if there are none, or if anything
    else differs."""
    known = {file.path for file in planned.files}
    fresh = [file for file in now.files if file.path not in known]
    rest = replace(now, files=tuple(file for file in now.files if file.path in known))
    if not fresh or differences(planned, rest):
        return None
    files, chunks = list(planned.files), list(planned.chunks)
    for file in fresh:
        for start, rows in cut(file.row_group_rows, planned.rows_per_chunk):
            chunks.append(Chunk(len(chunks), len(files), start, rows))
        files.append(replace(file, ordinal=len(files)))
    extends = (*planned.extends, (planned.id, len(planned.chunks)))
    return replace(planned, files=tuple(files), chunks=tuple(chunks), extends=extends)


def cut(groups: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """(start, rows) of pieces of at most ``most`` rows that cover row groups of the given sizes.

    Small row groups are taken together whole; large ones are cut into pieces of nearly equal size. So no piece has
    parts of two row groups, and none is a small remainder.
    """
    start = rows = 0
    for group in groups:
        if rows and rows + group > most:
            yield start, rows
            start, rows = start + rows, 0
        if group > most:
            pieces = -(-group // most)
            bounds = [start + group * i // pieces for i in range(pieces + 1)]
            yield from ((low, high - low) for low, high in itertools.pairwise(bounds))
            start += group
        else:
            rows += group
    if rows:
        yield start, rows


def differences(planned: Plan, now: Plan) -> list[tuple[str, str, str]]:
    """(field, planned, now) for everything that would change the results. How rows are cut into chunks does not."""
    old = {file.path: _short_file(file) for file in planned.files}
    new = {file.path: _short_file(file) for file in now.files}
    found = [
        (f"input file {path}", old.get(path, "absent"), new.get(path, "absent"))
        for path in [*old, *(path for path in new if path not in old)]
        if old.get(path) != new.get(path)
    ]
    return found + _field_differences(planned.fingerprint, now.fingerprint)


def numeric_differences(planned: Plan, now: Plan) -> list[tuple[str, str, str]]:
    """(field, planned, now) for what may change results in their last bits."""
    return _field_differences(planned.numeric, now.numeric)


def _field_differences(planned: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str, str]]:
    old, new = dict(_flat(planned)), dict(_flat(now))
    pairs = [(name, old.get(name, "absent"), new.get(name, "absent")) for name in dict.fromkeys([*old, *new])]
    return [(name, a, b) for name, a, b in pairs if a != b]


def difference_table(found: Sequence[tuple[str, str, str]]) -> str:
    """Aligned lines with the columns field, planned, now."""
    shown = [("field", "planned", "now"), *found[:MAX_DIFFERENCES]]
    cells = [[name, *_shortened(planned, now)] for name, planned, now in shown]
    widths = [max(len(line[i]) for line in cells) for i in range(3)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    more = len(found) - MAX_DIFFERENCES
    return "\n".join([*lines, f"... and {more} more"] if more > 0 else lines)


def _shortened(planned: str, now: str) -> tuple[str, str]:
    """Both values from shortly before the first difference, at most MAX_VALUE characters of each."""
    same = next((i for i, (a, b) in enumerate(zip(planned, now, strict=False)) if a != b), min(len(planned), len(now)))
    skip = same - 10 if same > 20 and max(len(planned), len(now)) > MAX_VALUE else 0
    cut_front = [("..." if skip else "") + value[skip:] for value in (planned, now)]
    first, second = (v if len(v) <= MAX_VALUE else v[: MAX_VALUE - 3] + "..." for v in cut_front)
    return first, second


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    else:
        yield name, _json(value).decode()


def _file_json(file: InputFile) -> dict[str, Any]:
    return {k: v for k, v in asdict(replace(file, schema=None)).items() if k not in ("ordinal", "root", "schema")}


def _file_fields(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "row_group_rows": tuple(content["row_group_rows"])}


def _short_file(file: InputFile) -> str:
    parts = "".join(f", {k}={v!r}" for k, v in file.partitions.items())
    return f"{file.rows} rows, {file.bytes} bytes, footer {file.digest[:12]}{parts}"


def _chunks_json(chunks: Sequence[Chunk]) -> list[list[int]]:
    return [[c.file, c.start, c.rows] for c in chunks]


def _json(value: Any, sort_keys: bool = False) -> bytes:
    return json.dumps(value, sort_keys=sort_keys, allow_nan=False, separators=(",", ":")).encode()
