"""The compiled GPU backend: hands addresses, sizes and the current stream to ``batchinfer._gpu``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batchinfer.ops import AttentionInput, Experts, HeadNorm, Lack, Rope, SampleInput, SampleOutput
from batchinfer.ops.accelerator import Accelerator
from batchinfer.ops.device import DeviceOps, fitting_split, parts
from batchinfer.ops.fields import SAMPLE_FIELDS
from batchinfer.ops.grouped import GroupQuantized
from batchinfer.ops.quantized import FLOAT8

if TYPE_CHECKING:
    from batchinfer._gpu import AttentionPlan
    from batchinfer.ops.triton.backend import TritonOps
    from batchinfer.ops.triton.grouped import PackedGroups

NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, FLOAT8: 3}
"""Of the dtypes, in csrc/gpu/ops.h."""

VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}
"""What may hide devices, by torch's name of their kind."""

DECODE_ROWS = 16
"""Query heads of one kv head that a decode work item takes (csrc/gpu/attention.cuh)."""

DECODE_PART = 8
"""Numbers of a DecodePart (csrc/gpu/ops.h)."""

SPLIT = 1024
"""KV positions of a decode work item. 256 sequences of 1,000 tokens and 8 kv heads make 2,048 items, eight times what
an H100 works on at once; partial results are 1 % of the bytes moved (width 128, 4 query heads a kv head)."""


BY_TRITON: frozenset[Lack] = frozenset({"mix_experts", "norm of all heads", "groups of codes"})
"""What the extension has no kernels for, and Triton's serve."""


@dataclass(frozen=True)
class Plan:
    """See ``batchinfer.ops.device.Plan``."""

    handle: AttentionPlan
    num_heads: int
    cache_shape: tuple[int, ...]
    tensors: tuple[Tensor, ...]  # kept alive: the handle holds addresses


