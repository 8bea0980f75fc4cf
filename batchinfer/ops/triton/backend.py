"""Launches the Triton kernels for tensors that ``ops/device.py`` has checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from batchinfer.ops import AttentionInput, Experts, HeadNorm, Rope, SampleInput, SampleOutput
from batchinfer.ops.accelerator import Accelerator
from batchinfer.ops.device import DeviceOps, fitting_split, parts
from batchinfer.ops.fields import SAMPLE_FIELDS
from batchinfer.ops.grouped import GroupQuantized
from batchinfer.ops.quantized import FLOAT8
from batchinfer.ops.triton import attention, logprobs, norms, penalties, rope, rows, sample
from batchinfer.ops.triton.blocks import (
    attention_blocks,
    head_block,
    heads_together,
    norm_warps,
    power_of_2,
    row_block,
)
from batchinfer.ops.triton.grouped import Groups, PackedGroups, multiplies_float8, pack
from batchinfer.ops.triton.mixture import Mixture

SPLIT = 1024
"""Keys of a part of a decoding sequence, as in the compiled backend (``ops/gpu.py`` has the arithmetic)."""

PROGRAMS = 8
"""Programs for each multiprocessor, of kernels that stride through a list: more than are resident, so that the device
evens out items of different lengths."""

LEAST_SHARED = 64 << 10
"""Bytes of shared memory of a program on AMD's GPUs, and where torch does not say."""

SAMPLE_BLOCK = 1024
"""Logits that a sampler's program takes at a time: 4 for each thread of 8 warps, times 16 digits of a search."""


@dataclass(frozen=True)
class Plan:
    """See ``batchinfer.ops.device.Plan``. ``ends``: running sums of items, of decoding and of other sequences."""

    inputs: AttentionInput
    num_heads: int
    cache_shape: tuple[int, ...]
    window: int
    split: int
    ends: tuple[Tensor, Tensor]
    partials: tuple[Tensor, Tensor]


