"""What a model marks as its thoughts, told apart from its answer by the tokens around them. Pure: no torch, no text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
"""Texts that are one token each where a model has them: Qwen 3, DeepSeek R1, GLM 4.5, Phi 4, SmolLM 3 and others;
Magistral; Seed OSS."""


@dataclass(frozen=True)
class Marks:
    """The tokens before and behind thoughts."""

    begin: int
    end: int


def find_marks(token_id: Callable[[str], int | None]) -> Marks | None:
    """Those of the model whose tokenizer answers ``token_id``, or None."""
    for pair in MARKS:
        begin, end = map(token_id, pair)
        if begin is not None and end is not None:
            return Marks(begin, end)
    return None


def is_open(prompt: np.ndarray, marks: Marks) -> bool:
    """Whether the prompt ends within thoughts: many chat templates begin them for the model."""
    last = prompt[(prompt == marks.begin) | (prompt == marks.end)][-1:]
    return bool((last == marks.begin).any())


def split(tokens: np.ndarray, marks: Marks, opened: bool) -> tuple[np.ndarray | None, np.ndarray]:
    """(thoughts, all the rest) of a sample's tokens, without the marks; None where nothing is marked. Thoughts without
    an end go on to the last token; an end without a beginning ends thoughts that were there from the first token on."""
    begin = next(iter(np.flatnonzero(tokens == marks.begin)), None)
    end = next(iter(np.flatnonzero(tokens == marks.end)), None)
    if opened or (end is not None and (begin is None or end < begin)):
        begin = -1
    if begin is None:
        return None, tokens
    before = tokens[: max(begin, 0)]
    ends = np.flatnonzero(tokens[begin + 1 :] == marks.end)
    if not len(ends):
        return tokens[begin + 1 :], before
    end = begin + 1 + ends[0]
    return tokens[begin + 1 : end], np.concatenate([before, tokens[end + 1 :]])
