"""The GPU sampler must choose the reference's tokens exactly: same arithmetic, same random stream."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from gpu.backend import put
from ops.sampler_cases import assert_as_reference, edits, logits_of, plain

from batchinfer.ops import SampleInput
from batchinfer.ops.reference import ReferenceOps


def on_device(inputs: SampleInput) -> SampleInput:
    def move(value):
        if isinstance(value, tuple):
            return tuple(move(v) for v in value)
        return None if value is None else put(value)

    moved = {f.name: move(getattr(inputs, f.name)) for f in fields(inputs) if f.name != "num_logprobs"}
    return SampleInput(**moved, num_logprobs=inputs.num_logprobs)


def assert_same(gpu, logits: torch.Tensor, inputs: SampleInput) -> None:
    assert_as_reference(gpu.sample(put(logits), on_device(inputs)), logits, inputs)


@pytest.mark.parametrize("kind", ["normal", "peaked", "ties", "flat", "holes"])
@pytest.mark.parametrize("vocab", [1000, 49152])
@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.3},
        {"temperature": 50.0},
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": 900},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"top_p": 0.999, "temperature": 3.0},
        {"min_p": 0.05},
        {"top_k": 40, "top_p": 0.95, "min_p": 0.02, "temperature": 0.8},
        {"top_k": 500, "top_p": 0.3, "temperature": 100.0},
    ],
    ids=str,
)
def test_tokens(gpu, kind, vocab, filters):
    assert_same(gpu, logits_of(kind, 6, vocab), plain(6, **filters))


def test_large_vocabulary_and_mixed_rows(gpu):
    rows, vocab = 24, 128_256
    random = np.random.default_rng(1)
    inputs = replace(
        plain(rows),
        temperature=torch.from_numpy(random.choice([0, 0.5, 1, 2], rows).astype(np.float32)),
        top_k=torch.from_numpy(random.choice([0, 1, 20, 5000, 200_000], rows).astype(np.int32)),
        top_p=torch.from_numpy(random.choice([1, 0.95, 0.5], rows).astype(np.float32)),
        min_p=torch.from_numpy(random.choice([0, 0.01], rows).astype(np.float32)),
    )
    assert_same(gpu, logits_of("peaked", rows, vocab), inputs)


def test_odd_vocabularies(gpu):
    for vocab in (1, 2, 31, 33, 63, 65, 1023, 1025, 50_257):
        assert_same(gpu, logits_of("normal", 3, vocab), plain(3, top_p=0.8))


@pytest.mark.parametrize("vocab", [500, 20_000])
@pytest.mark.hardware("penalties, bans, log-probabilities")
def test_penalties_bans_and_logprobs(gpu, vocab):
    logits = logits_of("peaked", 8, vocab)
    for inputs in edits(vocab, longest=3000):
        assert_same(gpu, logits, inputs)


@pytest.mark.parametrize("kind", ["flat", "ties"])
def test_logprobs_of_nearly_equal_logits(gpu, kind):
    inputs = replace(plain(3), num_logprobs=torch.tensor([3, 20, 0], dtype=torch.int32))
    assert_same(gpu, logits_of(kind, 3, 30_000), inputs)


def test_logits_are_not_needed_on_the_host(real_gpu):
    """A step with sampling can be captured; the random stream follows the position in device memory."""
    rows, vocab = 5, 3000
    inputs = plain(rows, top_p=0.9)
    moved, logits = on_device(inputs), logits_of("normal", rows, vocab)
    static = put(logits)
    real_gpu.sample(static, moved)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = real_gpu.sample(static, moved).tokens
    for position in range(3):
        moved.position.fill_(position)
        graph.replay()
        want = ReferenceOps().sample(logits, replace(inputs, position=torch.full((rows,), position, dtype=torch.int32)))
        assert tokens.tolist() == want.tokens.tolist()
