"""Decoder and engine on a GPU against the CPU in float32: logits, tokens, graphs, and the step ahead."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.tiny_engine import LetterTokenizer, run
from gpu.backend import SYCL, EmulatedOps, HostAccelerator

from batchinfer._engine import Scheduler
from batchinfer.config import EngineConfig, ModelConfig
from batchinfer.engine.device_runner import DeviceRunner
from batchinfer.engine.engine import Engine
from batchinfer.engine.lengths import LengthPredictor
from batchinfer.engine.loading import load_engine
from batchinfer.engine.runner import make_runner
from batchinfer.models.decoder import Decoder, StepInput
from batchinfer.models.layout import layout
from batchinfer.models.model_spec import ExpertSpec, ModelSpec
from batchinfer.models.packing import pack
from batchinfer.models.rope import RopeSpec
from batchinfer.ops import AttentionInput, Ops
from batchinfer.ops.accelerator import Accelerator
from batchinfer.ops.reference import ReferenceOps
from batchinfer.types import Completion, JobError, PoolSpec, Request, SamplingParams

VOCAB = 512
LLAMA = ModelSpec(
    architecture="LlamaForCausalLM",
    layers=3,
    width=256,
    heads=8,
    kv_heads=2,
    head_dim=64,
    mlp_width=640,
    vocab_size=VOCAB,
    norm_eps=1e-5,
    tied_embeddings=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm="",
    rope=RopeSpec("default", theta=10000.0, width=64, trained_positions=512),
    max_positions=512,
)
SPECS = {
    "llama": LLAMA,
    "qwen2": replace(LLAMA, qkv_bias=True, tied_embeddings=False),
    "qwen3": replace(
        LLAMA,
        qk_norm="head",
        heads=4,
        head_dim=128,
        rope=RopeSpec("default", 10000.0, width=128, trained_positions=512),
    ),
    "olmo2": replace(LLAMA, qk_norm="all", pre_norm=False, post_norm=True),
    "mixture": replace(LLAMA, experts=ExpertSpec(8, 2, 96, True, 64, (True, False, True))),
    "gemma2": replace(
        LLAMA, activation="gelu_tanh", post_norm=True, score_softcap=30.0, logit_softcap=20.0, windows=(20, 0, 20)
    ),
    "narrow heads": replace(LLAMA, head_dim=32, rope=RopeSpec("default", 10000.0, width=32, trained_positions=512)),
}
BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest distance of the logits from those in float32, relative to their size."""


class Letters(LetterTokenizer):
    vocab_size = VOCAB


def weights_of(spec: ModelSpec) -> dict[str, torch.Tensor]:
    """In float32, but values that bfloat16 holds: what differs then is the arithmetic alone."""
    random = torch.Generator().manual_seed(1)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 2:
            deviation = 1.0 if name in ("embed", "lm_head") else shape[1] ** -0.5
            values = torch.randn(shape, generator=random) * deviation
        else:
            values = torch.randn(shape, generator=random) * 0.1 + (0.0 if name.endswith("bias") else 1.0)
        return values.bfloat16().float()

    return {name: draw(name, shape) for name, shape in layout(spec).targets.items()}


