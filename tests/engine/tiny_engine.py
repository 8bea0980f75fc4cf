"""A tiny random model with a letter for every token, and engines around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
import torch

from batchinfer import ops as op_list
from batchinfer._engine import Scheduler
from batchinfer.engine.engine import Engine
from batchinfer.engine.lengths import LengthPredictor
from batchinfer.engine.roofline import Costs
from batchinfer.engine.runner import HostRunner, Runner
from batchinfer.engine.trace import Trace
from batchinfer.models.decoder import Decoder
from batchinfer.models.lora import Factors, Grouped, Stacked, pack_adapters
from batchinfer.models.model_spec import ModelSpec
from batchinfer.models.packing import pack
from batchinfer.models.rope import RopeSpec
from batchinfer.ops import Ops
from batchinfer.types import Completion, Pooling, PoolSpec, Request

VOCAB, EOS = 64, 1
SPEC = ModelSpec(
    architecture="LlamaForCausalLM",
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=48,
    vocab_size=VOCAB,
    norm_eps=1e-5,
    tied_embeddings=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm="",
    rope=RopeSpec("default", theta=10000.0, width=8, trained_positions=128),
    max_positions=128,
)


class LetterTokenizer:
    """Token i is the character chr(33 + i); the end-of-sequence token is invisible, as special tokens are."""

    vocab_size = VOCAB
    eos_ids = (EOS,)

    def to_json(self) -> str:
        vocabulary = {"<unknown>": 0, "<end>": EOS} | {chr(33 + i): i for i in range(2, VOCAB)}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens(["<unknown>", "<end>"])
        return backend.to_str()

    def decode_batch(self, ids: list[np.ndarray], skip_special_tokens: bool = True) -> list[str]:
        """With special tokens the end is chr(34), which no other token is."""
        return ["".join(chr(33 + t) for t in row.tolist() if t != EOS or not skip_special_tokens) for row in ids]

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[np.ndarray]:
        return [np.array([ord(c) - 33 for c in text if c != " "], np.int32) for text in texts]

    def token_id(self, text: str) -> int | None:
        """Square brackets stand for the marks around thoughts."""
        return {"<think>": ord("[") - 33, "</think>": ord("]") - 33}.get(text)


def make_decoder(
    pooling: Pooling | None = None, ops: Ops | None = None, adapters: type[Grouped] | type[Stacked] | None = None
) -> Decoder:
    """``pooling``: it has no head, and makes vectors. ``ops``: instead of the CPU's. ``adapters``: it has two, of this
    kind."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    weights: dict[str, torch.Tensor] = {"embed": random(VOCAB, 32) * 3, "norm": torch.ones(32)}
    for layer in range(SPEC.layers):
        weights |= {
            f"layers.{layer}.attn_norm": torch.ones(32),
            f"layers.{layer}.qkv": random(64, 32),
            f"layers.{layer}.o": random(32, 32),
            f"layers.{layer}.mlp_norm": torch.ones(32),
            f"layers.{layer}.gate_up": random(96, 32),
            f"layers.{layer}.down": random(32, 48),
        }
    ops = ops or op_list.load("cpu", 1)
    spec = SPEC if pooling is None else SPEC.with_head("hidden")
    sizes = {"max_positions": 128, "max_step_tokens": 128, "max_samples": 64}
    adapted = {}
    if adapters:
        shapes = {"layers.0.qkv": (64, 32, 3), "layers.0.down": (32, 48, 2), "layers.1.o": (32, 32, 2)}
        one = {name: Factors(random(r, n), random(m, r)) for name, (m, n, r) in shapes.items()}
        adapted = pack_adapters(
            [one, {"layers.1.o": Factors(random(4, 32), random(32, 4))}], ops, torch.float32, adapters
        )
    packed = pack(spec, weights.items(), ops, adapted=adapted)
    return Decoder(spec, packed, ops, torch.float32, **sizes, pooling=pooling, adapters=adapted)


RunnerMaker = Callable[[Decoder, int, int], Runner]


def make_engine(
    decoder: Decoder,
    expected_share: float = 0.0,
    make_runner: RunnerMaker = HostRunner,
    trace: Trace | None = None,
    pool: PoolSpec | None = None,
    adapters: int = 0,
    costs: Costs | None = None,
    **options: Any,
) -> Engine:
    given = {"num_pages": 200, "page_size": 4, "max_slots": 8, "max_step_tokens": 64, "prefix_cache": True} | options
    scheduler = Scheduler(max_seq_len=128, **given)
    runner = make_runner(decoder, given["page_size"], given["max_slots"])
    runner.allocate(given["num_pages"])
    return Engine(
        scheduler,
        runner,
        LetterTokenizer(),  # type: ignore[arg-type]
        LengthPredictor(expected_share),
        max_seq_len=128,
        max_slots=given["max_slots"],
        num_pages=given["num_pages"],
        page_size=given["page_size"],
        vocab_size=VOCAB,
        trace=trace,
        pool=pool,
        adapters=adapters,
        costs=costs,
    )


def run(engine: Engine, requests: list[Request]) -> dict[int, Completion]:
    for request in requests:
        engine.add(request)
    done: dict[int, Completion] = {}
    for _ in range(10_000):
        if not engine.num_open:
            return done
        done |= {completion.id: completion for completion in engine.step()}
    raise AssertionError("the engine does not come to an end")


def random_prompts(count: int, seed: int = 1) -> list[np.ndarray]:
    """Half of them begin alike, so that pages are shared."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(2, VOCAB, 13)
    prompts = []
    for i in range(count):
        own = rng.integers(2, VOCAB, rng.integers(1, 40))
        prompts.append(np.concatenate([shared, own] if i % 2 else [own]).astype(np.int32))
    return prompts
