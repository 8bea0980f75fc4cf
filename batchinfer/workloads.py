"""Requests of random token ids with fixed lengths: what ``batchinfer bench`` times where no input is given.

A workload depends on its name, the number of requests and the vocabulary alone, so that figures of different machines
and engines are about the same work. Every request ends with its length: end-of-text tokens are ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from batchinfer.types import Request, SamplingParams

SEED = 0


@dataclass(frozen=True)
class Workload:
    """``draw(random, vocab_size, count)``: prompts (int32) and how many new tokens. ``count``: requests by default."""

    draw: Callable[[np.random.Generator, int, int], list[tuple[np.ndarray, int]]]
    count: int
    samples: int = 1
    temperature: float = 0.0


def make_requests(name: str, vocab_size: int, count: int = 0) -> list[Request]:
    """The ``count`` requests (0: its own number) of the workload ``name``, a value of bench.workload but none."""
    workload = WORKLOADS[name]
    drawn = workload.draw(np.random.default_rng(SEED), vocab_size, count or workload.count)

    def params(tokens: int) -> SamplingParams:
        return SamplingParams(max_tokens=tokens, temperature=workload.temperature, n=workload.samples, ignore_eos=True)

    return [Request(i, prompt, params(tokens), seed=i) for i, (prompt, tokens) in enumerate(drawn)]


def _prompts(random: np.random.Generator, vocab_size: int, lengths: np.ndarray) -> list[np.ndarray]:
    return [random.integers(vocab_size, size=length).astype(np.int32) for length in lengths]


def _chat_lengths(random: np.random.Generator, count: int, log_mean: float, log_deviation: float) -> np.ndarray:
    return np.clip(random.lognormal(log_mean, log_deviation, count).round().astype(int), 4, 1024)


def _sharegpt(random: np.random.Generator, vocab_size: int, count: int) -> list[tuple[np.ndarray, int]]:
    """Log-normal lengths from 4 to 1024, about 220 tokens in and 190 out on average."""
    inputs = _chat_lengths(random, count, 4.81, 1.2)
    outputs = _chat_lengths(random, count, 4.79, 1.0)
    return list(zip(_prompts(random, vocab_size, inputs), outputs.tolist(), strict=True))


def _fixed(prompt_tokens: int, new_tokens: int) -> Callable[[np.random.Generator, int, int], list]:
    def draw(random: np.random.Generator, vocab_size: int, count: int) -> list[tuple[np.ndarray, int]]:
        return [(prompt, new_tokens) for prompt in _prompts(random, vocab_size, np.full(count, prompt_tokens))]

    return draw


def _prefix(random: np.random.Generator, vocab_size: int, count: int) -> list[tuple[np.ndarray, int]]:
    """One system prompt of 2048 tokens before 64 to 128 of each request's own; 64 new ones."""
    (system,) = _prompts(random, vocab_size, np.array([2048]))
    own = _prompts(random, vocab_size, random.integers(64, 129, size=count))
    return [(np.concatenate([system, prompt]), 64) for prompt in own]


def _samples(random: np.random.Generator, vocab_size: int, count: int) -> list[tuple[np.ndarray, int]]:
    """Prompts of about 300 tokens, 256 new ones."""
    return [(prompt, 256) for prompt in _prompts(random, vocab_size, random.integers(250, 351, size=count))]


WORKLOADS = {
    "sharegpt": Workload(_sharegpt, 1000),
    "prefill": Workload(_fixed(2048, 16), 300),
    "decode": Workload(_fixed(128, 1024), 256),
    "prefix": Workload(_prefix, 1000),
    "samples": Workload(_samples, 64, samples=16, temperature=1.0),
}
