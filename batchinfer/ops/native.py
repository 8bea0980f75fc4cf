"""The compiled backend: checks tensors, then hands addresses and sizes to ``batchinfer._ops``.

A check costs well under a microsecond; an op is called a few hundred times per step. What a check cannot see without
reading the data (token ids, positions, cache indices) is checked by the extension. Both raise ValueError.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from batchinfer.ops import Activation, AttentionInput, Experts, HeadNorm, Lack, Rope, SampleInput, SampleOutput
from batchinfer.ops.experts import mix_by_expert
from batchinfer.ops.fields import SAMPLE_FIELDS
from batchinfer.ops.native_checks import DTYPES, address, check, check_caches, check_segments, shape_of
from batchinfer.ops.native_linear import NativeLinear
from batchinfer.ops.quantized import kv_row
from batchinfer.ops.sinks import share_of_keys
from batchinfer.ops.texts import TextAttention

if TYPE_CHECKING:
    from batchinfer._ops import AttentionPlan, Program

ACTIVATIONS: dict[Activation, int] = {"gelu": 0, "gelu_tanh": 1, "relu": 2}
"""With their number there."""


class NativeOps(NativeLinear, TextAttention):
    """All ops of :class:`batchinfer.ops.Ops` on ``device`` "cpu".

    ``threads`` 0 uses the CPUs of this process's affinity mask. ``isa`` names an instruction set ("avx512bf16",
    "neon"); "" is $BATCHINFER_ISA, or the best one. Calls must not overlap in time: one thread pool
    works on one op. Raises RuntimeError where the extension lacks the device, ValueError for an unusable ``isa``.
    """

    lacks: frozenset[Lack] = frozenset({"groups of codes", "float16"})

    def __init__(self, device: str = "cpu", threads: int = 0, isa: str = ""):
        extension = _extension(device)
        self._cpu, self._program = extension.Cpu(threads, isa), extension.Program
        self.device = torch.device("cpu")
        self.isa: str = self._cpu.isa
        self.bf16_dot: bool = self._cpu.bf16_dot
        self.threads: int = self._cpu.threads

    def activations(self, weights: torch.dtype) -> torch.dtype:
        return torch.float32

    def linear_inputs(self, weights: torch.dtype) -> torch.dtype:
        """Where the dot product would round its inputs to bfloat16, what writes them does: half the memory traffic, and
        the same bits."""
        return weights if self.bf16_dot else torch.float32

    @contextmanager
    def recording(self) -> Iterator[Program]:
        """The ops that are called meanwhile, other than ``sample``, are computed and go into the program: with the
        addresses and shapes of their tensors, weights and plans, which must live as long as it."""
        program = self._program()
        self._cpu.record(program)
        try:
            yield program
        finally:
            self._cpu.record(None)

    def replay(self, program: Program) -> None:
        """The program's ops again, in order, on what their tensors hold now. Raises ValueError as they do."""
        self._cpu.replay(program)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """numpy's zeros are the kernel's: a page takes memory when it is first written, where torch would write all of
        them now (8 GiB take seconds, and a small job uses a hundredth)."""
        return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)

    def plan_attention(
        self,
        inputs: AttentionInput,
        num_heads: int,
        k_cache: Tensor,
        window: int = 0,
        again: AttentionPlan | None = None,
    ) -> AttentionPlan:
        """``again``: a plan that becomes this one, and is given back."""
        pages, kv_heads, page_size, row = shape_of("k_cache", k_cache, 4)
        width = row - kv_row(0, k_cache.dtype)
        slots, slot_pages = shape_of("page_table", inputs.page_table, 2)
        (sequences,) = shape_of("kv_len", inputs.kv_len, 1)
        check("q_start", inputs.q_start, torch.int32, (sequences + 1,))
        check("kv_len", inputs.kv_len, torch.int32, (sequences,))
        check("slot", inputs.slot, torch.int32, (sequences,))
        check("page_table", inputs.page_table, torch.int32, (slots, slot_pages))
        if num_heads < 1 or kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_heads={num_heads} must be a positive multiple of the cache's heads, {kv_heads}")
        if page_size < 1 or width < 8 or width % 8 or width > 256:
            raise ValueError(
                f"k_cache has shape {tuple(k_cache.shape)}: pages must hold at least one token, and the head width "
                "must be a multiple of 8 up to 256"
            )
        if window < 0:
            raise ValueError(f"window={window} must be 0 (all positions) or a number of positions")
        made = self._cpu.plan_attention(
            again,
            inputs.q_start.data_ptr(),
            inputs.kv_len.data_ptr(),
            inputs.slot.data_ptr(),
            inputs.page_table.data_ptr(),
            sequences,
            slots,
            slot_pages,
            num_heads,
            kv_heads,
            width,
            pages,
            page_size,
            window,
        )
        return made or again

    def attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: AttentionPlan,
        scale: float,
        out: Tensor,
        lse: Tensor,
        softcap: float = 0.0,
    ) -> None:
        check("q", q, torch.float32, plan.query_shape)
        cache_dtype = check_caches(k_cache, v_cache, plan.cache_shape)
        check("out", out, None, plan.query_shape)
        check("lse", lse, torch.float32, plan.query_shape[:2])
        self._cpu.attention(
            plan,
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            cache_dtype,
            scale,
            softcap,
            out.data_ptr(),
            DTYPES[out.dtype],
            lse.data_ptr(),
        )

    def sink(self, attn: Tensor, lse: Tensor, sinks: Tensor) -> None:
        tokens, heads, _ = shape_of("attn", attn, 3)
        check("attn", attn, torch.float32, attn.shape)
        check("lse", lse, torch.float32, (tokens, heads))
        check("sinks", sinks, torch.float32, (heads,))
        attn.numpy()[...] *= share_of_keys(lse, sinks).unsqueeze(-1).numpy()

    def copy(self, x: Tensor, out: Tensor) -> None:
        """By numpy: torch would let its own threads work, which then spin on the cores that this backend's want."""
        if x.dtype is not out.dtype:
            raise ValueError(f"out has dtype {out.dtype}: {x.dtype} is needed")
        if x.dtype is torch.bfloat16:  # numpy has none
            x, out = x.view(torch.int16), out.view(torch.int16)
        np.copyto(out.numpy(), x.numpy())

    def embed(self, ids: Tensor, table: Tensor, out: Tensor, scale: float = 1.0) -> None:
        tokens, width = shape_of("out", out, 2)
        vocab = shape_of("table", table, 2)[0]
        check("ids", ids, torch.int32, (tokens,))
        check("table", table, None, (vocab, width))
        check("out", out, torch.float32, (tokens, width))
        self._cpu.embed(
            ids.data_ptr(), table.data_ptr(), DTYPES[table.dtype], out.data_ptr(), tokens, width, vocab, scale
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None) -> None:
        tokens, width = shape_of("x", x, 2)
        check("x", x, torch.float32, (tokens, width))
        check("weight", weight, torch.float32, (width,))
        check("out", out, None, (tokens, width))
        if residual is not None:
            check("residual", residual, torch.float32, (tokens, width))
        self._cpu.rms_norm(
            x.data_ptr(),
            weight.data_ptr(),
            address(residual),
            out.data_ptr(),
            DTYPES[out.dtype],
            tokens,
            width,
            eps,
        )

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        out: Tensor,
        residual: Tensor | None = None,
    ) -> None:
        tokens, width = shape_of("x", x, 2)
        check("x", x, torch.float32, (tokens, width))
        check("weight", weight, torch.float32, (width,))
        check("out", out, None, (tokens, width))
        if bias is not None:
            check("bias", bias, torch.float32, (width,))
        if residual is not None:
            check("residual", residual, torch.float32, (tokens, width))
        self._cpu.layer_norm(
            x.data_ptr(),
            weight.data_ptr(),
            address(bias),
            address(residual),
            out.data_ptr(),
            DTYPES[out.dtype],
            tokens,
            width,
            eps,
        )

    def add(self, x: Tensor, residual: Tensor) -> None:
        tokens, width = shape_of("x", x, 2)
        check("x", x, torch.float32, (tokens, width))
        check("residual", residual, torch.float32, (tokens, width))
        self._cpu.add(x.data_ptr(), residual.data_ptr(), tokens, width)

    def softcap(self, x: Tensor, softcap: float) -> None:
        rows, width = shape_of("x", x, 2)
        check("x", x, torch.float32, (rows, width))
        if softcap <= 0:
            raise ValueError(f"softcap={softcap} must be above 0")
        self._cpu.softcap(x.data_ptr(), rows, width, softcap)

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
        tokens, heads, width = shape_of("q_out", q_out, 3)
        pages, kv_heads, page_size, _ = shape_of("k_cache", k_cache, 4)
        check("q_out", q_out, torch.float32, (tokens, heads, width))
        check("qkv", qkv, torch.float32, (tokens, (heads + 2 * kv_heads) * width))
        check("positions", positions, torch.int32, (tokens,))
        check("kv_index", kv_index, torch.int64, (tokens,))
        cache_dtype = check_caches(k_cache, v_cache, (pages, kv_heads, page_size, width))
        cos_sin, max_positions, rotary = None, 0, 0
        if rope is not None:
            cos_sin = rope.cos_sin
            max_positions, rotary = shape_of("rope.cos_sin", cos_sin, 2)
            check("rope.cos_sin", cos_sin, torch.float32, (max_positions, rotary))
            if rotary > width or rotary % 2:
                raise ValueError(
                    f"rope.cos_sin has width {rotary}: it must be even and at most the head width, {width}"
                )
        q_norm, k_norm, norm_all = None, None, False
        if norm is not None:
            q_norm, k_norm = norm.q, norm.k
            norm_all = heads > 1 and q_norm.shape == (heads * width,)
            check("norm.q", q_norm, torch.float32, (heads * width if norm_all else width,))
            check("norm.k", k_norm, torch.float32, (kv_heads * width if norm_all else width,))
        self._cpu.rope_and_cache(
            qkv.data_ptr(),
            positions.data_ptr(),
            kv_index.data_ptr(),
            address(cos_sin),
            address(q_norm),
            address(k_norm),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            cache_dtype,
            q_out.data_ptr(),
            tokens,
            heads,
            kv_heads,
            width,
            max_positions,
            rotary,
            pages,
            page_size,
            0.0 if norm is None else norm.eps,
            norm_all,
        )

    def copy_pages(self, k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
        pages = shape_of("k_cache", k_cache, 4)[0]
        (copies,) = shape_of("source", source, 1)
        check("k_cache", k_cache, k_cache.dtype, tuple(k_cache.shape))
        check("v_cache", v_cache, k_cache.dtype, tuple(k_cache.shape))
        check("source", source, torch.int32, (copies,))
        check("target", target, torch.int32, (copies,))
        self._cpu.copy_pages(
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            source.data_ptr(),
            target.data_ptr(),
            copies,
            pages,
            k_cache[0].nbytes if pages else 0,
        )

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        tokens, width = shape_of("out", out, 2)
        check("gate_up", gate_up, torch.float32, (tokens, 2 * width))
        check("out", out, None, (tokens, width))
        self._cpu.silu_mul(gate_up.data_ptr(), out.data_ptr(), DTYPES[out.dtype], tokens, width)

    def gelu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        tokens, width = shape_of("out", out, 2)
        check("gate_up", gate_up, torch.float32, (tokens, 2 * width))
        check("out", out, None, (tokens, width))
        self._cpu.gelu_mul(gate_up.data_ptr(), out.data_ptr(), DTYPES[out.dtype], tokens, width)

    def activate(self, kind: Activation, x: Tensor, out: Tensor) -> None:
        tokens, width = shape_of("x", x, 2)
        check("x", x, torch.float32, (tokens, width))
        check("out", out, None, (tokens, width))
        if kind not in ACTIVATIONS:
            raise ValueError(f"kind={kind!r} must be one of {', '.join(ACTIVATIONS)}")
        self._cpu.activate(ACTIVATIONS[kind], x.data_ptr(), out.data_ptr(), DTYPES[out.dtype], tokens, width)

    def mix_experts(self, x: Tensor, router: Tensor, experts: Experts, out: Tensor) -> None:
        tokens, width = shape_of("x", x, 2)
        check("x", x, torch.float32, (tokens, width))
        check("router", router, torch.float32, (tokens, experts.logits))
        check("out", out, torch.float32, (tokens, width))
        mix_by_expert(self, x, router, experts, out)

    def gather_rows(self, x: Tensor, index: Tensor, out: Tensor) -> None:
        x_rows, width = shape_of("x", x, 2)
        (rows,) = shape_of("index", index, 1)
        check("x", x, None, (x_rows, width))
        check("index", index, torch.int32, (rows,))
        check("out", out, x.dtype, (rows, width))
        self._cpu.gather_rows(x.data_ptr(), index.data_ptr(), out.data_ptr(), DTYPES[x.dtype], x_rows, rows, width)

    def sample(self, logits: Tensor, inputs: SampleInput) -> SampleOutput:
        rows, vocab = shape_of("logits", logits, 2)
        check("logits", logits, torch.float32, (rows, vocab))
        if rows and not 0 < vocab <= 2**19:
            raise ValueError(f"logits has {vocab} columns: the sampler takes vocabularies of 1 to {2**19}")
        for name, dtype in SAMPLE_FIELDS.items():
            check(name, getattr(inputs, name), dtype, (rows,))
        penalties, history, history_size = (0, 0, 0), (0, 0, 0), 0
        if inputs.penalties is not None:
            for name, t in zip(("repetition", "presence", "frequency"), inputs.penalties, strict=True):
                check(name, t, torch.float32, (rows,))
            history_size = check_segments("history", inputs.history_ids, inputs.history_start, rows)
            check("history_prompt", inputs.history_prompt, torch.int32, (rows,))
            penalties = tuple(t.data_ptr() for t in inputs.penalties)
            history = (
                inputs.history_ids.data_ptr(),
                inputs.history_start.data_ptr(),
                inputs.history_prompt.data_ptr(),
            )
        bias, bias_size = (0, 0, 0), 0
        if inputs.bias_ids is not None:
            bias_size = check_segments("bias", inputs.bias_ids, inputs.bias_start, rows)
            check("bias_values", inputs.bias_values, torch.float32, (bias_size,))
            bias = tuple(t.data_ptr() for t in (inputs.bias_ids, inputs.bias_start, inputs.bias_values))
        banned, banned_size = (0, 0), 0
        if inputs.banned_ids is not None:
            banned_size = check_segments("banned", inputs.banned_ids, inputs.banned_start, rows)
            banned = (inputs.banned_ids.data_ptr(), inputs.banned_start.data_ptr())
        if inputs.allowed is not None:
            check("allowed", inputs.allowed, torch.int32, (rows, -(-vocab // 32)))

        out = SampleOutput(torch.empty(rows, dtype=torch.int32))
        top_width = 0
        if inputs.num_logprobs is not None:
            check("num_logprobs", inputs.num_logprobs, torch.int32, (rows,))
            top_width = max(0, int(inputs.num_logprobs.max())) if rows else 0
            out = SampleOutput(
                out.tokens,
                torch.empty(rows, dtype=torch.float32),
                torch.empty(rows, top_width, dtype=torch.int32),
                torch.empty(rows, top_width, dtype=torch.float32),
            )
        self._cpu.sample(
            logits.data_ptr(),
            rows,
            vocab,
            *(getattr(inputs, name).data_ptr() for name in SAMPLE_FIELDS),
            *penalties,
            *history,
            history_size,
            *bias,
            bias_size,
            *banned,
            banned_size,
            address(inputs.allowed),
            out.tokens.data_ptr(),
            address(inputs.num_logprobs),
            address(out.chosen),
            address(out.top_ids),
            address(out.top),
            top_width,
        )
        return out


def _extension(device: str) -> ModuleType:
    try:
        module = importlib.import_module("batchinfer._ops")
        compiled = ", ".join(module.compiled_for)
    except ImportError as e:
        module, compiled = None, f"nothing ({e})"
    if module is None or device not in module.compiled_for:
        raise RuntimeError(
            f"batchinfer is not compiled for {device}; it is compiled for: {compiled}. "
            f"Rebuild with: BATCHINFER_DEVICE={device} pip install ."
        )
    return module
