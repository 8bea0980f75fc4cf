"""What the order of requests is worth, told by the real scheduler on a device that computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from batchinfer.engine.engine import Engine
from batchinfer.engine.planner import shared_tokens
from batchinfer.engine.simulate import Feed, Pool, Simulated, simulate
from batchinfer.feed import steps
from batchinfer.types import Completion, Request, SamplingParams
from batchinfer.workloads import make_requests

ROOMY = Pool(num_pages=20_000, page_size=16, max_slots=256, max_step_tokens=1024, max_seq_len=4096)


def in_order(reorder: bool) -> Feed:
    def feed(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
        return [completion for step in steps(engine, requests, reorder) for completion in step]

    return feed


def both(requests: Sequence[Request], lengths: np.ndarray, pool: Pool) -> tuple[Simulated, Simulated]:
    """As they came, and reordered."""
    as_it_came, planned = (simulate(requests, lengths, pool, in_order(reorder)) for reorder in (False, True))
    decoded = sum((n - 1) * r.sampling.n for n, r in zip(lengths.tolist(), requests, strict=True))
    for run in (as_it_came, planned):
        assert run.tokens - run.prompt_tokens <= decoded  # the tokens of a prompt's last step count with the prompt
        assert run.widths.sum() >= decoded
    return as_it_came, planned


def prefix_groups(groups: int, members: int, shared: int, own: int, seed: int = 0) -> list[Request]:
    random = np.random.default_rng(seed)
    begins = random.integers(0, 50_000, (groups, shared))
    params = SamplingParams(max_tokens=64)
    prompts = [np.concatenate([b, random.integers(0, 50_000, own)]) for b in begins for _ in range(members)]
    return [Request(i, prompts[j].astype(np.int32), params) for i, j in enumerate(random.permutation(len(prompts)))]


@pytest.mark.feature("engine", "rows in hand are ordered by common beginning, and longest first at the end of a job")
def test_groups_in_random_order_are_computed_once_each() -> None:
    """64 groups of 16 with a cache for a dozen beginnings: as they came, most beginnings are computed again and again
    (429,230 prompt tokens in 2,262 steps, against 65,536 in 669)."""
    requests = prefix_groups(64, 16, shared=512, own=32)
    lengths = np.random.default_rng(1).integers(16, 65, len(requests))
    pool = replace(ROOMY, num_pages=600, max_slots=64)
    as_it_came, planned = both(requests, lengths, pool)
    prompts = [request.prompt for request in requests]
    least = sum(map(len, prompts)) - shared_tokens(prompts, pool.page_size)
    assert planned.prompt_tokens == least
    assert as_it_came.prompt_tokens > 5 * least
    assert planned.steps < as_it_came.steps / 3
    assert planned.preemptions == 0


@pytest.mark.parametrize("pages", [3000, 20_000])
def test_known_lengths_fill_the_batch_to_the_end(pages: int) -> None:
    """Chat-like lengths that max_tokens tells: with slots scarce 1,706 steps for 2,284 (the least is 1,496), with pages
    scarce 3,570 for 4,011."""
    requests = make_requests("sharegpt", 50_000, 2000)
    requests = [replace(r, sampling=replace(r.sampling, ignore_eos=False)) for r in requests]
    lengths = np.array([r.sampling.max_tokens for r in requests])
    as_it_came, planned = both(requests, lengths, replace(ROOMY, num_pages=pages))
    assert planned.steps < (0.76 if pages == 20_000 else 0.9) * as_it_came.steps
    assert planned.prompt_tokens == as_it_came.prompt_tokens
    assert planned.preemptions == 0


def test_known_lengths_fill_every_step_until_the_longest_ends() -> None:
    """With slots for all, the longest decides how many steps there are: 1,024. As they came, 653 of them have at most
    128 sequences; spread out, 285."""
    requests = make_requests("sharegpt", 50_000, 1000)
    lengths = np.array([r.sampling.max_tokens for r in requests])
    pool = replace(ROOMY, num_pages=60_000, max_slots=1024, max_step_tokens=8192)
    as_it_came, planned = both(requests, lengths, pool)
    assert planned.steps <= 1.01 * as_it_came.steps
    narrow = [np.count_nonzero(run.widths <= 128) for run in (as_it_came, planned)]
    assert narrow[1] < 0.45 * narrow[0]
    assert planned.widths.max() < as_it_came.widths.max() / 3


def test_where_nothing_is_known_nothing_is_lost() -> None:
    """Chat-like lengths that nobody knows, and prompts that share nothing."""
    drawn = make_requests("sharegpt", 50_000, 1000)
    lengths = np.array([r.sampling.max_tokens for r in drawn])
    requests = [replace(r, sampling=SamplingParams(max_tokens=1024)) for r in drawn]
    for pages in (1500, 20_000):
        as_it_came, planned = both(requests, lengths, replace(ROOMY, num_pages=pages))
        assert planned.seconds(5e-3, 2e-5, 4e-8) <= 1.01 * as_it_came.seconds(5e-3, 2e-5, 4e-8)


def test_samples_of_a_request_and_several_windows() -> None:
    """What comes later can't be ordered with what is gone, but it goes on in the group that was last."""
    requests = [replace(r, sampling=replace(r.sampling, n=3)) for r in prefix_groups(8, 8, shared=64, own=4)]
    lengths = np.full(len(requests), 5)
    run = simulate(requests, lengths, replace(ROOMY, num_pages=300, max_slots=8), in_order(True))
    assert run.steps >= len(requests) * 3 * 5 / 8
    assert run.prompt_tokens >= 8 * 64 + 64 * 4


@pytest.mark.parametrize(("tokens", "portions"), [(128, [256, 256, 256, 256]), (16, [2048, 352, 0, 0])])
def test_requests_go_in_by_portions(tokens: int, portions: list[int]) -> None:
    """An idle engine begins with the first of many, and more come step by step; but of short prompts what a few steps
    take is many requests."""
    went_in = []

    def feed(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
        left, done = iter(requests), []
        while engine.num_open or not went_in:
            went_in.append(0)
            while engine.wants_more and (request := next(left, None)) is not None:
                engine.add(request)
                went_in[-1] += 1
            done += engine.step()
        return done

    requests = prefix_groups(1, 2400, shared=0, own=tokens)
    pool = replace(ROOMY, max_slots=2000, max_step_tokens=8192)
    simulate(requests, np.full(len(requests), 9), pool, feed)
    assert went_in[:4] == portions


def test_a_request_that_cannot_run_is_no_result() -> None:
    requests = prefix_groups(1, 2, shared=64, own=4)
    with pytest.raises(ValueError, match="2 requests went in, and not all"):
        simulate(requests, np.array([3, 3]), replace(ROOMY, num_pages=2), in_order(True))


def test_predicted_lengths_admit_more_than_the_worst_case_and_preempt_little() -> None:
    """Chat-like answers of 190 tokens on average, max_tokens 1024, pages scarce: 42 sequences run at a time for the 26
    that the worst case allows."""
    drawn = make_requests("sharegpt", 50_000, 2000)
    lengths = np.array([r.sampling.max_tokens for r in drawn])
    requests = [replace(r, sampling=SamplingParams(max_tokens=1024)) for r in drawn]
    run = simulate(requests, lengths, replace(ROOMY, num_pages=1500), in_order(True))
    assert run.widths.mean() > 36
    assert run.preemptions < 0.08 * len(requests)
    needed = sum(len(r.prompt) for r in requests)
    assert run.prompt_tokens < 1.06 * needed
