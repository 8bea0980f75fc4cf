"""Which steps of a GPU are filled up, and to what."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine.tiny_engine import SPEC

from batchinfer.engine.step_shape import NOT_SLOWER, SLOW, Limits, StepShape, decode_size, mixed_size
from batchinfer.models.model_spec import ExpertSpec

LIMITS = Limits(slots=100, tokens=8192, samples=300, filled=1000)


@pytest.mark.parametrize("limit", [1, 6, 100, 1024, 4096])
def test_sizes_of_decoding_are_few_and_close(limit: int) -> None:
    sizes = [decode_size(count, limit) for count in range(1, limit + 1)]
    assert all(count <= size <= limit for count, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 5 + limit // 64 + 16
    assert all(size - count < max(16, count / 4 + 1) or size == NOT_SLOWER for count, size in enumerate(sizes, 1))
    assert SLOW not in sizes


@pytest.mark.parametrize("limit", [1, 6, 100, 1024, 4096])
def test_sizes_of_mixed_steps_are_fewer(limit: int) -> None:
    sizes = [mixed_size(count, limit) for count in range(limit + 1)]
    assert all(count <= size <= limit for count, size in enumerate(sizes))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 2 + 2 * max(1, limit.bit_length() - 4) + 2 * max(0, limit.bit_length() - 9)
    assert all(size <= max(16, 1.5 * count) for count, size in enumerate(sizes))
    assert SLOW not in sizes


@pytest.mark.parametrize(
    ("counts", "shape"),
    [
        ((90, 90, 90), StepShape(96, 96, decode_only=True, repeats=True)),
        ((98, 98, 98), StepShape(100, 100, decode_only=True, repeats=True)),  # no more than there are slots
        ((90, 90, 30), StepShape(96, 96, repeats=True)),  # drafts, or prompts of one token
        ((600, 90, 90), StepShape(640, 96, repeats=True)),
        ((400, 90, 90), StepShape(512, 96, repeats=True)),  # 448 would take longer
        ((900, 0, 0), StepShape(1000, 0, repeats=True)),  # the middle of a prompt
        ((290, 290, 60), StepShape(320, 300, repeats=True)),
        ((1001, 90, 80), StepShape(1001, 96)),  # few rows in the last layer: of usual sizes too
        ((1001, 0, 0), StepShape(1001, 0)),
        ((8192, 290, 60), StepShape(8192, 300)),
    ],
)
def test_a_step_is_filled_up_where_the_launch_takes_longer(counts: tuple[int, int, int], shape: StepShape) -> None:
    assert LIMITS.shape(*counts) == shape
    assert LIMITS.shape(*counts, adapted=True) == replace(shape, adapted=True)


def test_the_larger_the_model_the_sooner_the_device_is_busy() -> None:
    """Sizes of Llama 3.2 1B and 3.1 8B, and a mixture, whose experts take the device longer."""
    one = replace(SPEC, layers=16, width=2048, heads=32, kv_heads=8, head_dim=64, mlp_width=8192, vocab_size=128256)
    eight = replace(one, layers=32, width=4096, head_dim=128, mlp_width=14336)
    mixture = replace(one, experts=ExpertSpec(8, 2, 512, True, 0, (True,) * 16))
    filled = [Limits.of(spec, 256, 8192, 256).filled for spec in (one, eight, mixture)]
    assert filled == [2466, 687, 0]
    assert Limits.of(SPEC, 256, 8192, 256).filled == 8192
