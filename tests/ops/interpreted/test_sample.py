"""The Triton sampler must choose the reference's tokens exactly: same arithmetic, same random stream."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ops.sampler_cases import assert_as_reference, edits, logits_of, plain

from batchinfer.ops import SampleInput
from batchinfer.ops import reference_sampler as spec
from batchinfer.ops.triton import exact


def assert_same(ops, logits: torch.Tensor, inputs: SampleInput) -> None:
    assert_as_reference(ops.sample(logits.clone(), inputs), logits, inputs)


@triton.jit
def arithmetic(x, positive, words, results, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(results + at, exact.exp(tl.load(x + at)))
    tl.store(results + BLOCK + at, exact.mass(tl.load(x + at)).to(tl.float32))
    tl.store(results + 2 * BLOCK + at, exact.log(tl.load(positive + at)))
    tl.store(results + 3 * BLOCK + at, exact.gumbel(tl.load(words + at).to(tl.uint32, bitcast=True)))


def test_the_arithmetic_is_that_of_the_specification(monkeypatch):
    n = 4096
    random = np.random.default_rng(0)
    x = np.concatenate([random.uniform(-90, 0, n - 4), [0, -87, -87.5, -np.inf]]).astype(np.float32)
    positive = np.exp(random.uniform(-25, 4, n)).astype(np.float32)
    words = np.concatenate([random.integers(0, 2**32, n - 4), [0, 1, 2**32 - 2**9, 2**32 - 1]]).astype(np.uint32)
    got = torch.empty(4, n)
    tensors = (torch.from_numpy(a) for a in (x, positive, words.view(np.int32)))
    arithmetic[(1,)](*tensors, got, BLOCK=n)
    monkeypatch.setattr(spec, "philox4x32", lambda counter, key: np.repeat(words[:, None], 4, axis=1))
    masses = (spec.mass_of(x) * 2.0**34).astype(np.float32)
    want = (spec.exp(x), masses, spec.log(positive), spec.gumbel(0, 0, np.arange(n)))
    for mine, theirs in zip(got.numpy(), want, strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.feature("Triton kernels (interpreted)", "sampler: the reference's tokens, exactly; log-probabilities")
@pytest.mark.parametrize("kind", ["normal", "peaked", "ties", "flat", "holes"])
@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.3},
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
def test_tokens(ops, kind, filters):
    assert_same(ops, logits_of(kind, 4, 1000), plain(4, **filters))


def test_a_larger_vocabulary_and_mixed_rows(ops):
    rows, vocab = 6, 9000
    random = np.random.default_rng(1)
    inputs = replace(
        plain(rows),
        temperature=torch.from_numpy(random.choice([0, 0.5, 1, 2, 1e-40], rows).astype(np.float32)),
        top_k=torch.from_numpy(random.choice([0, 1, 20, 5000, 200_000], rows).astype(np.int32)),
        top_p=torch.from_numpy(random.choice([1, 0.95, 0.5], rows).astype(np.float32)),
        min_p=torch.from_numpy(random.choice([0, 0.01], rows).astype(np.float32)),
    )
    assert_same(ops, logits_of("peaked", rows, vocab), inputs)


def test_odd_vocabularies(ops):
    for vocab in (1, 2, 31, 33, 63, 65, 1023, 1025):
        assert_same(ops, logits_of("normal", 3, vocab), plain(3, top_p=0.8))


def test_no_rows(ops):
    assert ops.sample(torch.empty(0, 7), plain(0)).tokens.shape == (0,)


@pytest.mark.hardware("penalties, bans, log-probabilities")
def test_penalties_bans_and_logprobs(ops):
    logits = logits_of("holes", 8, 500)
    for inputs in edits(500, longest=1500):
        assert_same(ops, logits, inputs)


@pytest.mark.parametrize("kind", ["flat", "ties"])
def test_logprobs_of_nearly_equal_logits(ops, kind):
    inputs = replace(plain(3), num_logprobs=torch.tensor([3, 20, 0], dtype=torch.int32))
    assert_same(ops, logits_of(kind, 3, 3000), inputs)
