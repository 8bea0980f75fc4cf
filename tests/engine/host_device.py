"""The GPU's runner without a GPU: its streams and events are the host's clock, a graph is the function that it was
captured from, and the ops are the reference's, taught to leave out the rows that fill a step up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from batchinfer.engine import device_runner
from batchinfer.ops import AttentionInput, HeadNorm, Rope
from batchinfer.ops.reference import ReferenceOps


class FilledOps(ReferenceOps):
    """Tokens with kv_index -1 have no place in the cache, and sequences without tokens attend to nothing."""

    def rope_and_cache(
        self,
        qkv: Tensor,
        positions: Tensor,
        kv_index: Tensor,
        rope: Rope | None,
        k_cache: Tensor,
        v_cache: Tensor,
        q_out: Tensor,
        norm: HeadNorm | None = None,
    ) -> None:
        kept = kv_index >= 0
        q = q_out[kept]
        super().rope_and_cache(qkv[kept], positions[kept], kv_index[kept], rope, k_cache, v_cache, q, norm)
        q_out[kept] = q

    def plan_attention(self, inputs: AttentionInput, num_heads: int, k_cache: Tensor, window: int = 0) -> Any:
        used = inputs.kv_len > 0
        starts = torch.cat([inputs.q_start[:-1][used], inputs.q_start[-1:]])
        inputs = replace(inputs, q_start=starts, kv_len=inputs.kv_len[used], slot=inputs.slot[used])
        assert not inputs.decode_only or (starts.diff() == 1).all()
        return super().plan_attention(inputs, num_heads, k_cache, window)


class Event:
    def __init__(self, enable_timing: bool = False):
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        assert self.time

    def elapsed_time(self, later: Event) -> float:
        return 1000 * (later.time - self.time)


class Again:
    """What it was captured from is run into the same tensor."""

    def __init__(self, compute: Callable[[], Tensor]):
        self.compute, self.tokens, self.replays = compute, compute(), 0

    def replay(self) -> None:
        self.replays += 1
        tokens = self.compute()
        assert tokens.shape == self.tokens.shape
        self.tokens.copy_(tokens)


def capture(compute: Callable[[], Tensor], pool: object) -> device_runner.Captured:
    again = Again(compute)
    return device_runner.Captured(again, again.tokens)  # type: ignore[arg-type]


@pytest.fixture
def host_device(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def stream(_: object) -> Iterator[None]:
        yield

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    monkeypatch.setattr(device_runner, "capture", capture)
    for name, there in {
        "Stream": lambda device: None,
        "Event": Event,
        "stream": stream,
        "graph_pool_handle": lambda: None,
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, there)
