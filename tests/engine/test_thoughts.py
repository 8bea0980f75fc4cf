from __future__ import annotations

import numpy as np
import pytest

from batchinfer.engine.thoughts import Marks, find_marks, is_open, split

MARKS = Marks(begin=8, end=9)


@pytest.mark.parametrize(
    ("tokens", "opened", "thoughts", "rest"),
    [
        ([1, 2], False, None, [1, 2]),
        ([8, 1, 9, 2], False, [1], [2]),
        ([5, 8, 1, 9, 2], False, [1], [5, 2]),
        ([8, 1, 2], False, [1, 2], []),  # cut off within its thoughts
        ([1, 9, 2], True, [1], [2]),
        ([1, 9, 2], False, [1], [2]),  # the prompt began them in another way
        ([1, 2], True, [1, 2], []),
        ([9, 2], True, [], [2]),
        ([8, 9], False, [], []),
        ([8, 1, 9, 2, 8, 3, 9], False, [1], [2, 8, 3, 9]),
        ([8, 1, 9, 2], True, [8, 1], [2]),  # begun by the prompt, and once more by the model
        ([], False, None, []),
        ([], True, [], []),
    ],
)
def test_split(tokens: list[int], opened: bool, thoughts: list[int] | None, rest: list[int]) -> None:
    got, answer = split(np.array(tokens, np.int32), MARKS, opened)
    assert (None if got is None else got.tolist(), answer.tolist()) == (thoughts, rest)


@pytest.mark.parametrize(
    ("prompt", "opened"), [([1, 2], False), ([1, 8], True), ([8, 1, 9, 2], False), ([8, 1, 9, 2, 8, 3], True)]
)
def test_thoughts_that_the_prompt_begins(prompt: list[int], opened: bool) -> None:
    assert is_open(np.array(prompt, np.int32), MARKS) is opened


def test_a_model_has_both_marks_or_none() -> None:
    assert find_marks({"<think>": 3, "</think>": 4}.get) == Marks(3, 4)
    assert find_marks({"[THINK]": 5, "[/THINK]": 6, "<think>": 1}.get) == Marks(5, 6)
    assert find_marks({"<think>": 3}.get) is None