def make_decoder(spec: ModelSpec, ops: Ops, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> Decoder:
    weights = {name: t.to(dtype) if t.ndim == 2 else t for name, t in weights_of(spec).items()}
    sizes = {"max_positions": min(512, spec.max_positions), "max_step_tokens": 512, "max_samples": 256}
    return Decoder(spec, pack(spec, weights.items(), ops), ops, dtype, kv_dtype=kv_dtype, **sizes)


def make_engine(decoder: Decoder, pool: PoolSpec | None = None, adapters: int = 0, **options: Any) -> Engine:
    given = {"num_pages": 400, "page_size": 16, "max_slots": 64, "max_step_tokens": 256} | options
    make = step_loop if isinstance(decoder.ops, EmulatedOps) else make_runner
    runner = make(decoder, given["page_size"], given["max_slots"])
    assert runner.allocate(given["num_pages"]) == given["num_pages"]
    return Engine(
        Scheduler(max_seq_len=512, prefix_cache=True, **given),
        runner,
        Letters(),  # type: ignore[arg-type]
        LengthPredictor(),
        max_seq_len=512,
        max_slots=given["max_slots"],
        num_pages=given["num_pages"],
        page_size=given["page_size"],
        vocab_size=VOCAB,
        pool=pool,
        adapters=adapters,
    )


def step_loop(decoder: Decoder, page_size: int, max_slots: int) -> DeviceRunner:
    """A GPU's, for kernels that run on the host."""
    return DeviceRunner(decoder, page_size, max_slots, HostAccelerator())


def prompts(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(5)
    shared = random.integers(2, VOCAB, 40)
    own = [random.integers(2, VOCAB, random.integers(1, 90)) for _ in range(count)]
    return [np.concatenate([shared, p] if i % 2 else [p]).astype(np.int32) for i, p in enumerate(own)]


def step_logits(decoder: Decoder) -> torch.Tensor:
    """Two prompts of 61 and 30 tokens, and then one more token of each: logits of all rows."""
    device = decoder.ops.device
    cache = decoder.new_cache(8, 16)
    table = torch.tensor([[3, 1, 6, 0, 7], [2, 5, 4, 4, 4]], dtype=torch.int32)
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, decoder.spec.vocab_size, 93).astype(np.int32))
    rows = []
    for pieces in ([(0, 0, 61), (1, 0, 30)], [(0, 61, 62), (1, 30, 31)]):
        positions = [torch.arange(first, last) for _, first, last in pieces]
        index = [table[s, p // 16].long() * 16 + p % 16 for (s, _, _), p in zip(pieces, positions, strict=True)]
        start = torch.tensor([0, *(last - first for _, first, last in pieces)]).cumsum(0).int()
        step = StepInput(
            token_ids=torch.cat([ids[s * 62 + p] for (s, _, _), p in zip(pieces, positions, strict=True)]).to(device),
            positions=torch.cat(positions).int().to(device),
            kv_index=torch.cat(index).to(device),
            attention=AttentionInput(
                q_start=start.to(device),
                kv_len=torch.tensor([last for *_, last in pieces], dtype=torch.int32, device=device),
                slot=torch.tensor([0, 1], dtype=torch.int32, device=device),
                page_table=table.to(device),
            ),
            sample_row=torch.arange(int(start[-1]), dtype=torch.int32, device=device),
        )
        rows.append(decoder.forward(step, cache)[0].cpu().clone())
    return torch.cat(rows)


def skip_what_triton_serves(spec: ModelSpec) -> None:
    narrow = spec.rope is not None and spec.rope.width % 16
    if SYCL and (spec.experts or spec.qk_norm == "all" or narrow):
        pytest.skip("Triton's kernels serve this, and want a GPU")


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.feature("engine", "CUDA logits are those of the CPU in float32, to rounding")
def test_logits(quick_gpu, name: str, dtype: torch.dtype) -> None:
    skip_what_triton_serves(SPECS[name])
    want = step_logits(make_decoder(SPECS[name], ReferenceOps(), torch.float32))
    got = step_logits(make_decoder(SPECS[name], quick_gpu, dtype))
    assert (got - want).norm() <= BOUND[dtype] * want.norm()  # false for NaN


PLAIN = SamplingParams(max_tokens=40, ignore_eos=True)
CASES = {
    "greedy": PLAIN,
    "sampled": replace(PLAIN, n=2, temperature=0.8, top_p=0.9),
    "filtered": replace(PLAIN, temperature=1.0, top_k=20, min_p=0.02),
    "stop ids": replace(PLAIN, stop_token_ids=tuple(range(5, VOCAB, 30)), min_tokens=3),
    "stop strings": replace(PLAIN, stop=("A", "bc", "7"), min_tokens=2),
    "penalties": replace(PLAIN, repetition_penalty=1.3, presence_penalty=0.5),
    "logprobs": replace(PLAIN, logprobs=3),
    "bad words": replace(PLAIN, bad_words=("A", "BC", "7"), n=2, temperature=0.8),
    "form": replace(PLAIN, ignore_eos=False, regex="([A-F]{3}-[0-9]{2},)*"),
}
OPTIONS: list[dict[str, Any]] = [{}, {"num_pages": 30, "max_slots": 8, "max_step_tokens": 40}, {"lookup": 3}]


def tokens(done: dict[int, Completion]) -> dict[int, list[list[int]]]:
    return {i: [s.token_ids.tolist() for s in c.samples] for i, c in sorted(done.items())}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.feature("engine", "CUDA gives the CPU's tokens, greedy and sampled, with graphs and a step ahead")
@pytest.mark.feature("engine", "the GPU's step loop over SYCL kernels on the CPU device gives the CPU's greedy tokens")
@pytest.mark.hardware("continuous batching, greedy and sampled tokens")
def test_tokens_in_float32_are_the_cpus(quick_gpu, case: str, options: dict[str, Any]) -> None:
    """Sums in another order move logits by 1e-6 of their size, which decides a token once in many thousands."""
    from batchinfer.ops.native import NativeOps

    if case == "form":
        pytest.importorskip("llguidance")
    requests = [Request(i, p, CASES[case], seed=i) for i, p in enumerate(prompts(30))]
    want = run(make_engine(make_decoder(LLAMA, NativeOps(), torch.float32), **options), requests)
    engine = make_engine(make_decoder(LLAMA, quick_gpu, torch.float32), **options)
    got = run(engine, requests)
    same = [a == b for i in want for a, b in zip(tokens(want)[i], tokens(got)[i], strict=True)]
    least = 1.0 if SYCL and case == "greedy" else 0.9
    assert sum(same) >= least * len(same), f"{len(same) - sum(same)} of {len(same)} samples differ"
    if case == "logprobs":
        for i in (i for i in want if tokens(want)[i] == tokens(got)[i]):
            a, b = want[i].samples[0].logprobs, got[i].samples[0].logprobs
            assert a is not None
            assert b is not None
            np.testing.assert_allclose(a.chosen, b.chosen, atol=1e-3)
            np.testing.assert_allclose(a.top, b.top, atol=1e-3)
    assert engine.stats().pages_used == 0
    engine.close()


@pytest.mark.feature("engine", "CUDA spares the attention of those whom a stop token has ended, in captured steps too")
def test_a_sequence_that_has_ended_is_spared(quick_gpu) -> None:
    """Once, in the step that is under way when the host sees the token; and its next turn finds no more than was
    computed."""
    decoder = make_decoder(LLAMA, quick_gpu, torch.float32)
    plain = replace(PLAIN, temperature=100.0)  # colder, a random model repeats itself
    free = [Request(i, p, plain, seed=i) for i, p in enumerate(prompts(24))]
    want = tokens(run(make_engine(decoder), free))
    asked, length = [], {}
    for request in free:
        (its,) = want[request.id]
        ends = [n for n in range(8, 40) if its[n - 1] not in its[: n - 1] and (len(request.prompt) + n) % 16 == 0]
        if ends:
            length[request.id] = ends[0]
            params = replace(plain, stop_token_ids=(its[ends[0] - 1],))
            asked.append(replace(request, sampling=params))
    assert len(asked) > 12
    engine = make_engine(decoder)
    runner, spared = engine._runner, 0
    start = runner.start

    def look(*args: Any) -> None:
        nonlocal spared
        start(*args)
        spared += int((runner._buffer.arrays["kv_len"] < 0).sum())

    runner.start = look  # type: ignore[method-assign]
    got = tokens(run(engine, asked))
    assert got == {i: [want[i][0][:n]] for i, n in length.items()}
    assert spared == len(asked)
    more = np.arange(7, 27, dtype=np.int32)
    turns = [Request(i, np.concatenate([free[i].prompt, got[i][0], more]).astype(np.int32), PLAIN) for i in length]
    found = engine.stats().cached_prompt_tokens
    again, fresh = tokens(run(engine, turns)), tokens(run(make_engine(decoder), turns))
    assert engine.stats().cached_prompt_tokens - found >= sum(len(turn.prompt) - len(more) - 16 for turn in turns)
    assert sum(again[i] == fresh[i] for i in fresh) >= 0.9 * len(fresh)
    engine.close()


@pytest.mark.hardware("task=score")
def test_scores_are_the_cpus(quick_gpu) -> None:
    """Of the second half of each text, in steps that cut it, and beside texts that are continued."""
    from batchinfer.ops.native import NativeOps

    texts = [p for p in prompts(30) if len(p) > 1]
    requests = [Request(i, p, PLAIN, scored_from=None if i % 5 == 0 else len(p) // 2) for i, p in enumerate(texts)]
    want, got = (
        run(make_engine(make_decoder(LLAMA, ops, torch.float32), max_step_tokens=96), requests)
        for ops in (NativeOps(), quick_gpu)
    )
    for request in requests:
        a, b = want[request.id].samples[0], got[request.id].samples[0]
        if request.scored_from is not None:
            assert (a.finish_reason, b.finish_reason) == ("scored", "scored")
            np.testing.assert_allclose(a.logprobs.chosen, b.logprobs.chosen, atol=1e-3)


@pytest.mark.parametrize("case", [*CASES, "scores"])
def test_no_step_waits_for_the_device(real_gpu, case: str) -> None:
    """Neither to start nor to sample: torch raises where the host would wait for what is launched."""
    if real_gpu.device.type != "cuda":
        pytest.skip("torch.xpu does not tell when it waits")
    if case == "form":
        pytest.importorskip("llguidance")
    params = CASES.get(case, PLAIN)
    scored_from = 1 if case == "scores" else None
    texts = [p for p in prompts(30) if len(p) > 1]
    requests = [Request(i, p, params, seed=i, scored_from=scored_from) for i, p in enumerate(texts)]
    engine = make_engine(make_decoder(LLAMA, real_gpu, torch.bfloat16), max_step_tokens=96)
    runner = engine._runner

    def watched(call: Callable[..., None]) -> Callable[..., None]:
        def watch(*args: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                call(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return watch

    for name in ("start", "sample"):
        setattr(runner, name, watched(getattr(runner, name)))
    done = run(engine, requests)
    assert [done[request.id].error for request in requests] == [None] * len(requests)


@pytest.mark.parametrize("lookup", [0, 3])
@pytest.mark.hardware("steps recorded or captured, and repeated")
def test_a_captured_step_gives_the_tokens_of_a_launched_one(real_gpu, lookup: int) -> None:
    """Decoding steps, and those that begin prompts meanwhile or have drafts in them."""
    params = replace(PLAIN, temperature=0.9)
    requests = [Request(i, p, replace(params, max_tokens=20 + i % 30), seed=i) for i, p in enumerate(prompts(90))]
    decoder = make_decoder(LLAMA, real_gpu, torch.float32)
    captured, launched = (make_engine(decoder, lookup=lookup, max_slots=32) for _ in range(2))
    launched._runner._captured = lambda shape: False  # type: ignore[method-assign]
    want, got = run(launched, requests), run(captured, requests)
    graphs = captured._runner._graphs
    assert {shape.decode_only for shape in graphs} >= ({False} if lookup else {False, True})
    same = [a == b for a, b in zip(tokens(want).values(), tokens(got).values(), strict=True)]
    assert sum(same) >= 0.95 * len(same)


def test_nothing_is_collected_while_a_step_is_captured(real_gpu) -> None:
    """A graph that dies meanwhile, of an engine that nobody has closed, would end the capture."""
    gpu = Accelerator(real_gpu.device)
    if not gpu.graphs:
        pytest.skip("this backend captures nothing")
    x, pool = torch.zeros(8, device=real_gpu.device), gpu.graph_pool()
    graphs: list[Any] = []

    def compute() -> torch.Tensor:
        if graphs:
            garbage: list[Any] = [graphs.pop()]
            garbage.append(garbage)
            del garbage
            assert len([[] for _ in range(1000)]) == 1000  # enough new objects for a collection
        return x + 1

    compute()
    gpu.synchronize()
    thresholds = gc.get_threshold()
    with gpu.on(gpu.stream()):
        graphs.append(gpu.capture(compute, pool)[0])
        try:
            gc.set_threshold(10, 1, 1)
            graph, out = gpu.capture(compute, pool)
        finally:
            gc.set_threshold(*thresholds)
        graph.replay()
        gpu.synchronize()
    assert out.tolist() == [1.0] * 8


@pytest.mark.hardware("drafts by prompt lookup")
def test_right_drafts_save_steps(real_gpu) -> None:
    """One sequence that repeats itself: its steps are its tokens, less the draft tokens that were right."""
    params = replace(PLAIN, max_tokens=60, allowed_token_ids=(3, 4))
    engine = make_engine(make_decoder(LLAMA, real_gpu, torch.float32), lookup=3)
    run(engine, [Request(0, prompts(1)[0], params)])
    stats = engine.stats()
    assert stats.accepted_tokens > 20
    assert stats.decode.steps + stats.prefill.steps == 60 - stats.accepted_tokens


def distance_of_greedy(decoder: Decoder) -> tuple[float, float]:
    """Of the engine's greedy tokens, given the tokens so far, from the best ones in float32: the largest gap of their
    logits, in standard deviations, and the share that is the same."""
    done = run(make_engine(decoder), [Request(i, p, PLAIN) for i, p in enumerate(prompts(16))])
    truth, worst, agreed, count = make_decoder(LLAMA, ReferenceOps(), torch.float32), 0.0, 0, 0
    for i, prompt in enumerate(prompts(16)):
        chosen = done[i].samples[0].token_ids
        ids = torch.from_numpy(np.concatenate([prompt, chosen]))
        places = torch.arange(len(ids), dtype=torch.int32)
        one = torch.tensor([0, len(ids)], dtype=torch.int32)
        table = torch.arange(32, dtype=torch.int32)[None]
        step = StepInput(
            ids, places, places.long(), AttentionInput(one, one[1:], one[:1], table), places[len(prompt) - 1 : -1]
        )
        logits, _ = truth.forward(step, truth.new_cache(32, 16))
        best = logits.max(dim=1)
        gap = best.values - logits.gather(1, torch.from_numpy(chosen).long()[:, None])[:, 0]
        worst = max(worst, float((gap / logits.std(dim=1)).max()))
        agreed += int((best.indices.numpy() == chosen).sum())
        count += len(chosen)
    print(f"greedy: {agreed} of {count} tokens are float32's, worst gap {worst:.4f} standard deviations")
    return worst, agreed / count


def test_greedy_in_bfloat16_stays_near_float32(real_gpu) -> None:
    """To rounding."""
    worst, same = distance_of_greedy(make_decoder(LLAMA, real_gpu, torch.bfloat16))
    assert worst < 0.15
    assert same > 0.93


def config_folder(tmp_path: Path) -> str:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 1000,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_an_engine_from_a_configuration_takes_what_the_device_has(real_gpu, tmp_path: Path) -> None:
    model = ModelConfig(config_folder(tmp_path), dummy_weights=True)
    tokenizer: Any = Letters()
    engine = load_engine(model, EngineConfig(max_slots=64), tokenizer=tokenizer)
    assert engine.stats().pages_total == 64 * 2048 // 16  # no more than the slots can use
    params = SamplingParams(max_tokens=300, temperature=1.0, n=4, ignore_eos=True)
    done = run(engine, [Request(i, np.arange(1 + 7 * i, dtype=np.int32), params, seed=i) for i in range(20)])
    assert all(len(s.token_ids) == 300 for c in done.values() for s in c.samples)
    assert engine.stats().device_bytes > 0
    before = torch.cuda.mem_get_info()[0]
    engine.close()
    assert torch.cuda.mem_get_info()[0] - before > 64 * 2048 * 2 * 2 * 2 * 64 * 2  # the pool's bytes at least
    with pytest.raises(JobError, match=r"page_size=8.*at least 16"):
        load_engine(model, EngineConfig(page_size=8), tokenizer=tokenizer)
    with pytest.raises(JobError, match=r"does not fit: .* GiB are free now"):
        load_engine(model, EngineConfig(num_pages=2**26), tokenizer=tokenizer)
