"""What the scheduler refuses, and that it goes on as if it had not been asked."""

from __future__ import annotations

from typing import Any

import pytest
from engine.test_scheduler import scheduler, step_of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "no tokens"),
        ({"prompt": [1] * 16}, "exceed max_seq_len=16"),
        ({"prompt": [1] * 15, "max_new_tokens": 1}, "need 4 pages, and there are 3"),
        ({"prompt": [1, -2]}, "negative token"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"min_new_tokens": -1}, "min_new_tokens must not be negative"),
        ({"expected_new_tokens": -1}, "expected_new_tokens must not be negative"),
        ({"compute_from": -1}, "compute_from must not be negative"),
        ({"family": -1}, "family must not be negative"),
        ({"seq_id": 7}, "sequence 7: this id is open already"),
        ({"generated": [1, 2, 3, 4]}, "4 generated tokens already, and may have 4"),
        ({"generated": [-1]}, "generated token is negative"),
    ],
)
def test_add_refuses_what_can_not_run(arguments: dict[str, Any], message: str) -> None:
    s = scheduler(num_pages=3, max_seq_len=16)
    s.add(7, [1], max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        s.add(**({"seq_id": 1, "prompt": [1, 2], "max_new_tokens": 4} | arguments))
    assert s.num_open == 1


@pytest.mark.parametrize("prompt", [[1.5, 2.0], [[1, 2]], "text", [None]])
def test_add_refuses_what_is_not_token_ids(prompt: Any) -> None:
    with pytest.raises(TypeError, match="prompt: expected a one-dimensional array of integers"):
        scheduler().add(1, prompt, max_new_tokens=1)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("num_pages", 0, "at least 1"),
        ("page_size", 0, "at least 1"),
        ("max_slots", 0, "at least 1"),
        ("max_seq_len", 1, "at least 2"),
        ("max_step_tokens", 7, "at least max_slots=8"),
        ("_hash_bits", 65, "from 0 to 64"),
    ],
)
def test_scheduler_refuses_impossible_sizes(name: str, value: int, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{name.strip('_')}={value}: must be {allowed}"):
        scheduler(**{name: value})


def test_calls_out_of_order_are_refused() -> None:
    s = scheduler()
    with pytest.raises(RuntimeError, match="every step has been updated"):
        s.update([])
    s.add(0, [1], max_new_tokens=9)
    step_of(s)
    with pytest.raises(ValueError, match="2 tokens for a step that samples 1"):
        s.update([1, 2])
    with pytest.raises(ValueError, match="negative"):
        s.update([-1])
    step_of(s)
    with pytest.raises(RuntimeError, match="two steps wait"):
        s.schedule()
    for call in (s.finish, s.tokens):
        with pytest.raises(KeyError, match="no open sequence 3"):
            call(3)
    assert s.update([1]) == []
