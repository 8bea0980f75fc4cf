"""Logits and sampler inputs that every compiled or interpreted sampler is tried with, and what must come out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from batchinfer.ops import SampleInput, SampleOutput
from batchinfer.ops.reference import ReferenceOps


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


def edited(vocab: int, longest: int) -> SampleInput:
    """Eight rows with biases, penalties over up to ``longest`` tokens, bans, masks and log-probabilities, each in its
    way."""
    random = np.random.default_rng(2)
    sizes = np.array([0, 1, 10, longest, 50, 0, 700, 2])
    banned = np.array([0, 3, 0, 1, 200, 0, 2, 5])
    biased = np.minimum([0, 1, 0, 40, 3, 0, 300, 2], vocab)
    rows = len(sizes)

    def ids(count: int) -> torch.Tensor:
        return torch.from_numpy(random.integers(0, min(vocab, 300), count).astype(np.int32))

    def starts(counts: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))

    return replace(
        plain(rows, temperature=0.7),
        penalties=tuple(
            torch.from_numpy(random.uniform(*r, rows).astype(np.float32)) for r in ((0.5, 2), (-1, 2), (0, 1))
        ),
        history_ids=ids(sizes.sum()),
        history_start=starts(sizes),
        history_prompt=torch.from_numpy((sizes // 3).astype(np.int32)),
        bias_ids=torch.from_numpy(np.concatenate([random.permutation(vocab)[:n] for n in biased]).astype(np.int32)),
        bias_start=starts(biased),
        bias_values=torch.from_numpy(random.choice(np.float32([-100, -2.5, 0.1, 3, 100]), biased.sum())),
        allowed=torch.from_numpy(random.integers(-(2**31), 2**31, (rows, -(-vocab // 32))).astype(np.int32)),
        banned_ids=ids(banned.sum()),
        banned_start=starts(banned),
        num_logprobs=torch.tensor([-1, 0, 5, 64, 1, 2, 20, -1], dtype=torch.int32),
    )


def edits(vocab: int, longest: int) -> list[SampleInput]:
    """:func:`edited`, without some of it, and with the biases or the log-probabilities alone."""
    whole = edited(vocab, longest)
    fewer = replace(whole, num_logprobs=None, banned_ids=None, banned_start=None)
    biases = {name: getattr(whole, name) for name in ("bias_ids", "bias_start", "bias_values")}
    return [whole, fewer, replace(plain(8), **biases), replace(plain(8), num_logprobs=whole.num_logprobs)]


def assert_as_reference(got: SampleOutput, logits: torch.Tensor, inputs: SampleInput) -> None:
    """The very tokens of the reference, and its log-probabilities but for rounding."""
    want = ReferenceOps().sample(logits.clone(), inputs)
    assert got.tokens.tolist() == want.tokens.tolist()
    if inputs.num_logprobs is None:
        assert got.chosen is None
        return
    assert torch.equal(got.top_ids.cpu(), want.top_ids)
    torch.testing.assert_close(got.chosen.cpu(), want.chosen, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(got.top.cpu(), want.top, rtol=1e-5, atol=1e-5, equal_nan=True)
