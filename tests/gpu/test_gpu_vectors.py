"""Vectors and adapters on a GPU: those of the reference in float32, through the step loop that is one step ahead."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from engine.tiny_engine import run
from gpu.test_gpu_engine import LLAMA, VOCAB, make_engine, weights_of

from batchinfer.models.decoder import Decoder
from batchinfer.models.lora import Adapter, Factors, Grouped, Stacked, pack_adapters
from batchinfer.models.model_spec import ModelSpec
from batchinfer.models.packing import pack
from batchinfer.ops import Ops
from batchinfer.ops.native import NativeOps
from batchinfer.ops.reference import ReferenceOps
from batchinfer.types import Pooling, PoolSpec, Request, SamplingParams

HIDDEN, CLASSES = LLAMA.with_head("hidden"), replace(LLAMA.with_head("classes"), classes=3)
BOUND = {torch.float32: 2e-4, torch.bfloat16: 4e-2}
"""Largest distance of a vector's values, relative to the largest."""


def two_adapters() -> list[Adapter]:
    """Of different ranks and matrices; values that bfloat16 holds."""
    random = torch.Generator().manual_seed(2)

    def factors(rows: int, columns: int, rank: int) -> Factors:
        a, b = (torch.randn(shape, generator=random) / 16 for shape in ((rank, columns), (rows, rank)))
        return Factors(*(t.bfloat16().float() for t in (a, b)))

    one = {f"layers.{i}.{name}": factors(*shape, 8) for i in range(3) for name, shape in SHAPES.items()}
    return [one, {"layers.1.o": factors(256, 512, 5)}]


SHAPES = {"qkv": (768, 256), "gate_up": (1280, 256), "down": (256, 640)}


def decoder_of(spec: ModelSpec, ops: Ops, dtype: torch.dtype, pooling: Pooling | None, adapted: bool) -> Decoder:
    weights = {name: t.to(dtype) if t.ndim == 2 else t for name, t in weights_of(spec).items()}
    sizes = {"max_positions": 512, "max_step_tokens": 512, "max_samples": 256}
    kind = Grouped if ops.device.type == "cpu" else Stacked
    adapters = pack_adapters(two_adapters() if adapted else [], ops, dtype, kind)
    packed = pack(spec, weights.items(), ops, adapted=adapters)
    return Decoder(spec, packed, ops, dtype, **sizes, pooling=pooling, adapters=adapters)


def vectors(
    spec: ModelSpec, ops: Ops, dtype: torch.dtype, pooling: Pooling, adapted: bool = False, **options: int
) -> np.ndarray:
    """float32 [24, width]: prompts that mostly begin alike, some of them through an adapter."""
    decoder = decoder_of(spec, ops, dtype, pooling, adapted)
    pool = PoolSpec(pooling, spec.classes or spec.width, spec.head)
    engine = make_engine(decoder, pool, 2 if adapted else 0, **options)
    rng = np.random.default_rng(6)
    shared = rng.integers(2, VOCAB, 40)
    requests = []
    for i in range(24):
        prompt = np.concatenate([shared[: 40 * (i % 4 > 0)], rng.integers(2, VOCAB, rng.integers(1, 120))])
        adapter = (None, 0, 1)[i % 3] if adapted else None
        requests.append(Request(i, prompt.astype(np.int32), SamplingParams(), adapter=adapter))
    done = run(engine, requests)
    engine.close()
    return np.stack([done[i].samples[0].vector for i in range(24)])


def check(spec: ModelSpec, gpu: Ops, dtype: torch.dtype, pooling: Pooling, adapted: bool = False) -> None:
    expected = vectors(spec, ReferenceOps(), torch.float32, pooling, adapted)
    for options in ({}, {"max_slots": 5, "max_step_tokens": 48}):
        got = vectors(spec, gpu, dtype, pooling, adapted, **options)
        assert np.abs(got - expected).max() < BOUND[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.hardware("task=embed, classify")
def test_vectors_are_those_of_the_reference(real_gpu, pooling: Pooling, dtype: torch.dtype) -> None:
    check(HIDDEN, real_gpu, dtype, pooling)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.hardware("task=embed, classify")
def test_classes_are_those_of_the_reference(real_gpu, dtype: torch.dtype) -> None:
    check(CLASSES, real_gpu, dtype, "last")


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.hardware("LoRA adapters")
def test_adapters_are_those_of_the_reference(real_gpu, pooling: Pooling, dtype: torch.dtype) -> None:
    check(HIDDEN, real_gpu, dtype, pooling, adapted=True)


@pytest.mark.hardware("LoRA adapters")
def test_tokens_through_adapters_in_captured_steps(real_gpu) -> None:
    """In float32: those of the CPU, whose rows go through their adapters group by group."""
    rng, params = np.random.default_rng(8), SamplingParams(max_tokens=30, ignore_eos=True)
    asked = [
        Request(
            i,
            rng.integers(2, VOCAB, 5 + i % 40).astype(np.int32),
            replace(params, max_tokens=20 + i % 10),
            adapter=(None, 0, 1)[i % 3],
        )
        for i in range(60)
    ]
    done, shapes = [], set()
    for ops in (NativeOps(), real_gpu):
        engine = make_engine(decoder_of(LLAMA, ops, torch.float32, None, True), None, 2, max_slots=24)
        done.append(run(engine, asked))
        shapes = {(shape.decode_only, shape.adapted) for shape in getattr(engine._runner, "_graphs", {})}
        engine.close()
    assert {(False, True), (True, True)} <= shapes
    same = [done[0][i].samples[0].token_ids.tolist() == done[1][i].samples[0].token_ids.tolist() for i in range(60)]
    assert sum(same) >= 0.9 * len(same)
