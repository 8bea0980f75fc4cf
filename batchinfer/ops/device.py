"""What the GPU backends share: the checks of every tensor, matrix products, and what torch does best itself.

As ``batchinfer.ops`` promises, with these differences:

- Activations (x, q, outputs of attention, the residual stream) have the engine's dtype, which is that of the weights
  and the cache: bfloat16, float16 or float32. Beside bfloat16 the cache may be float8_e4m3fn. Logits, log-sum-exp, norm
  weights and the rope table are float32.
- Metadata (token ids, positions, cache indices, q_start, kv_len, slot, page table, sampling parameters) lives on the
  device, and no op waits for it: an index outside its table is clamped, and a cache write outside the cache
  (kv_index -1: padding) is dropped. ``SampleInput.num_logprobs`` alone stays on the host: it decides the output's
  shape.
- No launch depends on what a tensor holds, so a step can be captured in a graph and replayed with other contents.
- Products are the vendor's, by torch, but for some of ``gated_linear``, whose sums are not rounded before the gate: a
  row's last bits may depend on the number of rows. Attention's depend on no other sequences but those whose pages it
  shares.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor

from batchinfer.ops import Activation, AttentionInput, Experts, HeadNorm, Lack, Rope, SampleInput, SampleOutput
from batchinfer.ops.fields import SAMPLE_FIELDS
from batchinfer.ops.grouped import GroupQuantized
from batchinfer.ops.quantized import FLOAT8
from batchinfer.ops.sinks import share_of_keys
from batchinfer.ops.texts import TextAttention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of weights, caches and activations."""

PARTIAL_BYTES = 512 << 20
"""Room for attention's partial results; where slots x longest context needs more, the split grows."""


class Plan(Protocol):
    """A step's work lists. Valid until the next ``plan_attention`` on the stream with the same page table shape and
    window."""

    num_heads: int
    cache_shape: tuple[int, ...]


