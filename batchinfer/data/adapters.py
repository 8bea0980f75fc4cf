"""Which of the model's adapters a row goes through."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pyarrow as pa

from batchinfer.data.reader import python_values
from batchinfer.data.texts import plain_text
from batchinfer.types import Completion, ErrorCode, Request, RowError


class AdapterChoice:
    """Adapters are numbered in the order of their names, as the engine has them."""

    def __init__(self, names: Iterable[str], column: str | None):
        """Without a ``column`` all rows go through the one that there is, or through none."""
        self._numbers = {name: number for number, name in enumerate(sorted(names))}
        self._column = column

    def choose(self, rows: pa.Table, built: Sequence[Request | Completion]) -> list[Request | Completion]:
        """The requests of the rows, with their adapters; a name that there is not makes the row an error."""
        if not self._numbers:
            return list(built)
        if self._column is None:
            return [replace(row, adapter=0) if isinstance(row, Request) else row for row in built]
        names = python_values(rows[self._column])
        return [self._chosen(row, name) for row, name in zip(built, names, strict=True)]

    def _chosen(self, row: Request | Completion, value: object) -> Request | Completion:
        if isinstance(row, Completion) or value is None:
            return row
        name = plain_text(value)
        if isinstance(name, str) and name in self._numbers:
            return replace(row, adapter=self._numbers[name])
        known = ", ".join(self._numbers)
        reason = name.message if isinstance(name, RowError) else f"there is no adapter {name!r}; there are {known}"
        error = RowError(ErrorCode.BAD_ADAPTER, f"column {self._column!r}: {reason}")
        return Completion(row.id, len(row.prompt), error=error)
