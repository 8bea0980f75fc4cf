"""Ranks of a node that share packed weights compute what each would with its own: adapters, token heads, encoders."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.tiny_engine import LetterTokenizer
from models.test_encoder import build
from models.test_lora import write_adapter
from models.tiny_models import TinyModel

from batchinfer.config import EngineConfig, ModelConfig
from batchinfer.engine.loading import load_engine
from batchinfer.feed import steps
from batchinfer.models.files import OwnReading
from batchinfer.types import PoolSpec, Request, SamplingParams


class Leader(OwnReading):
    """Reads and packs, and keeps the memory for a follower."""

    shares = True
    fd: int

    def give(self, fd: int) -> None:
        self.fd = fd


class Follower(OwnReading):
    """Reads nothing."""

    def __init__(self, leader: Leader):
        self._fd = leader.fd

    def take(self) -> int:
        return os.dup(self._fd)

    def stream(self, blocks: Sequence[Any], read: Callable[..., None]) -> Any:
        raise AssertionError("the leader has read the weights")


def vectors(model: ModelConfig, pool: PoolSpec, weights: str, source: OwnReading) -> np.ndarray:
    """float32 [6, width], every second one through the adapter, if there is one."""
    sizes = {"device": "cpu", "dtype": "fp32", "threads": 1, "page_size": 4, "num_pages": 60, "max_slots": 4}
    config = EngineConfig(**sizes, weights=weights)
    engine = load_engine(model, config, tokenizer=LetterTokenizer(), source=source, pool=pool)  # type: ignore[arg-type]
    rng, number = np.random.default_rng(3), 0 if model.adapters else None
    asked = [rng.integers(2, 60, 8).astype(np.int32) for _ in range(6)]
    requests = [Request(i, ids, SamplingParams(), adapter=number if i % 2 else None) for i, ids in enumerate(asked)]
    done = {completion.id: completion for step in steps(engine, requests) for completion in step}
    engine.close()
    assert engine.stats().weight_bytes > 0
    return np.stack([done[i].samples[0].vector for i in range(6)])


@pytest.mark.parametrize("weights", ["auto", "int8"])
@pytest.mark.parametrize("kind", ["adapter", "tokens", "encoder"])
def test_shared_weights_are_those_of_a_rank_of_its_own(
    kind: str, weights: str, tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    pool = PoolSpec("last", 2, "tokens", "softmax", tokens=(11, 40)) if kind == "tokens" else PoolSpec("mean", 48)
    if kind == "encoder":
        build("Bert", "Model", tmp_path)
        model = ModelConfig(path=str(tmp_path))
    else:
        folder = tiny("llama").folder
        modules, path = ("gate_proj", "up_proj", "q_proj"), tmp_path / "a"
        adapters = {"a": str(write_adapter(path, folder, modules, 0))} if kind == "adapter" else {}
        model = ModelConfig(path=str(folder), adapters=adapters)
    leader = Leader()
    expected = vectors(model, pool, weights, OwnReading())
    assert (vectors(model, pool, weights, leader) == expected).all()
    follower = Follower(leader)
    assert (vectors(model, pool, weights, follower) == expected).all()
    os.close(leader.fd)
