"""Words that a text may not hold: as tokens, and which token would complete one now. Pure: no torch, no device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

Encode = Callable[[list[str]], list[np.ndarray]]
"""Texts -> their tokens, without those that a model wants around any text."""


def token_sequences(words: Iterable[str], encode: Encode) -> tuple[np.ndarray, ...]:
    """int32, each word as it stands at the beginning of a text and behind a blank. A word that is cut into other tokens
    in another surrounding is let through, as in vLLM."""
    forms = [form for word in words for form in (word, " " + word.lstrip())]
    found = {tuple(ids.tolist()): None for ids in encode(forms)}
    return tuple(np.array(ids, np.int32) for ids in found if ids)


def endings(sequences: Sequence[np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """The tokens, int32, that complete one of ``sequences`` after ``tokens``, those of the sample alone: what the
    prompt holds was not generated."""
    ends = [ids[-1] for ids in sequences if _ends_with(tokens, ids[:-1])]
    return np.unique(np.array(ends, np.int32))


def _ends_with(tokens: np.ndarray, tail: np.ndarray) -> bool:
    start = len(tokens) - len(tail)
    return start >= 0 and bool((tokens[start:] == tail).all())
