"""The bench's workloads: sizes, lengths, and that they are the same each time."""

from __future__ import annotations

import numpy as np
import pytest

from batchinfer.config import CHOICES
from batchinfer.workloads import WORKLOADS, make_requests

VOCAB = 128_256


def test_the_configuration_offers_them_all() -> None:
    assert set(CHOICES["bench.workload"]) == {"none", *WORKLOADS}


@pytest.mark.parametrize("name", WORKLOADS)
def test_requests_are_valid_and_the_same_each_time(name: str) -> None:
    requests = make_requests(name, 1000, 20)
    assert len(requests) == 20
    for request, again in zip(requests, make_requests(name, 1000, 20), strict=True):
        np.testing.assert_array_equal(request.prompt, again.prompt)
        request.sampling.check()
        assert request.sampling == again.sampling
        assert request.sampling.ignore_eos
        assert request.prompt.dtype == np.int32
        assert 0 <= request.prompt.min() <= request.prompt.max() < 1000
    assert len({request.seed for request in requests}) == 20


@pytest.mark.parametrize(
    ("name", "requests", "prompt_tokens", "new_tokens"),
    [
        ("sharegpt", 1000, 205_946, 191_505),
        ("prefill", 300, 614_400, 4_800),
        ("decode", 256, 32_768, 262_144),
        ("prefix", 1000, 2_144_518, 64_000),
        ("samples", 64, 19_264, 262_144),
    ],
)
def test_how_much_work_they_are(name: str, requests: int, prompt_tokens: int, new_tokens: int) -> None:
    made = make_requests(name, VOCAB)
    assert len(made) == requests
    assert sum(len(r.prompt) for r in made) == prompt_tokens
    assert sum(r.sampling.max_tokens * r.sampling.n for r in made) == new_tokens


def test_prefix_prompts_begin_alike_and_no_others_do() -> None:
    prompts = [r.prompt for r in make_requests("prefix", VOCAB, 5)]
    assert all(np.array_equal(p[:2048], prompts[0][:2048]) for p in prompts)
    assert len({tuple(p[2048:2052]) for p in prompts}) == 5
    assert len({tuple(r.prompt[:8]) for r in make_requests("samples", VOCAB, 5)}) == 5
