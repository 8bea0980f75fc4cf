"""The least time of steps, by hand."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine.tiny_engine import SPEC, VOCAB, make_decoder, make_engine, run

from batchinfer.config import EngineConfig
from batchinfer.engine.probe import measure
from batchinfer.engine.roofline import Ceilings, Costs, distinct_experts, least_seconds, roofline_share
from batchinfer.models.layout import num_parameters
from batchinfer.models.model_spec import ExpertSpec
from batchinfer.types import ExitCode, JobError, Request, SamplingParams, StepWork


def test_the_costs_of_llama_3_8b() -> None:
    """8.03e9 parameters, of which 0.53e9 of the embedding are looked up, not read; 128 KiB of bf16 keys and values."""
    spec = replace(SPEC, layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, mlp_width=14336, vocab_size=128256)
    costs = Costs.of(spec, 2)
    norms = (2 * 32 + 1) * 4096
    untied = num_parameters(replace(spec, tied_embeddings=False))
    assert costs.weight_bytes == 2 * (untied - norms - 128256 * 4096)
    assert costs.token_flops + costs.sample_flops == costs.weight_bytes  # two operations for two bytes
    assert costs.kv_bytes == 131072
    assert costs.pair_flops == 4 * 32 * 4096


EXPERTS = ExpertSpec(count=60, per_token=4, width=10, renormalise=True, shared_width=30, layers=(True, False))


def test_of_a_mixture_what_a_token_goes_through() -> None:
    """And what steps read beside that: the experts that some token of theirs goes through."""
    plain, mixed = Costs.of(SPEC, 2), Costs.of(replace(SPEC, experts=EXPERTS), 2)
    every, expert = 32 * (3 * 30 + 61) - 32 * 3 * 48, 32 * 3 * 10
    assert mixed.token_flops - plain.token_flops == 2 * (every + 4 * expert)
    assert mixed.weight_bytes - plain.weight_bytes == 2 * every
    assert (mixed.experts, mixed.per_token, mixed.expert_bytes) == (60, 4, 2 * expert)
    assert plain.token_flops - Costs.of(replace(SPEC, gated=False), 2).token_flops == 2 * 2 * 32 * 48


def test_experts_that_a_step_reads() -> None:
    """Drawn: each token's choices are a random subset."""
    assert distinct_experts(1, 60, 4) == pytest.approx(4)
    assert distinct_experts(100_000, 60, 4) == pytest.approx(60)
    random = np.random.default_rng(0)
    drawn = [len({e for _ in range(20) for e in random.choice(60, 4, replace=False)}) for _ in range(300)]
    assert distinct_experts(20, 60, 4) == pytest.approx(np.mean(drawn), rel=0.01)


def test_a_mixtures_steps_read_by_their_size() -> None:
    """A step of one token reads its 4 experts; one of many tokens reads all 60, once."""
    costs = replace(Costs.of(replace(SPEC, experts=EXPERTS), 2), weight_bytes=0)
    assert costs.step(1, 0, 0, 0)[1] == pytest.approx(4 * costs.expert_bytes)
    assert costs.step(4000, 0, 0, 0)[1] == pytest.approx(60 * costs.expert_bytes)


def test_quantised_weights_are_read_in_their_own_size() -> None:
    costs = Costs.of(replace(SPEC, experts=EXPERTS), 4)
    whole = costs.weight_bytes + 60 * costs.expert_bytes
    quarter = costs.quantised(whole // 4)
    assert quarter.weight_bytes == pytest.approx(costs.weight_bytes / 4)
    assert quarter.expert_bytes == pytest.approx(costs.expert_bytes / 4)
    assert quarter.token_flops == costs.token_flops


def test_the_scarcer_of_the_two_decides() -> None:
    costs = Costs(token_flops=10, sample_flops=100, pair_flops=1, weight_bytes=1000, kv_bytes=2)
    flops, read = costs.step(tokens=50, samples=4, context=600, pairs=700)
    assert (flops, read) == (500 + 400 + 700, 1000 + 1200)
    work = StepWork(seconds=10_000.0, least_flops=flops, least_bytes=read)
    assert least_seconds(work, Ceilings(flops=1.0, bandwidth=1e9)) == flops
    assert least_seconds(work, Ceilings(flops=1e9, bandwidth=1.0)) == read
    assert roofline_share(work, Ceilings(flops=1e9, bandwidth=1.0)) == 0.22
    assert roofline_share(StepWork(), Ceilings(flops=1e9, bandwidth=1.0)) == 0


def test_an_engine_counts_what_its_steps_compute() -> None:
    """Two prompts of 10 and 3 tokens in one step, then four steps of one token each."""
    costs = Costs(token_flops=10, sample_flops=100, pair_flops=1, weight_bytes=1000, kv_bytes=2)
    engine = make_engine(make_decoder(), prefix_cache=False, costs=costs)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    prompts = [torch.arange(2, 2 + n, dtype=torch.int32).numpy() % VOCAB for n in (10, 3)]
    run(engine, [Request(i, p, params) for i, p in enumerate(prompts)])
    prefill, decode = engine.stats().prefill, engine.stats().decode
    assert (prefill.steps, prefill.tokens, prefill.samples) == (1, 13, 2)
    assert (prefill.context, prefill.pairs) == (13, 10 * 11 // 2 + 3 * 4 // 2)
    assert (decode.steps, decode.tokens, decode.samples) == (4, 8, 8)
    assert decode.context == decode.pairs == sum(10 + i + 3 + i for i in range(1, 5))
    assert (prefill.least_flops, prefill.least_bytes) == (130 + 200 + prefill.pairs, 1000 + 2 * 13)
    assert (decode.least_flops, decode.least_bytes) == (80 + 800 + decode.pairs, 4000 + 2 * decode.context)
    assert (prefill + decode) - prefill == decode
    assert engine.stats().needed_prompt_tokens == engine.stats().prompt_tokens == 13
    assert prefill.seconds > 0 < decode.seconds
    idle = engine.stats().device_idle
    assert idle > 0
    begin = time.perf_counter()
    time.sleep(0.2)
    run(engine, [Request(9, prompts[0], params)])
    later = engine.stats()
    assert later.device_idle - idle < time.perf_counter() - begin - 0.2  # nothing was open then
    assert engine.stats().pages_peak == 4 + 2  # pages of 4 tokens, of 14 and 7 positions


def test_a_device_that_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(JobError, match=r"engine\.device=cuda: ") as caught:
        measure(EngineConfig(device="cuda"), torch.float32)
    assert caught.value.exit_code == ExitCode.UNFIT


def test_ceilings_are_measured_and_plausible() -> None:
    """Any machine that runs this reads a tenth of a gigabyte a second, and multiplies a gigaflop."""
    ceilings = measure(EngineConfig(device="cpu", threads=1), torch.float32)
    assert 1e8 < ceilings.bandwidth < 1e13
    assert 1e8 < ceilings.flops < 1e15
