"""Per-slot sampling parameters: written once when a sequence gets its slot, gathered for the rows of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from batchinfer.ops import SampleInput
from batchinfer.types import SamplingParams

_FIELDS = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "min_tokens": np.int32,
}

History = tuple[np.ndarray, np.ndarray]
"""Prompt and generated tokens of a sequence, int32."""


RowGroups = list[tuple[int, np.ndarray]]
"""(number of an adapter, rows int64), for each adapter that has some."""


class Rows(Protocol):
    """What only the host knows of the rows that a step samples."""

    def history(self, row: int) -> History:
        """Asked for rows with penalties."""

    def allow(self, row: int, mask: np.ndarray) -> None:
        """Fill ``mask`` int32 [ceil(V / 32)], see ``SampleInput.allowed``; asked for rows with a constraint."""

    def adapters(self) -> tuple[RowGroups, RowGroups]:
        """Of the step's tokens and of its samples, the rows that go through an adapter."""

    def scored(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Tokens of the step, int32 [M], and what the text goes on with after each, int64 [M], where somebody wants
        the log-probability of that."""


class SlotTable:
    """Sampling parameters of the sequences that hold a slot, one numpy array per parameter."""

    def __init__(self, max_slots: int, vocab_size: int):
        self._columns = {name: np.zeros(max_slots, dtype) for name, dtype in _FIELDS.items()}
        self._seed = np.zeros(max_slots, np.int64)
        self._logprobs = np.full(max_slots, -1, np.int32)
        self._penalised = np.zeros(max_slots, bool)
        self._constrained = np.zeros(max_slots, bool)
        self._mask_words = -(-vocab_size // 32)
        self._stop_ids: list[np.ndarray] = [np.zeros(0, np.int32)] * max_slots

    def assign(self, slot: int, params: SamplingParams, seed: int, stop_ids: np.ndarray) -> None:
        """The sequence that takes ``slot`` samples by ``params``; ``stop_ids`` int32 are banned before min_tokens."""
        for name, column in self._columns.items():
            column[slot] = getattr(params, name)
        self._seed[slot] = np.uint64(seed).astype(np.int64)
        self._logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._penalised[slot] = params.penalised
        self._constrained[slot] = params.constrained
        self._stop_ids[slot] = stop_ids

    def parameters(self, slots: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """The fields of ops/fields.py for rows whose sequences hold ``slots`` and have ``counts`` tokens each, int32
        [N]."""
        columns = {name: self._columns[name][slots] for name in ("temperature", "top_k", "top_p", "min_p")}
        return columns | {"seed": self._seed[slots], "position": counts}

    def extras(
        self, slots: np.ndarray, counts: np.ndarray, rows: Rows
    ) -> dict[str, torch.Tensor | tuple[torch.Tensor, ...]]:
        """The optional fields of SampleInput that one of the rows needs; mostly none."""
        extra: dict[str, torch.Tensor | tuple[torch.Tensor, ...]] = {}
        penalised = self._penalised[slots]
        if penalised.any():
            extra |= _history_arrays(penalised, rows)
            extra["penalties"] = tuple(
                torch.from_numpy(self._columns[name][slots])
                for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
            )
        too_short = counts < self._columns["min_tokens"][slots]
        if too_short.any():
            none = np.zeros(0, np.int32)
            banned = [self._stop_ids[slot] if short else none for slot, short in zip(slots, too_short, strict=True)]
            extra["banned_ids"], extra["banned_start"] = _ragged(banned)
        constrained = self._constrained[slots]
        if constrained.any():
            allowed = np.full((len(slots), self._mask_words), -1, np.int32)
            for row in np.flatnonzero(constrained):
                rows.allow(int(row), allowed[row])
            extra["allowed"] = torch.from_numpy(allowed)
        logprobs = self._logprobs[slots]
        if (logprobs >= 0).any():
            extra["num_logprobs"] = torch.from_numpy(logprobs)
        return extra

    def gather(self, slots: np.ndarray, counts: np.ndarray, rows: Rows) -> SampleInput:
        """The sampler's input on the host: :meth:`parameters` and :meth:`extras`."""
        given = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in self.parameters(slots, counts).items()}
        return SampleInput(**given, **self.extras(slots, counts, rows))


def _history_arrays(penalised: np.ndarray, rows: Rows) -> dict[str, torch.Tensor]:
    none = np.zeros(0, np.int32)
    pairs = [rows.history(row) if wanted else (none, none) for row, wanted in enumerate(penalised)]
    ids, start = _ragged([np.concatenate(pair) for pair in pairs])
    prompt = torch.tensor([len(prompt) for prompt, _ in pairs], dtype=torch.int32)
    return {"history_ids": ids, "history_start": start, "history_prompt": prompt}


def _ragged(rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenated int32 values and the int32 [N+1] offsets of each row."""
    start = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=start[1:])
    return torch.from_numpy(np.concatenate(rows).astype(np.int32, copy=False)), torch.from_numpy(start)
