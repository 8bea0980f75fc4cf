"""Per-slot sampling parameters: written once when a sequence gets its slot, gathered for the rows of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from batchinfer.engine.bad_words import endings
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

STOPS = 4
"""Stop tokens of a sequence that a device is told of. It stops no later where there are more: the host finds them."""

ScoredRows = tuple[np.ndarray, np.ndarray, int]
"""The fields of ScoreInput (models/decoder.py), on the host."""

History = tuple[np.ndarray, np.ndarray]
"""Prompt and generated tokens of a sequence, int32."""

Extra = torch.Tensor | tuple[torch.Tensor, ...]
Extras = dict[str, Extra]
"""Optional fields of SampleInput."""

BadWords = Sequence[np.ndarray]
"""Sequences of tokens, int32, the last of which may not come after the others."""

_NONE = np.zeros(0, np.int32)


class Rows(Protocol):
    """What only the host knows of the rows that a step samples."""

    def history(self, row: int) -> History:
        """Asked for rows with penalties or bad words. Before a row behind a draft, the draft was generated. Nothing of
        a sequence that has ended since the step was started."""

    def allow(self, rows: list[int], masks: np.ndarray) -> None:
        """Fill these rows of ``masks`` int32 [N, ceil(V / 32)], see ``SampleInput.allowed``, which all have a
        constraint. Those of sequences that have ended since stay as they are."""

    def adapters(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The adapter of each of the step's tokens and of its samples, int32 [T] and [N], -1 for none; None if no token
        has one."""

    def scored(self) -> ScoredRows | None:
        """Tokens of the step, int32 [M], what the text goes on with after each, int64 [M], and how many alternatives
        there are at most, where somebody wants the log-probability of that."""


class SlotTable:
    """Sampling parameters of the sequences that hold a slot, one numpy array per parameter."""

    def __init__(self, max_slots: int, vocab_size: int):
        self._columns = {name: np.zeros(max_slots, dtype) for name, dtype in _FIELDS.items()}
        self._seed = np.zeros(max_slots, np.int64)
        self._logprobs = np.full(max_slots, -1, np.int32)
        self._penalised = np.zeros(max_slots, bool)
        self._constrained = np.zeros(max_slots, bool)
        self._masked = np.zeros(max_slots, bool)
        self._biased = np.zeros(max_slots, bool)
        self._worded = np.zeros(max_slots, bool)
        self._mask_words = -(-vocab_size // 32)
        self._stop_ids: list[np.ndarray] = [_NONE] * max_slots
        self._stops = np.full((max_slots, STOPS), -1, np.int32)
        self._masks: dict[int, np.ndarray] = {}
        self._biases: dict[int, dict[int, float]] = {}
        self._bad_words: dict[int, BadWords] = {}

    def assign(
        self, slot: int, params: SamplingParams, seed: int, stop_ids: np.ndarray, bad_words: BadWords = ()
    ) -> None:
        """The sequence that takes ``slot`` samples by ``params``; ``stop_ids`` int32 are banned before min_tokens.
        ``bad_words``: those of ``params`` as tokens."""
        for name, column in self._columns.items():
            column[slot] = getattr(params, name)
        self._seed[slot] = np.uint64(seed).astype(np.int64)
        self._logprobs[slot] = -1 if params.computed_logprobs is None else params.computed_logprobs
        self._penalised[slot] = params.penalised
        self._constrained[slot] = params.constrained
        self._stop_ids[slot] = stop_ids
        told = stop_ids[:STOPS]
        self._stops[slot] = -1
        self._stops[slot, : len(told)] = told
        self._masked[slot] = bool(params.allowed_token_ids)
        if params.allowed_token_ids:
            self._masks[slot] = _mask(params.allowed_token_ids, self._mask_words)
        self._biased[slot] = bool(params.logit_bias)
        self._biases[slot] = params.logit_bias
        self._worded[slot] = bool(bad_words)
        self._bad_words[slot] = bad_words

    def parameters(self, slots: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """The fields of ops/fields.py for rows whose sequences hold ``slots`` and have ``counts`` tokens each, int32
        [N]."""
        columns = {name: self._columns[name][slots] for name in ("temperature", "top_k", "top_p", "min_p")}
        return columns | {"seed": self._seed[slots], "position": counts}

    def stops(self, slots: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The first STOPS of the tokens that end the sequences in ``slots`` behind ``counts`` others, int32 [N]: int32
        [N, STOPS], -1 for none."""
        too_short = counts < self._columns["min_tokens"][slots]
        return np.where(too_short[:, None], np.int32(-1), self._stops[slots])

    def need_tokens(self, slots: np.ndarray) -> bool:
        """Whether :meth:`extras` asks for the tokens that one of these, int32 [N], has so far."""
        return bool((self._penalised | self._constrained | self._worded)[slots].any())

    def extras(self, slots: np.ndarray, counts: np.ndarray, rows: Rows) -> Extras:
        """The optional fields of SampleInput that one of the rows needs; mostly none."""
        extra: Extras = {}
        penalised = self._penalised[slots]
        if penalised.any():
            extra |= _history_arrays(penalised, rows)
            extra["penalties"] = tuple(
                torch.from_numpy(self._columns[name][slots])
                for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
            )
        biased = self._biased[slots]
        if biased.any():
            given = [self._biases[slot] if has else {} for slot, has in zip(slots.tolist(), biased, strict=True)]
            extra["bias_ids"], extra["bias_start"] = _ragged([np.array([*bias], np.int32) for bias in given])
            extra["bias_values"] = torch.tensor([v for bias in given for v in bias.values()], dtype=torch.float32)
        too_short, worded = counts < self._columns["min_tokens"][slots], self._worded[slots]
        if too_short.any() or worded.any():
            banned = [self._stop_ids[slot] if short else _NONE for slot, short in zip(slots, too_short, strict=True)]
            for row in np.flatnonzero(worded).tolist():
                ends = endings(self._bad_words[int(slots[row])], rows.history(row)[1])
                banned[row] = np.concatenate([banned[row], ends])
            extra["banned_ids"], extra["banned_start"] = _ragged(banned)
        constrained, masked = self._constrained[slots], self._masked[slots]
        if constrained.any() or masked.any():
            allowed = np.full((len(slots), self._mask_words), -1, np.int32)
            for row in np.flatnonzero(masked).tolist():
                allowed[row] = self._masks[int(slots[row])]
            if constrained.any():
                rows.allow(np.flatnonzero(constrained).tolist(), allowed)
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
    pairs = [rows.history(row) if wanted else (_NONE, _NONE) for row, wanted in enumerate(penalised)]
    ids, start = _ragged([np.concatenate(pair) for pair in pairs])
    prompt = torch.tensor([len(prompt) for prompt, _ in pairs], dtype=torch.int32)
    return {"history_ids": ids, "history_start": start, "history_prompt": prompt}


def _mask(ids: Sequence[int], words: int) -> np.ndarray:
    """int32 [words] with the bits of ``ids`` set, as in ``SampleInput.allowed``."""
    bits = np.zeros(32 * words, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _ragged(rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenated int32 values and the int32 [N+1] offsets of each row."""
    start = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=start[1:])
    return torch.from_numpy(np.concatenate(rows).astype(np.int32, copy=False)), torch.from_numpy(start)
