from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.engine.bad_words import endings, token_sequences


def encode(texts: list[str]) -> list[np.ndarray]:
    """Pairs of letters are one token, and a blank belongs to the letter behind it."""
    return [np.array([sum(map(ord, text[i : i + 2])) for i in range(0, len(text), 2)], np.int32) for text in texts]


def test_a_word_at_the_beginning_and_behind_a_blank() -> None:
    found = [ids.tolist() for ids in token_sequences(["abc", " x"], encode)]
    assert found == [[195, 99], [129, 197], [152]]


def test_words_that_are_nothing_are_none() -> None:
    assert token_sequences([], encode) == ()
    assert token_sequences(["a"], lambda texts: [np.zeros(0, np.int32) for _ in texts]) == ()


TOKENS = st.lists(st.integers(0, 3), max_size=12)


@given(words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=5), tokens=TOKENS)
def test_a_token_is_banned_if_it_would_complete_a_word(words: list[list[int]], tokens: list[int]) -> None:
    banned = endings([np.array(word, np.int32) for word in words], np.array(tokens, np.int32))
    for token in range(4):
        text = [*tokens, token]
        assert (token in banned) == any(text[-len(word) :] == word for word in words)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2]])
def test_what_a_word_is_too_long_for(tokens: list[int]) -> None:
    assert endings([np.array([0, 1, 2, 3], np.int32)], np.array(tokens, np.int32)).tolist() == []
