"""The GPU backend: checks tensors, then hands addresses, sizes and the current stream to ``batchinfer._gpu``.

As ``batchinfer.ops`` promises, with these differences:

- Activations (x, q, outputs of attention, the residual stream) have the engine's dtype, which is that of the weights
  and the cache: bfloat16, float16 or float32. Logits, log-sum-exp, norm weights and the rope table are float32.
- Metadata (token ids, positions, cache indices, q_start, kv_len, slot, page table, sampling parameters) lives on the
  device, and no op waits for it: an index outside its table is clamped, and a cache write outside the cache
  (kv_index -1: padding) is dropped. ``SampleInput.num_logprobs`` alone stays on the host: it decides the output's
  shape.
- No launch depends on what a tensor holds, so a step can be captured in a graph and replayed with other contents.
- Products are cuBLAS's, by torch: a row's last bits may depend on the number of rows. Attention's depend on no other
  sequences but those whose pages it shares.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batchinfer.ops import AttentionInput, HeadNorm, Rope, SampleInput, SampleOutput
from batchinfer.ops.fields import SAMPLE_FIELDS

if TYPE_CHECKING:
    from batchinfer._gpu import AttentionPlan

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The engine's dtypes, with their number in csrc/gpu/ops.h."""

DECODE_ROWS = 16
"""Query heads of one kv head that a decode work item takes (csrc/gpu/attention.cuh)."""

SPLIT = 1024
"""KV positions of a decode work item. 256 sequences of 1,000 tokens and 8 kv heads make 2,048 items, eight times what
an H100 works on at once; partial results are 1 % of the bytes moved (width 128, 4 query heads a kv head)."""

PARTIAL_BYTES = 512 << 20
"""Room for partial results; where slots x longest context needs more, the split grows."""


@dataclass(frozen=True)
class Plan:
    """A step's work lists. Valid until the next ``plan_attention`` on the stream with the same page table shape and
    window."""

    handle: AttentionPlan
    num_heads: int
    cache_shape: tuple[int, ...]
    tensors: tuple[Tensor, ...]  # kept alive: the handle holds addresses


