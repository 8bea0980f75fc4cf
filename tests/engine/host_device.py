"""The GPU's runner without a GPU: its streams and events are the host's clock, a graph is the function that it was
captured from, and the ops are the reference's, taught to leave out the rows that fill a step up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gpu.backend import HostAccelerator
from torch import Tensor

from batchinfer.engine.device_runner import DeviceRunner
from batchinfer.models.decoder import Decoder
from batchinfer.ops import AttentionInput, HeadNorm, Rope
from batchinfer.ops.reference import ReferenceOps


class FilledOps(ReferenceOps):
    """Tokens with kv_index -1 have no place in the cache, page -1 is copied nowhere, sequences without tokens attend to
    nothing, and those that have ended to their first position. ``ended``: how many of these there were."""

    ended = 0

    def copy_pages(self, k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
        kept = source >= 0
        super().copy_pages(k_cache, v_cache, source[kept], target[kept])

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
        used, ended = inputs.kv_len != 0, inputs.kv_len < 0
        self.ended += int(ended.sum())
        starts = torch.cat([inputs.q_start[:-1][used], inputs.q_start[-1:]])
        kv_len = torch.where(ended, 1, inputs.kv_len)[used]
        inputs = replace(inputs, q_start=starts, kv_len=kv_len, slot=inputs.slot[used])
        assert not inputs.decode_only or (starts.diff() == 1).all()
        return super().plan_attention(inputs, num_heads, k_cache, window)


class Again:
    """What it was captured from is run into the same tensor."""

    def __init__(self, compute: Callable[[], Tensor]):
        self.compute, self.tokens, self.replays = compute, compute(), 0

    def replay(self) -> None:
        self.replays += 1
        tokens = self.compute()
        assert tokens.shape == self.tokens.shape
        self.tokens.copy_(tokens)


class CapturingAccelerator(HostAccelerator):
    """One that has graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs = True

    def graph_pool(self) -> None:
        return None

    def capture(self, compute: Callable[[], Tensor], pool: object) -> tuple[Again, Tensor]:
        again = Again(compute)
        return again, again.tokens


def host_runner(decoder: Decoder, page_size: int, max_slots: int) -> DeviceRunner:
    return DeviceRunner(decoder, page_size, max_slots, CapturingAccelerator())
