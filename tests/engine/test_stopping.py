from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.engine.stopping import completes_stop, cut_text, find_stop

PIECES = ["a", "b", "ab", "ba", "é", "\n", "bab"]


def decode(rows: list[np.ndarray]) -> list[str]:
    """Tokens are indices into PIECES, or bytes above 1000, so that a character can be cut in the middle."""
    parts = (b"".join(bytes([t - 1000]) if t >= 1000 else PIECES[t].encode() for t in row.tolist()) for row in rows)
    return [part.decode("utf-8", "replace") for part in parts]


tokens_strategy = st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=30)
stop_strategy = st.lists(st.text("abé\n", min_size=1, max_size=5), min_size=1, max_size=3).map(tuple)


@given(tokens_strategy, stop_strategy)
def test_stops_at_the_first_token_that_completes_a_stop_string(tokens: list[int], stop: tuple[str, ...]) -> None:
    ids = np.array(tokens, np.int32)
    texts = decode([ids[:n] for n in range(1, len(ids) + 1)])
    expected = next((n for n, text in enumerate(texts, 1) if any(s in text for s in stop)), None)
    found = next((n for n in range(1, len(ids) + 1) if completes_stop(ids[:n], stop, decode)), None)
    assert found == expected
    if found is not None:
        text = texts[found - 1]
        start = min(text.find(s) for s in stop if s in text)
        assert cut_text(ids[:found], stop, decode) == text[:start]
        kept = cut_text(ids[:found], stop, decode, keep=True)
        assert any(kept == text[:start] + s for s in stop)


def test_a_stop_string_let_through_by_min_tokens_does_not_cut() -> None:
    ids = np.array([0, 1, 0, 1, 0], np.int32)  # "ababa"
    assert not completes_stop(ids, ("b",), decode)
    assert completes_stop(ids[:4], ("b",), decode)
    assert cut_text(ids[:4], ("b",), decode) == "aba"


def test_a_character_in_two_tokens_is_seen_when_it_is_whole() -> None:
    first, second = "é".encode()
    ids = np.array([0, 1000 + first, 1000 + second], np.int32)
    assert not completes_stop(ids[:2], ("é",), decode)
    assert completes_stop(ids, ("é",), decode)
    assert cut_text(ids, ("é",), decode) == "a"


def test_the_earliest_of_several_stop_strings_cuts() -> None:
    assert find_stop("xa", "xab", ("ab", "b")) == (1, 3)
    assert find_stop("x", "xy", ("ab",)) is None