class DeviceOps(TextAttention, ABC):
    """All ops of :class:`batchinfer.ops.Ops`; a backend adds the launches, whose arguments are checked here.

    Raises ValueError on shapes and dtypes.
    """

    lacks: frozenset[Lack] = frozenset(
        {"quantised weights", "KV cache of another dtype", "int8 KV cache", "float8 KV cache beside float32"}
    )

    beside_float8: tuple[torch.dtype, ...] = (torch.bfloat16,)
    """Dtypes of activations with which a cache may be float8_e4m3fn."""

    def __init__(self, device: torch.device):
        self.device = device
        self._biases: dict[tuple[int, int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def activations(self, weights: torch.dtype) -> torch.dtype:
        return weights

    def linear_inputs(self, weights: torch.dtype) -> torch.dtype:
        return weights

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def pack_weight(self, weight: Tensor | GroupQuantized, gated: bool = False) -> Any:
        if isinstance(weight, GroupQuantized):
            return self._pack_groups(weight)
        shape_of("weight", weight, 2)
        if weight.dtype not in DTYPES:
            raise ValueError(f"weight has dtype {weight.dtype}: one of {', '.join(map(str, DTYPES))} is needed")
        return weight.to(self.device).contiguous()

    def linear(self, x: Tensor, weight: Any, out: Tensor, bias: Tensor | None = None) -> None:
        rows, dense = shape_of("x", x, 2)[0], isinstance(weight, Tensor)
        self._check("x", x, weight.dtype if dense else None, (rows, weight.shape[1]))
        self._check("out", out, x.dtype if out.dtype is x.dtype else torch.float32, (rows, weight.shape[0]))
        (self._dense_linear if dense else self._group_linear)(x, weight, out, bias)

    def _dense_linear(self, x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None) -> None:
        """``linear`` without checks; ``out`` may be columns of a tensor."""
        if out.dtype is not weight.dtype:
            if _MM_FLOAT and x.is_cuda:
                torch.mm(x, weight.t(), torch.float32, out=out)
            else:
                out.copy_(torch.mm(x, weight.t()))
            if bias is not None:
                out += bias
        elif bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(self._bias(bias, weight.dtype), x, weight.t(), out=out)

    def gated_linear(self, x: Tensor, weight: Any, out: Tensor, sums: Tensor, bias: Tensor | None = None) -> None:
        if bias is None and isinstance(weight, Tensor):
            self._check("x", x, weight.dtype, (len(out), weight.shape[1]))
            self._check("sums", sums, x.dtype, (len(out), weight.shape[0]))
            self._check_gate(sums, out)
            if self._gated_linear(x, weight, out):
                return
        self.linear(x, weight, sums, bias)
        self.silu_mul(sums, out)

    def _gated_linear(self, x: Tensor, weight: Tensor, out: Tensor) -> bool:
        """In one launch, without the sums; False, and nothing is done, where there is no kernel for these tensors."""
        return False

    def embed(self, ids: Tensor, table: Tensor, out: Tensor, scale: float = 1.0) -> None:
        self._check_lookup("ids", ids, "table", table, out)
        self._lookup(ids, table, out, scale)

    def gather_rows(self, x: Tensor, index: Tensor, out: Tensor) -> None:
        self._check_lookup("index", index, "x", x, out)
        self._lookup(index, x, out, 1.0)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None) -> None:
        tokens, width = shape_of("x", x, 2)
        self._check("x", x, None, (tokens, width))
        self._check("weight", weight, torch.float32, (width,))
        self._check("out", out, x.dtype, (tokens, width))
        if residual is not None:
            self._check("residual", residual, x.dtype, (tokens, width))
        self._rms_norm(x, weight, eps, out, residual)

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
        self._check("x", x, None, (tokens, width))
        self._check("weight", weight, torch.float32, (width,))
        if bias is not None:
            self._check("bias", bias, torch.float32, (width,))
        self._check("out", out, x.dtype, (tokens, width))
        if residual is not None:
            self._check("residual", residual, x.dtype, (tokens, width))
        self._layer_norm(x, weight, bias, eps, out, residual)

    def add(self, x: Tensor, residual: Tensor) -> None:
        self._check("x", x, None, residual.shape)
        self._check("residual", residual, x.dtype, residual.shape)
        residual += x

    def softcap(self, x: Tensor, softcap: float) -> None:
        self._check("x", x, torch.float32, shape_of("x", x, 2))
        x.div_(softcap).tanh_().mul_(softcap)

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        self._check_gate(gate_up, out)
        self._silu_mul(gate_up, out)

    def gelu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        self._check_gate(gate_up, out)
        self._gelu_mul(gate_up, out)

    def activate(self, kind: Activation, x: Tensor, out: Tensor) -> None:
        self._check("x", x, None, shape_of("x", x, 2))
        self._check("out", out, x.dtype, x.shape)
        if kind == "relu":
            torch.clamp(x, min=0, out=out)
        else:
            torch.ops.aten.gelu.out(x, approximate="none" if kind == "gelu" else "tanh", out=out)

    def mix_experts(self, x: Tensor, router: Tensor, experts: Experts, out: Tensor) -> None:
        tokens, width = shape_of("x", x, 2)
        self._check("x", x, experts.down[0].dtype, (tokens, width))
        self._check("router", router, torch.float32, (tokens, experts.logits))
        self._check("out", out, x.dtype, (tokens, width))
        shared = None
        if experts.shared:
            inner = experts.widths[-1]
            sums, gated, shared = (x.new_empty(tokens, size) for size in (2 * inner, inner, width))
            self.gated_linear(x, experts.gate_up[-1], gated, sums)
            self.linear(gated, experts.down[-1], shared)
        self._mix_experts(x, router, experts, shared, out)

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
        self._check("q_out", q_out, None, (tokens, heads, width))
        self._check("qkv", qkv, q_out.dtype, (tokens, (heads + 2 * kv_heads) * width))
        self._check("positions", positions, torch.int32, (tokens,))
        self._check("kv_index", kv_index, torch.int64, (tokens,))
        self._check_caches(k_cache, v_cache, q_out.dtype, (pages, kv_heads, page_size, width))
        if rope is not None:
            table_positions, rotary = shape_of("rope.cos_sin", rope.cos_sin, 2)
            self._check("rope.cos_sin", rope.cos_sin, torch.float32, (table_positions, rotary))
        if norm is not None:
            whole = norm.q.numel() != width  # of all heads together
            self._check("norm.q", norm.q, torch.float32, (heads * width if whole else width,))
            self._check("norm.k", norm.k, torch.float32, (kv_heads * width if whole else width,))
        self._rope_and_cache(qkv, positions, kv_index, rope, k_cache, v_cache, q_out, norm)

    def copy_pages(self, k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
        pages = shape_of("k_cache", k_cache, 4)[0]
        (copies,) = shape_of("source", source, 1)
        self._check("k_cache", k_cache, k_cache.dtype, k_cache.shape)
        self._check("v_cache", v_cache, k_cache.dtype, k_cache.shape)
        self._check("source", source, torch.int32, (copies,))
        self._check("target", target, torch.int32, (copies,))
        page_bytes = k_cache[:1].nbytes
        if page_bytes % 16:
            raise ValueError(f"k_cache has pages of {page_bytes} bytes: a multiple of 16 is needed")
        self._copy_pages(k_cache, v_cache, source, target, pages, page_bytes)

    def feed_back(self, ids: Tensor, kv_len: Tensor, slot: Tensor, last_token: Tensor, stop_ids: Tensor) -> None:
        (rows,) = shape_of("ids", ids, 1)
        stops = shape_of("stop_ids", stop_ids, 2)[1]
        self._check("ids", ids, torch.int32, (rows,))
        self._check("kv_len", kv_len, torch.int32, (rows,))
        self._check("slot", slot, torch.int32, (rows,))
        self._check("last_token", last_token, torch.int32, shape_of("last_token", last_token, 1))
        self._check("stop_ids", stop_ids, torch.int32, (rows, stops))
        self._feed_back(ids, kv_len, slot, last_token, stop_ids)

    def _feed_back(self, ids: Tensor, kv_len: Tensor, slot: Tensor, last_token: Tensor, stop_ids: Tensor) -> None:
        """By torch, where a backend has no kernel of its own."""
        unknown = ids < 0
        torch.where(unknown, last_token.index_select(0, slot.clamp(0, len(last_token) - 1)), ids, out=ids)
        ended = unknown & (stop_ids == ids.unsqueeze(1)).any(dim=1)
        torch.where(ended, -kv_len, kv_len, out=kv_len)

    def plan_attention(self, inputs: AttentionInput, num_heads: int, k_cache: Tensor, window: int = 0) -> Any:
        kv_heads = shape_of("k_cache", k_cache, 4)[1]
        slots, slot_pages = shape_of("page_table", inputs.page_table, 2)
        (sequences,) = shape_of("kv_len", inputs.kv_len, 1)
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
        return self._plan_attention(inputs, num_heads, k_cache, window)

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
        tokens = shape_of("q", q, 3)[0]
        self._check("q", q, None, (tokens, plan.num_heads, plan.cache_shape[3]))
        self._check_caches(k_cache, v_cache, q.dtype, plan.cache_shape)
        self._check("out", out, q.dtype, q.shape)
        self._check("lse", lse, torch.float32, q.shape[:2])
        self._attention(q, k_cache, v_cache, plan, scale, out, lse, softcap)

    def sink(self, attn: Tensor, lse: Tensor, sinks: Tensor) -> None:
        tokens, heads, _ = shape_of("attn", attn, 3)
        self._check("attn", attn, None, attn.shape)
        self._check("lse", lse, torch.float32, (tokens, heads))
        self._check("sinks", sinks, torch.float32, (heads,))
        attn.mul_(share_of_keys(lse, sinks).unsqueeze(-1))

    def copy(self, x: Tensor, out: Tensor) -> None:
        if x.dtype is not out.dtype:
            raise ValueError(f"out has dtype {out.dtype}: {x.dtype} is needed")
        out.copy_(x)

    def sample(self, logits: Tensor, inputs: SampleInput) -> SampleOutput:
        rows, vocab = shape_of("logits", logits, 2)
        self._check("logits", logits, torch.float32, (rows, vocab))
        if rows and not 0 < vocab <= 2**19:
            raise ValueError(f"logits has {vocab} columns: the sampler takes vocabularies of 1 to {2**19}")
        for name, dtype in SAMPLE_FIELDS.items():
            self._check(name, getattr(inputs, name), dtype, (rows,))
        if inputs.penalties is not None:
            for name, t in zip(("repetition", "presence", "frequency"), inputs.penalties, strict=True):
                self._check(name, t, torch.float32, (rows,))
            self._check_segments("history", inputs.history_ids, inputs.history_start, rows)
            self._check("history_prompt", inputs.history_prompt, torch.int32, (rows,))
        if inputs.banned_ids is not None:
            self._check_segments("banned", inputs.banned_ids, inputs.banned_start, rows)
        edits = (inputs.bias_ids, inputs.penalties, inputs.banned_ids, inputs.allowed)
        edited = any(given is not None for given in edits)
        wanted, raw, out = None, logits, SampleOutput(self._empty(torch.int32, rows))
        if inputs.num_logprobs is not None:
            if inputs.num_logprobs.device.type != "cpu":
                raise ValueError("num_logprobs must be on the host: it decides the output's shape")
            wide = max(0, int(inputs.num_logprobs.max())) if rows else 0
            wanted = inputs.num_logprobs.to(self.device, non_blocking=True)
            self._check("num_logprobs", wanted, torch.int32, (rows,))
            raw = logits.clone() if edited else logits
            tops = self._empty(torch.int32, rows, wide), self._empty(torch.float32, rows, wide)
            out = SampleOutput(out.tokens, self._empty(torch.float32, rows), *tops)
        if inputs.bias_ids is not None:
            self._check_segments("bias", inputs.bias_ids, inputs.bias_start, rows)
            self._check("bias_values", inputs.bias_values, torch.float32, inputs.bias_ids.shape)
            add_biases(logits, inputs.bias_ids, inputs.bias_start, inputs.bias_values)
        if inputs.allowed is not None:
            self._check("allowed", inputs.allowed, torch.int32, (rows, -(-vocab // 32)))
            forbid(logits, inputs.allowed)
        self._sample(logits, inputs, raw, wanted, out)
        return out

    @abstractmethod
    def _pack_groups(self, weight: GroupQuantized) -> Any:
        """What ``_group_linear`` takes, with a ``shape`` [N, K] and its ``nbytes``."""

    @abstractmethod
    def _group_linear(self, x: Tensor, weight: Any, out: Tensor, bias: Tensor | None) -> None: ...

    @abstractmethod
    def _lookup(self, ids: Tensor, table: Tensor, out: Tensor, scale: float) -> None: ...

    @abstractmethod
    def _rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None) -> None: ...

    @abstractmethod
    def _silu_mul(self, gate_up: Tensor, out: Tensor) -> None: ...

    @abstractmethod
    def _gelu_mul(self, gate_up: Tensor, out: Tensor) -> None: ...

    def _layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor, residual: Tensor | None
    ) -> None:
        """By torch, where a backend has no kernel of its own."""
        if residual is not None:
            residual += x
            x = residual
        out.copy_(torch.nn.functional.layer_norm(x.float(), weight.shape, weight, bias, eps))

    @abstractmethod
    def _mix_experts(self, x: Tensor, router: Tensor, experts: Experts, shared: Tensor | None, out: Tensor) -> None: ...

    @abstractmethod
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
    ) -> None: ...

    @abstractmethod
    def _copy_pages(
        self, k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor, pages: int, page_bytes: int
    ) -> None: ...

    @abstractmethod
    def _plan_attention(self, inputs: AttentionInput, num_heads: int, k_cache: Tensor, window: int) -> Plan: ...

    @abstractmethod
    def _attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: Any,
        scale: float,
        out: Tensor,
        lse: Tensor,
        softcap: float,
    ) -> None: ...

    @abstractmethod
    def _sample(
        self, logits: Tensor, inputs: SampleInput, raw: Tensor, num_logprobs: Tensor | None, out: SampleOutput
    ) -> None:
        """Fill ``out``. ``raw``: the logits that log-probabilities are of; ``num_logprobs``: on the device.
        The biases and ``inputs.allowed`` have been applied."""

    def _bias(self, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """``bias`` in ``dtype``, converted once: checkpoints hold biases in the weights' dtype, so nothing is lost."""
        key = (bias.data_ptr(), bias.numel(), dtype)
        if key not in self._biases:
            self._biases[key] = (bias, bias.to(dtype))
        return self._biases[key][1]

    def _empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

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

    def _check_caches(self, k: Tensor, v: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        kept = FLOAT8 if k.dtype is FLOAT8 and dtype in self.beside_float8 else dtype
        self._check("k_cache", k, kept, shape)
        self._check("v_cache", v, kept, shape)

    def _check_gate(self, gate_up: Tensor, out: Tensor) -> None:
        tokens, width = shape_of("out", out, 2)
        self._check("gate_up", gate_up, None, (tokens, 2 * width))
        self._check("out", out, gate_up.dtype, (tokens, width))

    def _check_lookup(self, ids_name: str, ids: Tensor, table_name: str, table: Tensor, out: Tensor) -> None:
        rows, width = shape_of("out", out, 2)
        table_rows = shape_of(table_name, table, 2)[0]
        self._check(ids_name, ids, torch.int32, (rows,))
        self._check(table_name, table, None, (table_rows, width))
        self._check("out", out, table.dtype, (rows, width))

    def _check_segments(self, name: str, ids: Tensor | None, start: Tensor | None, rows: int) -> None:
        if ids is None:
            raise ValueError(f"{name}_ids is missing")
        self._check(f"{name}_ids", ids, torch.int32, (ids.numel(),))
        self._check(f"{name}_start", start, torch.int32, (rows + 1,))


_MM_FLOAT = hasattr(torch.ops.aten.mm, "dtype_out")
"""Whether torch (2.8 and later) writes the product of 16-bit matrices in float32, which keeps the logits' last bits."""


def add_biases(logits: Tensor, ids: Tensor, start: Tensor, values: Tensor) -> None:
    """Add ``values`` to the logits [N, V] of the tokens ``ids``, in place; see SampleInput. By torch's own kernels, as
    in :func:`forbid`. An id outside the vocabulary is clamped, and its bias is 0."""
    row = torch.repeat_interleave(start.diff(), output_size=len(ids))
    inside = (ids >= 0) & (ids < logits.shape[1])
    place = row * logits.shape[1] + ids.clamp(0, logits.shape[1] - 1)
    logits.view(-1).index_add_(0, place, torch.where(inside, values, 0.0))


def forbid(logits: Tensor, allowed: Tensor) -> None:
    """Make the logits [N, V] of the tokens that ``allowed`` leaves out -inf, in place; see SampleInput. By torch's own
    kernels: few jobs need it, and their host is in the loop anyway."""
    places = torch.arange(32, dtype=torch.int32, device=logits.device)
    bits = (allowed.unsqueeze(2) >> places) & 1
    logits.masked_fill_(bits.flatten(1)[:, : logits.shape[1]] == 0, float("-inf"))


def parts(longest: int, split: int) -> int:
    """Most partial results of a sequence of at most ``longest`` tokens: of its splits, and one more where a beginning
    that it shares with others ends within one."""
    return -(-longest // split) + 1


def fitting_split(split: int, slots: int, longest: int, heads: int, width: int) -> int:
    """``split``, or the smallest power of two times it whose partial results (float32) fit into PARTIAL_BYTES."""
    while slots * heads * width * 4 * parts(longest, split) > PARTIAL_BYTES:
        split *= 2
    return split


def shape_of(name: str, t: Tensor, dims: int) -> torch.Size:
    if t.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: {dims} dimensions are needed")
    return t.shape