class GpuOps(DeviceOps):
    """The ops on ``device``, on torch's current stream, by ``extension``: see :func:`open_gpu`. Raises ValueError on
    shapes and dtypes."""

    def __init__(self, device: torch.device, extension: ModuleType):
        super().__init__(device)
        self.lacks = DeviceOps.lacks | (frozenset() if find_spec("triton") else BY_TRITON)
        self._gpu = extension
        self._accelerator = Accelerator(device)
        self._workspaces: dict[tuple, tuple[int, tuple[Tensor, ...]]] = {}
        self._lists: dict[tuple[tuple, int], tuple[Tensor, ...]] = {}

    @cached_property
    def _triton(self) -> TritonOps:
        from batchinfer.ops.triton.backend import TritonOps

        return TritonOps(str(self.device))

    def _mix_experts(self, x: Tensor, router: Tensor, experts: Experts, shared: Tensor | None, out: Tensor) -> None:
        self._triton._mix_experts(x, router, experts, shared, out)

    def _pack_groups(self, weight: GroupQuantized) -> PackedGroups:
        return self._triton._pack_groups(weight)

    def _group_linear(self, x: Tensor, weight: PackedGroups, out: Tensor, bias: Tensor | None) -> None:
        self._triton._group_linear(x, weight, out, bias)

    def _lookup(self, ids: Tensor, table: Tensor, out: Tensor, scale: float) -> None:
        rows, width = out.shape
        self._gpu.lookup(
            ids.data_ptr(),
            table.data_ptr(),
            out.data_ptr(),
            NUMBERS[out.dtype],
            rows,
            width,
            len(table),
            scale,
            self._stream(),
        )

    def _rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None) -> None:
        tokens, width = x.shape
        self._gpu.rms_norm(
            x.data_ptr(),
            weight.data_ptr(),
            _address(residual),
            out.data_ptr(),
            NUMBERS[x.dtype],
            tokens,
            width,
            eps,
            self._stream(),
        )

    def _gated_linear(self, x: Tensor, weight: Tensor, out: Tensor) -> bool:
        addresses = (t.data_ptr() for t in (x, weight, out))
        return self._gpu.gated_linear(*addresses, NUMBERS[out.dtype], *out.shape, x.shape[1], self._stream())

    def _silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        self._gate(self._gpu.silu_mul, gate_up, out)

    def _gelu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        self._gate(self._gpu.gelu_mul, gate_up, out)

    def _gate(self, launch: Callable[..., None], gate_up: Tensor, out: Tensor) -> None:
        launch(gate_up.data_ptr(), out.data_ptr(), NUMBERS[out.dtype], *out.shape, self._stream())

    def _rope_and_cache(
        self,
        qkv: Tensor,
        positions: Tensor,
        kv_index: Tensor,
        rope: Rope | None,
        k_cache: Tensor,
        v_cache: Tensor,
        q_out: Tensor,
        norm: HeadNorm | None,
    ) -> None:
        tokens, heads, width = q_out.shape
        pages, kv_heads, page_size, _ = k_cache.shape
        rotary = 0 if rope is None else rope.cos_sin.shape[1]
        of_all_heads = norm is not None and norm.q.numel() != width
        if of_all_heads or rotary % 16:  # GPT-NeoX-20B rotates 24 elements
            self._triton.rope_and_cache(qkv, positions, kv_index, rope, k_cache, v_cache, q_out, norm)
            return
        table_positions = 0 if rope is None else len(rope.cos_sin)
        self._gpu.rope_and_cache(
            qkv.data_ptr(),
            positions.data_ptr(),
            kv_index.data_ptr(),
            0 if rope is None else rope.cos_sin.data_ptr(),
            0 if norm is None else norm.q.data_ptr(),
            0 if norm is None else norm.k.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            q_out.data_ptr(),
            NUMBERS[q_out.dtype],
            NUMBERS[k_cache.dtype],
            tokens,
            heads,
            kv_heads,
            width,
            table_positions,
            rotary,
            pages,
            page_size,
            0.0 if norm is None else norm.eps,
            self._stream(),
        )

    def _copy_pages(
        self, k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor, pages: int, page_bytes: int
    ) -> None:
        places = (t.data_ptr() for t in (k_cache, v_cache, source, target))
        self._gpu.copy_pages(*places, len(source), pages, page_bytes, self._stream())

    def _feed_back(self, ids: Tensor, kv_len: Tensor, slot: Tensor, last_token: Tensor, stop_ids: Tensor) -> None:
        addresses = (t.data_ptr() for t in (ids, kv_len, slot, last_token, stop_ids))
        self._gpu.feed_back(*addresses, len(ids), len(last_token), stop_ids.shape[1], self._stream())

    def _plan_attention(self, inputs: AttentionInput, num_heads: int, k_cache: Tensor, window: int) -> Plan:
        pages, kv_heads, page_size, width = k_cache.shape
        slots, slot_pages = inputs.page_table.shape
        key = (slots, slot_pages, num_heads, kv_heads, page_size, width)
        if key not in self._workspaces:
            self._workspaces[key] = self._workspace(slots, slot_pages * page_size, num_heads, kv_heads, width)
        split, workspace = self._workspaces[key]
        if (key, window) not in self._lists:
            sums = tuple(self._empty(torch.int32, slots + 1) for _ in range(4))
            sizes = slots * parts(slot_pages * page_size, split), slots
            listed = (self._empty(torch.int32, size, DECODE_PART) for size in sizes)
            self._lists[key, window] = *sums, *listed, self._empty(torch.int32, 2)
        workspace = self._lists[key, window] + workspace
        lists = (inputs.q_start, inputs.kv_len, inputs.slot, inputs.page_table)
        handle = self._gpu.AttentionPlan(
            *(t.data_ptr() for t in lists),
            len(inputs.kv_len),
            slots,
            slot_pages,
            num_heads,
            kv_heads,
            width,
            pages,
            page_size,
            split,
            inputs.decode_only,
            window,
            *(t.data_ptr() for t in workspace),
        )
        self._gpu.plan_attention(handle, self._stream())
        return Plan(handle, num_heads, tuple(k_cache.shape), lists + workspace)

    def _attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: Plan,
        scale: float,
        out: Tensor,
        lse: Tensor,
        softcap: float,
    ) -> None:
        self._gpu.attention(
            plan.handle,
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            NUMBERS[q.dtype],
            NUMBERS[k_cache.dtype],
            len(q),
            scale,
            softcap,
            self._stream(),
        )

    def _sample(
        self, logits: Tensor, inputs: SampleInput, raw: Tensor, num_logprobs: Tensor | None, out: SampleOutput
    ) -> None:
        penalties, history, banned = (0, 0, 0), (0, 0, 0, 0), (0, 0, 0)
        if inputs.penalties is not None:
            ids = inputs.history_ids
            penalties = tuple(t.data_ptr() for t in inputs.penalties)
            history = (*(t.data_ptr() for t in (ids, inputs.history_start, inputs.history_prompt)), ids.numel())
        if inputs.banned_ids is not None:
            ids = inputs.banned_ids
            banned = (ids.data_ptr(), inputs.banned_start.data_ptr(), ids.numel())
        self._gpu.sample(
            logits.data_ptr(),
            *logits.shape,
            *(getattr(inputs, name).data_ptr() for name in SAMPLE_FIELDS),
            *penalties,
            *history,
            *banned,
            out.tokens.data_ptr(),
            _address(num_logprobs),
            _address(out.chosen),
            _address(out.top_ids),
            _address(out.top),
            0 if out.top is None else out.top.shape[1],
            raw.data_ptr(),
            self._stream(),
        )

    def _workspace(
        self, slots: int, longest: int, heads: int, kv_heads: int, width: int
    ) -> tuple[int, tuple[Tensor, ...]]:
        """The split, and the plan's arrays from queues on. Both follow from the page table's shape alone."""
        split = fitting_split(SPLIT, slots, longest, heads, width)
        partial_rows = slots * heads * parts(longest, split)
        row_tiles = -(-heads // kv_heads // DECODE_ROWS)
        return split, (
            torch.zeros(4, dtype=torch.int32, device=self.device),
            torch.zeros(slots * kv_heads * row_tiles, dtype=torch.int32, device=self.device),
            self._empty(torch.float32, partial_rows, width),
            self._empty(torch.float32, partial_rows),
        )

    def _stream(self) -> int:
        return self._accelerator.queue()


def open_gpu(device: str = "cuda") -> GpuOps:
    """The ops on ``device`` (by torch's name: cuda, for AMD too, or xpu), which becomes torch's current one. Raises
    RuntimeError where the extension or the device is missing."""
    chosen = torch.device(device)
    extension = _extension(chosen.type)
    module = getattr(torch, chosen.type)
    if not module.is_available() or extension.device_count() == 0:
        raise RuntimeError(
            f"device {device}: no usable GPU (its driver, {VISIBLE[chosen.type]}, or a torch that is not built for it)"
        )
    if chosen.index is None:
        chosen = torch.device(chosen.type, module.current_device())
    Accelerator(chosen).use()
    return GpuOps(chosen, extension)


def _extension(device: str) -> ModuleType:
    try:
        return importlib.import_module("batchinfer._gpu")
    except ImportError as e:
        raise RuntimeError(
            f"batchinfer is not compiled for {device} ({e}). Rebuild with: BATCHINFER_DEVICE={device} pip install ."
        ) from e


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
