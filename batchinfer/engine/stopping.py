"""Stop strings: when the newest token completes one, and where the text is cut then."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CONTEXT_TOKENS = 8
"""Tokens decoded before the part that is searched, so that characters made of several tokens come out whole."""

Decode = Callable[[list[np.ndarray]], list[str]]


def find_stop(before: str, text: str, stop: tuple[str, ...]) -> tuple[int, int] | None:
    """Where the earliest stop string begins and ends that is complete in ``text`` but was not in ``before``, the text
    without its newest token; None if there is none. (One that was complete before was let through by min_tokens.)"""
    known = len(before.rstrip("\ufffd"))  # a replacement character is a character whose other bytes are still to come
    places = []
    for s in stop:
        at = text.find(s, max(0, known - len(s) + 1))
        if at >= 0:
            places.append((at, at + len(s)))
    return min(places, default=None)


def completes_stop(tokens: np.ndarray, stop: tuple[str, ...], decode: Decode) -> bool:
    """Whether the newest of ``tokens`` completed a stop string. A visible token is at least one byte of text, so a
    stop string of n bytes lies within the last n of them."""
    tail = tokens[-(max(len(s.encode()) for s in stop) + CONTEXT_TOKENS) :]
    before, text = decode([tail[:-1], tail])
    return find_stop(before, text, stop) is not None


def cut_text(tokens: np.ndarray, stop: tuple[str, ...], decode: Decode, keep: bool = False) -> str:
    """The text of ``tokens``, whose newest completed a stop string, without that string, or with it (``keep``)."""
    before, text = decode([tokens[:-1], tokens])
    found = find_stop(before, text, stop)
    return text if found is None else text[: found[keep]]
