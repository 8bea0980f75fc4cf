"""The GPU sampler must choose the reference's tokens exactly: same arithmetic, same random stream."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from gpu.backend import put

from batchinfer.ops import SampleInput
from batchinfer.ops.reference import ReferenceOps


def on_device(inputs: SampleInput) -> SampleInput:
    def move(value):
        if isinstance(value, tuple):
            return tuple(move(v) for v in value)
        return None if value is None else put(value)

    moved = {f.name: move(getattr(inputs, f.name)) for f in fields(inputs) if f.name != "num_logprobs"}
    return SampleInput(**moved, num_logprobs=inputs.num_logprobs)


def plain(rows: int, seed: int = 0, **given: float) -> SampleInput:
    """Temperature 1 and no filter, unless given."""
    random = np.random.default_rng(seed)
    value = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | given
    dtype = {"top_k": torch.int32}
    return SampleInput(
        **{name: torch.full((rows,), v, dtype=dtype.get(name, torch.float32)) for name, v in value.items()},
        seed=torch.from_numpy(random.integers(-(2**63), 2**63 - 1, rows)),
        position=torch.from_numpy(random.integers(0, 5000, rows).astype(np.int32)),
    )


def logits_of(kind: str, rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, vocab)).astype(np.float32)
    if kind == "peaked":
        x = x * 3 + 12 * (random.random((rows, vocab)) < 5 / vocab)
    if kind == "ties":
        x = np.round(x * 2) / 2
    if kind == "flat":
        x = x * 1e-3
    if kind == "holes":
        x[random.random((rows, vocab)) < 0.3] = -np.inf
        x[random.random((rows, vocab)) < 0.05] = np.nan
        x[0], x[1, 7] = -np.inf, np.inf
    return torch.from_numpy(x.astype(np.float32))


def assert_same(gpu, logits: torch.Tensor, inputs: SampleInput) -> None:
    want = ReferenceOps().sample(logits.clone(), inputs)
    got = gpu.sample(put(logits), on_device(inputs))
    assert got.tokens.tolist() == want.tokens.tolist()
    if inputs.num_logprobs is None:
        assert got.chosen is None
        return
    assert torch.equal(got.top_ids.cpu(), want.top_ids)
    torch.testing.assert_close(got.chosen.cpu(), want.chosen, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(got.top.cpu(), want.top, rtol=1e-5, atol=1e-5, equal_nan=True)


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
def test_penalties_bans_and_logprobs(gpu, vocab):
    rows = 8
    random = np.random.default_rng(2)
    sizes = np.array([0, 1, 10, 3000, 50, 0, 700, 2])
    start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    banned = np.array([0, 3, 0, 1, 200, 0, 2, 5])
    banned_start = np.concatenate([[0], np.cumsum(banned)]).astype(np.int32)
    logits = logits_of("peaked", rows, vocab)

    def ids(count: int) -> torch.Tensor:
        return torch.from_numpy(random.integers(0, min(vocab, 300), count).astype(np.int32))

    inputs = replace(
        plain(rows, temperature=0.7),
        penalties=tuple(
            torch.from_numpy(random.uniform(*r, rows).astype(np.float32)) for r in ((0.5, 2), (-1, 2), (0, 1))
        ),
        history_ids=ids(sizes.sum()),
        history_start=torch.from_numpy(start),
        history_prompt=torch.from_numpy((sizes // 3).astype(np.int32)),
        allowed=torch.from_numpy(random.integers(-(2**31), 2**31, (rows, -(-vocab // 32))).astype(np.int32)),
        banned_ids=ids(banned.sum()),
        banned_start=torch.from_numpy(banned_start),
        num_logprobs=torch.tensor([-1, 0, 5, 64, 1, 2, 20, -1], dtype=torch.int32),
    )
    assert_same(gpu, logits, inputs)
    assert_same(gpu, logits, replace(inputs, num_logprobs=None, banned_ids=None, banned_start=None))
    assert_same(gpu, logits, replace(plain(rows), num_logprobs=inputs.num_logprobs))


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