class TritonOps(DeviceOps):
    """The ops on ``device``, on torch's current stream. Raises ValueError on shapes and dtypes.

    ``device`` "cpu" is for the interpreter (TRITON_INTERPRET=1), "meta" for :mod:`batchinfer.ops.triton.compiling`.
    """

    beside_float8 = (torch.bfloat16, torch.float16)

    def __init__(self, device: str = "cuda"):
        super().__init__(torch.device(device))
        self._multiprocessors, self._rdna, shared = 1, False, LEAST_SHARED
        if self.device.type not in ("cpu", "meta"):
            module = torch.get_device_module(self.device)
            self.device = torch.device(self.device.type, self.device.index or 0)
            Accelerator(self.device).use()
            properties = module.get_device_properties(self.device)
            self._multiprocessors = getattr(properties, "multi_processor_count", 0) or properties.max_compute_units
            self._rdna = getattr(properties, "gcnArchName", "").startswith("gfx1")
            shared = getattr(properties, "shared_memory_per_block_optin", shared)
        self._partials: dict[tuple[int, ...], tuple[int, tuple[Tensor, Tensor]]] = {}
        self._ends: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._counts: dict[int, Tensor] = {}
        self._mixture = Mixture(shared, self._rdna)
        self._groups = Groups(self._multiprocessors, self._rdna, multiplies_float8(self.device))

    def _launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Products may fuse with sums where ``options`` don't say otherwise: Triton's own default changes in 3.10."""
        if 0 not in grid:
            self._run(kernel, grid, args, {"enable_fp_fusion": True} | options)

    def _run(self, kernel: Any, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> None:
        kernel[grid](*args, **options)

    def _pack_groups(self, weight: GroupQuantized) -> PackedGroups:
        return pack(weight, self.device)

    def _group_linear(self, x: Tensor, weight: PackedGroups, out: Tensor, bias: Tensor | None) -> None:
        self._groups.linear(self._launch, self._dense_linear, x, weight, out, bias)

    def _lookup(self, ids: Tensor, table: Tensor, out: Tensor, scale: float) -> None:
        count, width = out.shape
        block = row_block(width)
        self._launch(rows.lookup, (count, cdiv(width, block)), ids, table, out, scale, len(table), width, BLOCK=block)

    def _rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None) -> None:
        self._launch(norms.rms_norm, (len(x),), x, weight, residual, out, x.shape[1], eps, **_row_options(x))

    def _layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor, residual: Tensor | None
    ) -> None:
        self._launch(norms.layer_norm, (len(x),), x, weight, bias, residual, out, x.shape[1], eps, **_row_options(x))

    def _silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        self._gate_mul(gate_up, out, gelu=False)

    def _gelu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        self._gate_mul(gate_up, out, gelu=True)

    def _gate_mul(self, gate_up: Tensor, out: Tensor, gelu: bool) -> None:
        count, width = out.shape
        block = row_block(width)
        self._launch(rows.gate_mul, (count, cdiv(width, block)), gate_up, out, width, GELU=gelu, BLOCK=block)

    def _mix_experts(self, x: Tensor, router: Tensor, experts: Experts, shared: Tensor | None, out: Tensor) -> None:
        self._mixture.mix(self._launch, x, router, experts, shared, out)

    def _rope_and_cache(
        self,
        qkv: Tensor,
        positions: Tensor,
        kv_index: Tensor,
        turn: Rope | None,
        k_cache: Tensor,
        v_cache: Tensor,
        q_out: Tensor,
        norm: HeadNorm | None,
    ) -> None:
        tokens, heads, width = q_out.shape
        pages, kv_heads, page_size, _ = k_cache.shape
        together = heads_together(width)
        self._launch(
            rope.rope_and_cache,
            (tokens, cdiv(heads + 2 * kv_heads, together)),
            qkv,
            positions,
            kv_index,
            None if turn is None else turn.cos_sin,
            None if norm is None else norm.q,
            None if norm is None else norm.k,
            _bytes(k_cache),
            _bytes(v_cache),
            q_out,
            0 if turn is None else len(turn.cos_sin),
            pages * page_size,
            0.0 if norm is None else norm.eps,
            HEADS=heads,
            KV_HEADS=kv_heads,
            WIDTH=width,
            ROTARY=0 if turn is None else turn.cos_sin.shape[1],
            PAGE=page_size,
            WHOLE=norm is not None and norm.q.numel() != width,
            BLOCK_HEADS=together,
            BLOCK=power_of_2(width),
            num_warps=4,
        )

    def _copy_pages(
        self, k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor, pages: int, page_bytes: int
    ) -> None:
        caches = (cache.view(-1).view(torch.int32) for cache in (k_cache, v_cache))
        words = page_bytes // 4
        grid = (len(source), cdiv(words, block := row_block(words)))
        self._launch(rows.copy_pages, grid, *caches, source, target, pages, words, BLOCK=block)

    def _plan_attention(self, inputs: AttentionInput, num_heads: int, k_cache: Tensor, window: int) -> Plan:
        _, kv_heads, page_size, width = k_cache.shape
        slots, slot_pages = inputs.page_table.shape
        capacity = slot_pages * page_size
        window = window or 2**31 - 1
        key = (slots, capacity, num_heads, width)
        if key not in self._partials:
            split = fitting_split(SPLIT, slots, capacity, num_heads, width)
            most = slots * num_heads * parts(capacity, split)
            self._partials[key] = split, (self._empty(torch.float32, most, width), self._empty(torch.float32, most))
        split, partials = self._partials[key]
        if (*key, window) not in self._ends:  # layers with and without a window alternate
            self._ends[(*key, window)] = self._empty(torch.int32, slots), self._empty(torch.int32, slots)
        ends = self._ends[(*key, window)]
        itemsize = max(k_cache.element_size(), torch.bfloat16.itemsize)  # of activations, which codes are widened to
        self._launch(
            attention.plan,
            (1,) if len(inputs.kv_len) else (0,),
            inputs.q_start,
            inputs.kv_len,
            *ends,
            len(inputs.kv_len),
            capacity,
            window,
            GROUP=num_heads // kv_heads,
            SPLIT=split,
            DECODE_ROWS=attention_blocks(True, width, itemsize, self._rdna).rows,
            PREFILL_ROWS=attention_blocks(False, width, itemsize, self._rdna).rows,
        )
        return Plan(inputs, num_heads, tuple(k_cache.shape), window, split, ends, partials)

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
        tokens, heads, width = q.shape
        pages, kv_heads, page_size, _ = k_cache.shape
        inputs = plan.inputs
        sequences = len(inputs.kv_len)
        slots, slot_pages = inputs.page_table.shape
        most_parts = parts(slot_pages * page_size, plan.split)
        for decode in (True,) if inputs.decode_only else (False, True):
            blocks = attention_blocks(decode, width, q.element_size(), self._rdna)
            tiles = cdiv(heads // kv_heads * (1 if decode else tokens), blocks.rows)
            most_items = kv_heads * (sequences * tiles * most_parts if decode else tiles + sequences)
            self._launch(
                attention.attend,
                (min(most_items, PROGRAMS * self._multiprocessors),),
                q,
                _bytes(k_cache),
                _bytes(v_cache),
                out,
                lse,
                *(plan.partials if decode else (None, None)),
                inputs.q_start,
                inputs.kv_len,
                inputs.slot,
                inputs.page_table,
                plan.ends[0 if decode else 1],
                sequences,
                tokens,
                slots,
                slot_pages,
                pages,
                most_parts,
                scale,
                softcap,
                plan.window,
                HEADS=heads,
                KV_HEADS=kv_heads,
                WIDTH=width,
                PAGE=page_size,
                SPLIT=plan.split if decode else 0,
                CAPPED=softcap > 0,
                ROWS=blocks.rows,
                KEYS=blocks.keys,
                BLOCK=head_block(width),
                num_warps=blocks.warps,
                num_stages=blocks.stages,
            )
        self._launch(
            attention.merge,
            (sequences, heads),
            *plan.partials,
            out,
            lse,
            inputs.q_start,
            inputs.kv_len,
            tokens,
            slot_pages * page_size,
            most_parts,
            plan.window,
            HEADS=heads,
            WIDTH=width,
            SPLIT=plan.split,
            BLOCK=power_of_2(width),
            num_warps=1,
        )

    def _sample(
        self, logits: Tensor, inputs: SampleInput, raw: Tensor, num_logprobs: Tensor | None, out: SampleOutput
    ) -> None:
        count, vocab = logits.shape
        exact = {"BLOCK": SAMPLE_BLOCK, "num_warps": 8, "enable_fp_fusion": False}
        if inputs.penalties is not None:
            history = (inputs.history_ids, inputs.history_start, inputs.history_prompt)
            counts = self._zero_counts(vocab)
            sizes = (inputs.history_ids.numel(), count, vocab)
            grid = (min(count, len(counts)),)
            self._launch(penalties.penalise, grid, logits, *inputs.penalties, *history, counts, *sizes, **exact)
        if inputs.banned_ids is not None:
            banned = (inputs.banned_ids, inputs.banned_start, inputs.banned_ids.numel())
            self._launch(penalties.ban, (count,), logits, *banned, vocab, BLOCK=128, num_warps=1)
        fields = (getattr(inputs, name) for name in SAMPLE_FIELDS)
        self._launch(sample.choose, (count,), logits, *fields, out.tokens, vocab, COUNTERS=SAMPLE_BLOCK // 4, **exact)
        if num_logprobs is not None:
            results = (out.chosen, out.top_ids, out.top)
            sizes = (vocab, out.top.shape[1])
            constants = {"BLOCK": SAMPLE_BLOCK, "num_warps": 8}
            self._launch(logprobs.logprobs, (count,), raw, out.tokens, num_logprobs, *results, *sizes, **constants)

    def _zero_counts(self, vocab: int) -> Tensor:
        """A row of zeros for each program that counts; they are zero again after use."""
        if vocab not in self._counts:
            self._counts[vocab] = self.zeros((self._multiprocessors, vocab), torch.int32)
        return self._counts[vocab]


def _bytes(cache: Tensor) -> Tensor:
    """As the kernels take it: codes of float8 as uint8."""
    return cache.view(torch.uint8) if cache.dtype is FLOAT8 else cache


def _row_options(x: Tensor) -> dict[str, int]:
    width = x.shape[1]
    if width > norms.WIDEST:
        raise ValueError(f"x has rows of {width} elements: at most {norms.WIDEST} are possible")
    return {"BLOCK": power_of_2(width), "num_warps": norm_warps(width)}