class GpuOps:
    """All ops of :class:`batchinfer.ops.Ops` on ``device``, on torch's current stream, by ``extension``: see
    :func:`open_gpu`. Raises ValueError on shapes and dtypes."""

    def __init__(self, device: torch.device, extension: ModuleType):
        self.device = device
        self._gpu = extension
        self._workspaces: dict[tuple, tuple[int, tuple[Tensor, ...]]] = {}
        self._lists: dict[tuple[tuple, int], tuple[Tensor, ...]] = {}
        self._biases: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def activations(self, weights: torch.dtype) -> torch.dtype:
        return weights

    def linear_inputs(self, weights: torch.dtype) -> torch.dtype:
        return weights

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def pack_weight(self, weight: Tensor, gated: bool = False) -> Tensor:
        _shape("weight", weight, 2)
        if weight.dtype not in DTYPES:
            raise ValueError(f"weight has dtype {weight.dtype}: one of {', '.join(map(str, DTYPES))} is needed")
        return weight.to(self.device).contiguous()

    def linear(self, x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        rows = _shape("x", x, 2)[0]
        self._check("x", x, weight.dtype, (rows, weight.shape[1]))
        if out.dtype is not weight.dtype:
            self._check("out", out, torch.float32, (rows, weight.shape[0]))
            torch.mm(x, weight.t(), torch.float32, out=out) if _MM_FLOAT else out.copy_(torch.mm(x, weight.t()))
            if bias is not None:
                out += bias
            return
        self._check("out", out, weight.dtype, (rows, weight.shape[0]))
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(self._bias(bias, weight.dtype), x, weight.t(), out=out)

    def gated_linear(self, x: Tensor, weight: Tensor, out: Tensor, sums: Tensor, bias: Tensor | None = None) -> None:
        self.linear(x, weight, sums, bias)
        self.silu_mul(sums, out)

    def embed(self, ids: Tensor, table: Tensor, out: Tensor, scale: float = 1.0) -> None:
        self._lookup("ids", ids, "table", table, out, scale)

    def gather_rows(self, x: Tensor, index: Tensor, out: Tensor) -> None:
        self._lookup("index", index, "x", x, out, 1.0)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None) -> None:
        tokens, width = _shape("x", x, 2)
        self._check("x", x, None, (tokens, width))
        self._check("weight", weight, torch.float32, (width,))
        self._check("out", out, x.dtype, (tokens, width))
        if residual is not None:
            self._check("residual", residual, x.dtype, (tokens, width))
        self._gpu.rms_norm(
            x.data_ptr(),
            weight.data_ptr(),
            _address(residual),
            out.data_ptr(),
            DTYPES[x.dtype],
            tokens,
            width,
            eps,
            self._stream(),
        )

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        self._gate(self._gpu.silu_mul, gate_up, out)

    def gelu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        self._gate(self._gpu.gelu_mul, gate_up, out)

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
        self._check("q_out", q_out, None, (tokens, heads, width))
        self._check("qkv", qkv, q_out.dtype, (tokens, (heads + 2 * kv_heads) * width))
        self._check("positions", positions, torch.int32, (tokens,))
        self._check("kv_index", kv_index, torch.int64, (tokens,))
        self._check("k_cache", k_cache, q_out.dtype, (pages, kv_heads, page_size, width))
        self._check("v_cache", v_cache, q_out.dtype, (pages, kv_heads, page_size, width))
        cos_sin, positions_in_table, rotary = None, 0, 0
        if rope is not None:
            cos_sin = rope.cos_sin
            positions_in_table, rotary = _shape("rope.cos_sin", cos_sin, 2)
            self._check("rope.cos_sin", cos_sin, torch.float32, (positions_in_table, rotary))
        q_norm = k_norm = None
        if norm is not None:
            q_norm, k_norm = norm.q, norm.k
            self._check("norm.q", q_norm, torch.float32, (width,))
            self._check("norm.k", k_norm, torch.float32, (width,))
        self._gpu.rope_and_cache(
            qkv.data_ptr(),
            positions.data_ptr(),
            kv_index.data_ptr(),
            _address(cos_sin),
            _address(q_norm),
            _address(k_norm),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            q_out.data_ptr(),
            DTYPES[q_out.dtype],
            tokens,
            heads,
            kv_heads,
            width,
            positions_in_table,
            rotary,
            pages,
            page_size,
            0.0 if norm is None else norm.eps,
            self._stream(),
        )

    def plan_attention(self, inputs: AttentionInput, num_heads: int, k_cache: Tensor, window: int = 0) -> Plan:
        pages, kv_heads, page_size, width = _shape("k_cache", k_cache, 4)
        slots, slot_pages = _shape("page_table", inputs.page_table, 2)
        (sequences,) = _shape("kv_len", inputs.kv_len, 1)
        self._check("q_start", inputs.q_start, torch.int32, (sequences + 1,))
        self._check("kv_len", inputs.kv_len, torch.int32, (sequences,))
        self._check("slot", inputs.slot, torch.int32, (sequences,))
        self._check("page_table", inputs.page_table, torch.int32, (slots, slot_pages))
        if sequences > slots:
            raise ValueError(
                f"{sequences} sequences, but page_table has {slots} slots: a sequence needs one of its own"
            )
        if num_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_heads={num_heads} must be a positive multiple of the cache's heads, {kv_heads}")
        if window < 0:
            raise ValueError(f"window={window} must be 0 (all positions) or a number of positions")
        key = (slots, slot_pages, num_heads, kv_heads, page_size, width)
        if key not in self._workspaces:
            self._workspaces[key] = self._workspace(slots, slot_pages * page_size, num_heads, kv_heads, width)
        if (key, window) not in self._lists:
            self._lists[key, window] = tuple(self._empty(torch.int32, slots + 1) for _ in range(4))
        split, workspace = self._workspaces[key]
        workspace = self._lists[key, window] + workspace
        lists = (inputs.q_start, inputs.kv_len, inputs.slot, inputs.page_table)
        handle = self._gpu.AttentionPlan(
            *(t.data_ptr() for t in lists),
            sequences,
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

    def attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: Plan,
        scale: float,
        out: Tensor,
        lse: Tensor,
        softcap: float = 0.0,
    ) -> None:
        tokens = _shape("q", q, 3)[0]
        self._check("q", q, None, (tokens, plan.num_heads, plan.cache_shape[3]))
        self._check("k_cache", k_cache, q.dtype, plan.cache_shape)
        self._check("v_cache", v_cache, q.dtype, plan.cache_shape)
        self._check("out", out, q.dtype, q.shape)
        self._check("lse", lse, torch.float32, q.shape[:2])
        self._gpu.attention(
            plan.handle,
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            DTYPES[q.dtype],
            tokens,
            scale,
            softcap,
            self._stream(),
        )

    def sample(self, logits: Tensor, inputs: SampleInput) -> SampleOutput:
        rows, vocab = _shape("logits", logits, 2)
        self._check("logits", logits, torch.float32, (rows, vocab))
        if rows and not 0 < vocab <= 2**19:
            raise ValueError(f"logits has {vocab} columns: the sampler takes vocabularies of 1 to {2**19}")
        for name, dtype in SAMPLE_FIELDS.items():
            self._check(name, getattr(inputs, name), dtype, (rows,))
        penalties, history, history_size = (0, 0, 0), (0, 0, 0), 0
        if inputs.penalties is not None:
            for name, t in zip(("repetition", "presence", "frequency"), inputs.penalties, strict=True):
                self._check(name, t, torch.float32, (rows,))
            history_size = self._check_segments("history", inputs.history_ids, inputs.history_start, rows)
            self._check("history_prompt", inputs.history_prompt, torch.int32, (rows,))
            penalties = tuple(t.data_ptr() for t in inputs.penalties)
            history = tuple(t.data_ptr() for t in (inputs.history_ids, inputs.history_start, inputs.history_prompt))
        banned, banned_size = (0, 0), 0
        if inputs.banned_ids is not None:
            banned_size = self._check_segments("banned", inputs.banned_ids, inputs.banned_start, rows)
            banned = (inputs.banned_ids.data_ptr(), inputs.banned_start.data_ptr())
        edited = any(given is not None for given in (inputs.penalties, inputs.banned_ids, inputs.allowed))
        wanted, raw, out = None, logits, SampleOutput(self._empty(torch.int32, rows))
        if inputs.num_logprobs is not None:
            if inputs.num_logprobs.is_cuda:
                raise ValueError("num_logprobs must be on the host: it decides the output's shape")
            wide = max(0, int(inputs.num_logprobs.max())) if rows else 0
            wanted = inputs.num_logprobs.to(self.device, non_blocking=True)
            self._check("num_logprobs", wanted, torch.int32, (rows,))
            raw = logits.clone() if edited else logits
            tops = self._empty(torch.int32, rows, wide), self._empty(torch.float32, rows, wide)
            out = SampleOutput(out.tokens, self._empty(torch.float32, rows), *tops)
        if inputs.allowed is not None:
            self._check("allowed", inputs.allowed, torch.int32, (rows, -(-vocab // 32)))
            forbid(logits, inputs.allowed)
        self._gpu.sample(
            logits.data_ptr(),
            rows,
            vocab,
            *(getattr(inputs, name).data_ptr() for name in SAMPLE_FIELDS),
            *penalties,
            *history,
            history_size,
            *banned,
            banned_size,
            out.tokens.data_ptr(),
            _address(wanted),
            _address(out.chosen),
            _address(out.top_ids),
            _address(out.top),
            0 if out.top is None else out.top.shape[1],
            raw.data_ptr(),
            self._stream(),
        )
        return out

    def _gate(self, launch: Callable[..., None], gate_up: Tensor, out: Tensor) -> None:
        tokens, width = _shape("out", out, 2)
        self._check("gate_up", gate_up, None, (tokens, 2 * width))
        self._check("out", out, gate_up.dtype, (tokens, width))
        launch(gate_up.data_ptr(), out.data_ptr(), DTYPES[out.dtype], tokens, width, self._stream())

    def _lookup(self, ids_name: str, ids: Tensor, table_name: str, table: Tensor, out: Tensor, scale: float) -> None:
        rows, width = _shape("out", out, 2)
        table_rows = _shape(table_name, table, 2)[0]
        self._check(ids_name, ids, torch.int32, (rows,))
        self._check(table_name, table, None, (table_rows, width))
        self._check("out", out, table.dtype, (rows, width))
        self._gpu.lookup(
            ids.data_ptr(),
            table.data_ptr(),
            out.data_ptr(),
            DTYPES[out.dtype],
            rows,
            width,
            table_rows,
            scale,
            self._stream(),
        )

    def _workspace(
        self, slots: int, longest: int, heads: int, kv_heads: int, width: int
    ) -> tuple[int, tuple[Tensor, ...]]:
        """The split, and the plan's arrays from queues on. Both follow from the page table's shape alone."""
        split = SPLIT
        while slots * heads * width * 4 * _parts(longest, split) > PARTIAL_BYTES:
            split *= 2
        partial_rows = slots * heads * _parts(longest, split)
        row_tiles = -(-heads // kv_heads // DECODE_ROWS)
        return split, (
            torch.zeros(4, dtype=torch.int32, device=self.device),
            torch.zeros(slots * kv_heads * row_tiles, dtype=torch.int32, device=self.device),
            self._empty(torch.float32, partial_rows, width),
            self._empty(torch.float32, partial_rows),
        )

    def _bias(self, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """``bias`` in ``dtype``, converted once: checkpoints hold biases in the weights' dtype, so nothing is lost."""
        key = (bias.data_ptr(), dtype)
        if key not in self._biases:
            self._biases[key] = (bias, bias.to(dtype))
        return self._biases[key][1]

    def _empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    def _check(self, name: str, t: Tensor | None, dtype: torch.dtype | None, shape: tuple[int, ...]) -> None:
        """``dtype`` None: one of DTYPES."""
        if t is None:
            raise ValueError(f"{name} is missing")
        if t.dtype is not dtype and (dtype is not None or t.dtype not in DTYPES):
            wanted = dtype if dtype is not None else " or ".join(map(str, DTYPES))
            raise ValueError(f"{name} has dtype {t.dtype}: {wanted} is needed")
        if t.shape != shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}: {tuple(shape)} is needed")
        if not t.is_contiguous() or t.device != self.device:
            raise ValueError(f"{name} must be contiguous and on {self.device}")

    def _check_segments(self, name: str, ids: Tensor | None, start: Tensor | None, rows: int) -> int:
        """The number of ids."""
        if ids is None:
            raise ValueError(f"{name}_ids is missing")
        self._check(f"{name}_ids", ids, torch.int32, (ids.numel(),))
        self._check(f"{name}_start", start, torch.int32, (rows + 1,))
        return ids.numel()


def open_gpu(device: str = "cuda") -> GpuOps:
    """The ops on the CUDA device ``device``, which becomes torch's current one. Raises RuntimeError where the extension
    or the device is missing."""
    extension = _extension()
    if not torch.cuda.is_available() or extension.device_count() == 0:
        raise RuntimeError(f"device {device}: no usable GPU (driver, CUDA_VISIBLE_DEVICES, or a torch without CUDA)")
    chosen = torch.device(device)
    if chosen.index is None:
        chosen = torch.device(chosen.type, torch.cuda.current_device())
    torch.cuda.set_device(chosen)
    return GpuOps(chosen, extension)


_MM_FLOAT = hasattr(torch.ops.aten.mm, "dtype_out")
"""Whether torch (2.8 and later) writes the product of 16-bit matrices in float32, which keeps the logits' last bits."""


def forbid(logits: Tensor, allowed: Tensor) -> None:
    """Make the logits [N, V] of the tokens that ``allowed`` leaves out -inf, in place; see SampleInput. By torch's own
    kernels: few jobs need it, and their host is in the loop anyway."""
    places = torch.arange(32, dtype=torch.int32, device=logits.device)
    bits = (allowed.unsqueeze(2) >> places) & 1
    logits.masked_fill_(bits.flatten(1)[:, : logits.shape[1]] == 0, float("-inf"))


def _extension() -> ModuleType:
    try:
        return importlib.import_module("batchinfer._gpu")
    except ImportError as e:
        raise RuntimeError(
            f"batchinfer is not compiled for cuda ({e}). Rebuild with: BATCHINFER_DEVICE=cuda pip install ."
        ) from e


def _parts(longest: int, split: int) -> int:
    """Most partial results of a sequence of at most ``longest`` tokens: of its splits, and one more where a beginning
    that it shares with others ends within one."""
    return -(-longest // split) + 1


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _shape(name: str, t: Tensor, dims: int) -> torch.Size:
    if t.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: {dims} dimensions are needed")
    return t.shape
