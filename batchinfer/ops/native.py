"""The compiled backend: checks tensors, then hands addresses and sizes to ``batchinfer._ops``.

A check costs well under a microsecond; an op is called a few hundred times per step. What a check cannot see without
reading the data (token ids, positions, cache indices) is checked by the extension. Both raise ValueError.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from batchinfer.ops import Activation, AttentionInput, Experts, HeadNorm, Lack, Rope, SampleInput, SampleOutput
from batchinfer.ops.experts import mix_by_expert
from batchinfer.ops.fields import SAMPLE_FIELDS

if TYPE_CHECKING:
    from batchinfer._ops import AttentionPlan, PackedWeight, SharedMemory

    Place = tuple[SharedMemory, int]
    """A mapped memory, and an offset in it in bytes."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Of weights, caches and what linear reads, with their number in csrc/include/batchinfer/ops.h."""
ACTIVATIONS: dict[Activation, int] = {"gelu": 0, "gelu_tanh": 1, "relu": 2}
"""With their number there."""


class NativeOps:
    """All ops of :class:`batchinfer.ops.Ops` on ``device`` "cpu".

    ``threads`` 0 uses the CPUs of this process's affinity mask. ``isa`` names an instruction set ("avx2", "avx512",
    "avx512bf16", "generic"); "" is $BATCHINFER_ISA, or the best one. Calls must not overlap in time: one thread pool
    works on one op. Raises RuntimeError where the extension lacks the device, ValueError for an unusable ``isa``.
    """

    lacks: frozenset[Lack] = frozenset()

    def __init__(self, device: str = "cpu", threads: int = 0, isa: str = ""):
        self._cpu = _extension(device).Cpu(threads, isa)
        self.device = torch.device("cpu")
        self.isa: str = self._cpu.isa
        self.threads: int = self._cpu.threads

    def activations(self, weights: torch.dtype) -> torch.dtype:
        return torch.float32

    def linear_inputs(self, weights: torch.dtype) -> torch.dtype:
        """Where the dot product would round its inputs to bfloat16, what writes them does: half the memory traffic, and
        the same bits."""
        return weights if "bf16" in self.isa else torch.float32

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """numpy's zeros are the kernel's: a page takes memory when it is first written, where torch would write all of
        them now (8 GiB take seconds, and a small job uses a hundredth)."""
        return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)

    def pack_weight(self, weight: Tensor, gated: bool = False, place: Place | None = None) -> PackedWeight:
        """``place``: where the packed weight is to lie, else in memory of its own."""
        outputs, depth = _shape("weight", weight, 2)
        _check("weight", weight, None, (outputs, depth))
        if gated and outputs % 2:
            raise ValueError(f"weight has shape {tuple(weight.shape)}: a gated one needs an even number of rows")
        memory, offset = place or (None, 0)
        return self._cpu.pack_weight(weight.data_ptr(), DTYPES[weight.dtype], outputs, depth, gated, memory, offset)

    def packed_bytes(self, shape: tuple[int, ...], dtype: torch.dtype, gated: bool) -> int:
        """Of a packed weight of that shape."""
        return self._cpu.packed_bytes(DTYPES[dtype], *shape, gated)

    def packed_weight(self, shape: tuple[int, ...], dtype: torch.dtype, gated: bool, place: Place) -> PackedWeight:
        """The weight that ``pack_weight`` has packed there, in this process or another one."""
        memory, offset = place
        return self._cpu.packed_weight(DTYPES[dtype], *shape, gated, memory, offset)

    def map_shared(self, fd: int, size: int, writable: bool) -> SharedMemory:
        """The first ``size`` bytes of the anonymous file ``fd``. Raises OSError."""
        try:
            return self._cpu.map_shared(fd, size, writable)
        except RuntimeError as error:
            raise OSError(str(error)) from None

    def populate(self, memory: SharedMemory, end: int) -> None:
        """Take memory for its first ``end`` bytes, in huge pages where the kernel can."""
        self._cpu.populate(memory, end)

    def linear(self, x: Tensor, weight: PackedWeight, out: Tensor, bias: Tensor | None = None) -> None:
        if weight.gated:
            raise ValueError("weight is packed for gated_linear")
        rows = _shape("x", x, 2)[0]
        _check("out", out, torch.float32, (rows, weight.outputs))
        self._multiply(x, weight, out, bias, weight.outputs)

    def gated_linear(
        self, x: Tensor, weight: PackedWeight, out: Tensor, sums: Tensor, bias: Tensor | None = None
    ) -> None:
        """``sums`` is not touched."""
        if not weight.gated:
            raise ValueError("weight is not packed for gated_linear")
        rows = _shape("x", x, 2)[0]
        _check("out", out, None, (rows, weight.outputs))
        self._multiply(x, weight, out, bias, 2 * weight.outputs)

    def _multiply(self, x: Tensor, weight: PackedWeight, out: Tensor, bias: Tensor | None, biases: int) -> None:
        _check("x", x, None, (len(x), weight.depth))
        if bias is not None:
            _check("bias", bias, torch.float32, (biases,))
        self._cpu.linear(
            x.data_ptr(), DTYPES[x.dtype], weight, _address(bias), out.data_ptr(), DTYPES[out.dtype], len(x)
        )

    def plan_attention(self, inputs: AttentionInput, num_heads: int, k_cache: Tensor, window: int = 0) -> AttentionPlan:
        pages, kv_heads, page_size, width = _shape("k_cache", k_cache, 4)
        slots, slot_pages = _shape("page_table", inputs.page_table, 2)
        (sequences,) = _shape("kv_len", inputs.kv_len, 1)
        _check("q_start", inputs.q_start, torch.int32, (sequences + 1,))
        _check("kv_len", inputs.kv_len, torch.int32, (sequences,))
        _check("slot", inputs.slot, torch.int32, (sequences,))
        _check("page_table", inputs.page_table, torch.int32, (slots, slot_pages))
        if num_heads < 1 or kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_heads={num_heads} must be a positive multiple of the cache's heads, {kv_heads}")
        if page_size < 1 or width < 8 or width % 8 or width > 256:
            raise ValueError(
                f"k_cache has shape {tuple(k_cache.shape)}: pages must hold at least one token, and the head width "
                "must be a multiple of 8 up to 256"
            )
        if window < 0:
            raise ValueError(f"window={window} must be 0 (all positions) or a number of positions")
        return self._cpu.plan_attention(
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
        _check("q", q, torch.float32, plan.query_shape)
        _check("k_cache", k_cache, None, plan.cache_shape)
        _check("v_cache", v_cache, k_cache.dtype, plan.cache_shape)
        _check("out", out, None, plan.query_shape)
        _check("lse", lse, torch.float32, plan.query_shape[:2])
        self._cpu.attention(
            plan,
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            DTYPES[k_cache.dtype],
            scale,
            softcap,
            out.data_ptr(),
            DTYPES[out.dtype],
            lse.data_ptr(),
        )

    def embed(self, ids: Tensor, table: Tensor, out: Tensor, scale: float = 1.0) -> None:
        tokens, width = _shape("out", out, 2)
        vocab = _shape("table", table, 2)[0]
        _check("ids", ids, torch.int32, (tokens,))
        _check("table", table, None, (vocab, width))
        _check("out", out, torch.float32, (tokens, width))
        self._cpu.embed(
            ids.data_ptr(), table.data_ptr(), DTYPES[table.dtype], out.data_ptr(), tokens, width, vocab, scale
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None) -> None:
        tokens, width = _shape("x", x, 2)
        _check("x", x, torch.float32, (tokens, width))
        _check("weight", weight, torch.float32, (width,))
        _check("out", out, None, (tokens, width))
        if residual is not None:
            _check("residual", residual, torch.float32, (tokens, width))
        self._cpu.rms_norm(
            x.data_ptr(),
            weight.data_ptr(),
            _address(residual),
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
        tokens, width = _shape("x", x, 2)
        _check("x", x, torch.float32, (tokens, width))
        _check("weight", weight, torch.float32, (width,))
        _check("out", out, None, (tokens, width))
        if bias is not None:
            _check("bias", bias, torch.float32, (width,))
        if residual is not None:
            _check("residual", residual, torch.float32, (tokens, width))
        self._cpu.layer_norm(
            x.data_ptr(),
            weight.data_ptr(),
            _address(bias),
            _address(residual),
            out.data_ptr(),
            DTYPES[out.dtype],
            tokens,
            width,
            eps,
        )

    def add(self, x: Tensor, residual: Tensor) -> None:
        tokens, width = _shape("x", x, 2)
        _check("x", x, torch.float32, (tokens, width))
        _check("residual", residual, torch.float32, (tokens, width))
        self._cpu.add(x.data_ptr(), residual.data_ptr(), tokens, width)

    def softcap(self, x: Tensor, softcap: float) -> None:
        rows, width = _shape("x", x, 2)
        _check("x", x, torch.float32, (rows, width))
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
        tokens, heads, width = _shape("q_out", q_out, 3)
        pages, kv_heads, page_size, _ = _shape("k_cache", k_cache, 4)
        _check("q_out", q_out, torch.float32, (tokens, heads, width))
        _check("qkv", qkv, torch.float32, (tokens, (heads + 2 * kv_heads) * width))
        _check("positions", positions, torch.int32, (tokens,))
        _check("kv_index", kv_index, torch.int64, (tokens,))
        _check("k_cache", k_cache, None, (pages, kv_heads, page_size, width))
        _check("v_cache", v_cache, k_cache.dtype, (pages, kv_heads, page_size, width))
        cos_sin, max_positions, rotary = None, 0, 0
        if rope is not None:
            cos_sin = rope.cos_sin
            max_positions, rotary = _shape("rope.cos_sin", cos_sin, 2)
            _check("rope.cos_sin", cos_sin, torch.float32, (max_positions, rotary))
            if rotary > width or rotary % 2:
                raise ValueError(
                    f"rope.cos_sin has width {rotary}: it must be even and at most the head width, {width}"
                )
        q_norm, k_norm, norm_all = None, None, False
        if norm is not None:
            q_norm, k_norm = norm.q, norm.k
            norm_all = heads > 1 and q_norm.shape == (heads * width,)
            _check("norm.q", q_norm, torch.float32, (heads * width if norm_all else width,))
            _check("norm.k", k_norm, torch.float32, (kv_heads * width if norm_all else width,))
        self._cpu.rope_and_cache(
            qkv.data_ptr(),
            positions.data_ptr(),
            kv_index.data_ptr(),
            _address(cos_sin),
            _address(q_norm),
            _address(k_norm),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            DTYPES[k_cache.dtype],
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

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        tokens, width = _shape("out", out, 2)
        _check("gate_up", gate_up, torch.float32, (tokens, 2 * width))
        _check("out", out, None, (tokens, width))
        self._cpu.silu_mul(gate_up.data_ptr(), out.data_ptr(), DTYPES[out.dtype], tokens, width)

    def gelu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        tokens, width = _shape("out", out, 2)
        _check("gate_up", gate_up, torch.float32, (tokens, 2 * width))
        _check("out", out, None, (tokens, width))
        self._cpu.gelu_mul(gate_up.data_ptr(), out.data_ptr(), DTYPES[out.dtype], tokens, width)

    def activate(self, kind: Activation, x: Tensor, out: Tensor) -> None:
        tokens, width = _shape("x", x, 2)
        _check("x", x, torch.float32, (tokens, width))
        _check("out", out, None, (tokens, width))
        if kind not in ACTIVATIONS:
            raise ValueError(f"kind={kind!r} must be one of {', '.join(ACTIVATIONS)}")
        self._cpu.activate(ACTIVATIONS[kind], x.data_ptr(), out.data_ptr(), DTYPES[out.dtype], tokens, width)

    def mix_experts(self, x: Tensor, router: Tensor, experts: Experts, out: Tensor) -> None:
        tokens, width = _shape("x", x, 2)
        _check("x", x, torch.float32, (tokens, width))
        _check("router", router, torch.float32, (tokens, len(experts.down)))
        _check("out", out, torch.float32, (tokens, width))
        mix_by_expert(self, x, router, experts, out)

    def gather_rows(self, x: Tensor, index: Tensor, out: Tensor) -> None:
        x_rows, width = _shape("x", x, 2)
        (rows,) = _shape("index", index, 1)
        _check("x", x, None, (x_rows, width))
        _check("index", index, torch.int32, (rows,))
        _check("out", out, x.dtype, (rows, width))
        self._cpu.gather_rows(x.data_ptr(), index.data_ptr(), out.data_ptr(), DTYPES[x.dtype], x_rows, rows, width)

    def sample(self, logits: Tensor, inputs: SampleInput) -> SampleOutput:
        rows, vocab = _shape("logits", logits, 2)
        _check("logits", logits, torch.float32, (rows, vocab))
        if rows and not 0 < vocab <= 2**19:
            raise ValueError(f"logits has {vocab} columns: the sampler takes vocabularies of 1 to {2**19}")
        for name, dtype in SAMPLE_FIELDS.items():
            _check(name, getattr(inputs, name), dtype, (rows,))
        penalties, history, history_size = (0, 0, 0), (0, 0, 0), 0
        if inputs.penalties is not None:
            for name, t in zip(("repetition", "presence", "frequency"), inputs.penalties, strict=True):
                _check(name, t, torch.float32, (rows,))
            history_size = _check_segments("history", inputs.history_ids, inputs.history_start, rows)
            _check("history_prompt", inputs.history_prompt, torch.int32, (rows,))
            penalties = tuple(t.data_ptr() for t in inputs.penalties)
            history = (
                inputs.history_ids.data_ptr(),
                inputs.history_start.data_ptr(),
                inputs.history_prompt.data_ptr(),
            )
        banned, banned_size = (0, 0), 0
        if inputs.banned_ids is not None:
            banned_size = _check_segments("banned", inputs.banned_ids, inputs.banned_start, rows)
            banned = (inputs.banned_ids.data_ptr(), inputs.banned_start.data_ptr())
        if inputs.allowed is not None:
            _check("allowed", inputs.allowed, torch.int32, (rows, -(-vocab // 32)))

        out = SampleOutput(torch.empty(rows, dtype=torch.int32))
        top_width = 0
        if inputs.num_logprobs is not None:
            _check("num_logprobs", inputs.num_logprobs, torch.int32, (rows,))
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
            *banned,
            banned_size,
            _address(inputs.allowed),
            out.tokens.data_ptr(),
            _address(inputs.num_logprobs),
            _address(out.chosen),
            _address(out.top_ids),
            _address(out.top),
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


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _shape(name: str, t: Tensor, dims: int) -> torch.Size:
    if t.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: {dims} dimensions are needed")
    return t.shape


def _check(name: str, t: Tensor | None, dtype: torch.dtype | None, shape: tuple[int, ...]) -> None:
    """``dtype`` None: one of DTYPES."""
    if t is None:
        raise ValueError(f"{name} is missing")
    if t.dtype is not dtype and (dtype is not None or t.dtype not in DTYPES):
        wanted = dtype if dtype is not None else " or ".join(map(str, DTYPES))
        raise ValueError(f"{name} has dtype {t.dtype}: {wanted} is needed")
    if t.shape != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: {shape} is needed")
    if not (t.is_contiguous() and t.is_cpu):
        raise ValueError(f"{name} must be contiguous and on the CPU")


def _check_segments(name: str, ids: Tensor | None, start: Tensor | None, rows: int) -> int:
    """The number of ids. That ``start`` rises and stays inside is checked by the extension."""
    if ids is None:
        raise ValueError(f"{name}_ids is missing")
    _check(f"{name}_ids", ids, torch.int32, (ids.numel(),))
    _check(f"{name}_start", start, torch.int32, (rows + 1,))
    return ids.numel()
