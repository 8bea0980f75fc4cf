"""The plain torch truth of every op: what ``batchinfer.ops`` promises, in as few lines as possible.

It is the specification that compiled backends are tested against, and a complete, slow backend by itself. Sums are
taken in the compute dtype; with float32 a row's last bits may depend on the other rows of a call, because torch's
matrix product promises no order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from batchinfer.ops import Activation, AttentionInput, Experts, HeadNorm, Lack, Rope, SampleInput, SampleOutput
from batchinfer.ops.grouped import GroupQuantized
from batchinfer.ops.quantized import Quantized, decode_kv, encode_kv, product
from batchinfer.ops.reference_experts import mix
from batchinfer.ops.reference_sampler import sample


class ReferenceOps:
    """All ops of :class:`batchinfer.ops.Ops`. Computes in ``dtype`` and rounds once, into the given output."""

    lacks: frozenset[Lack] = frozenset()

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.dtype = dtype
        self.device = torch.device("cpu")

    def activations(self, weights: torch.dtype) -> torch.dtype:
        return torch.float32

    def linear_inputs(self, weights: torch.dtype) -> torch.dtype:
        return torch.float32

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def pack_weight(self, weight: Tensor | Quantized | GroupQuantized, gated: bool = False) -> Tensor | Quantized:
        if isinstance(weight, GroupQuantized):
            return weight.dense(self.dtype)
        return weight.to(self.dtype) if isinstance(weight, Tensor) else weight

    def linear(self, x: Tensor, weight: Tensor | Quantized, out: Tensor, bias: Tensor | None = None) -> None:
        y = self._product(x, weight)
        out.copy_(y if bias is None else y + bias)

    def gated_linear(
        self, x: Tensor, weight: Tensor | Quantized, out: Tensor, sums: Tensor, bias: Tensor | None = None
    ) -> None:
        self.linear(x, weight, sums, bias)
        self.silu_mul(sums, out)

    def embed(self, ids: Tensor, table: Tensor, out: Tensor, scale: float = 1.0) -> None:
        _check_range("ids", ids, len(table))
        out.copy_(table[ids.long()].to(self.dtype) * scale)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None) -> None:
        if residual is not None:
            residual += x
            x = residual
        out.copy_(self._rms_norm(x.to(self.dtype), weight, eps))

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        out: Tensor,
        residual: Tensor | None = None,
    ) -> None:
        if residual is not None:
            residual += x
            x = residual
        x = x.to(self.dtype)
        x = x - x.mean(dim=-1, keepdim=True)
        y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight
        out.copy_(y if bias is None else y + bias)

    def add(self, x: Tensor, residual: Tensor) -> None:
        residual += x

    def softcap(self, x: Tensor, softcap: float) -> None:
        x.copy_(_softcap(x.to(self.dtype), softcap))

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
        tokens, heads, width = q_out.shape
        pages, kv_heads, page_size, _ = k_cache.shape
        _check_range("kv_index", kv_index, pages * page_size)
        q, k, v = qkv.view(tokens, heads + 2 * kv_heads, width).to(self.dtype).split([heads, kv_heads, kv_heads], dim=1)
        if norm is not None:
            # One head at a time, or the whole width where the weights are as wide.
            groups = [x.flatten(1).unflatten(1, (-1, len(w))) for x, w in ((q, norm.q), (k, norm.k))]
            q = self._rms_norm(groups[0], norm.q, norm.eps).view(q.shape)
            k = self._rms_norm(groups[1], norm.k, norm.eps).view(k.shape)
        if rope is not None:
            _check_range("positions", positions, len(rope.cos_sin))
            cos, sin = rope.cos_sin[positions.long()].to(self.dtype)[:, None, :].chunk(2, dim=-1)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        q_out.copy_(q)
        page, offset = kv_index // page_size, kv_index % page_size
        for x, into in ((k, k_cache), (v, v_cache)):
            into[page, :, offset] = encode_kv(x, into.dtype)

    def copy_pages(self, k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
        for name, pages in (("source", source), ("target", target)):
            _check_range(name, pages, len(k_cache))
        for cache in (k_cache, v_cache):
            cache[target.long()] = cache[source.long()]

    def feed_back(self, ids: Tensor, kv_len: Tensor, slot: Tensor, last_token: Tensor, stop_ids: Tensor) -> None:
        unknown = ids < 0
        ids[unknown] = last_token[slot[unknown].long()]
        ended = unknown & (stop_ids == ids.unsqueeze(1)).any(dim=1)
        kv_len[ended] = -kv_len[ended]

    def plan_attention(
        self, inputs: AttentionInput, num_heads: int, k_cache: Tensor, window: int = 0
    ) -> tuple[AttentionInput, int]:
        return inputs, window

    def attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: tuple[AttentionInput, int],
        scale: float,
        out: Tensor,
        lse: Tensor,
        softcap: float = 0.0,
    ) -> None:
        inputs, window = plan
        heads = q.shape[1]
        _, kv_heads, page_size, _ = k_cache.shape
        start = inputs.q_start.tolist()
        for i, (kv_len, slot) in enumerate(zip(inputs.kv_len.tolist(), inputs.slot.tolist(), strict=True)):
            tokens = slice(start[i], start[i + 1])
            pages = inputs.page_table[slot, : -(-kv_len // page_size)].long()

            def read(cache: Tensor, pages: Tensor = pages, kv_len: int = kv_len) -> Tensor:  # [kv_len, heads, width]
                rows = cache[pages].transpose(1, 2).flatten(0, 1)[:kv_len]
                return decode_kv(rows, self.dtype).repeat_interleave(heads // kv_heads, dim=1)

            scores = torch.einsum("qhe,khe->hqk", q[tokens].to(self.dtype), read(k_cache)) * scale
            if softcap:
                scores = _softcap(scores, softcap)
            key, query = torch.arange(kv_len), torch.arange(kv_len - (tokens.stop - tokens.start), kv_len)[:, None]
            hidden = (key > query) | (key <= query - window) if window else key > query
            scores.masked_fill_(hidden, -torch.inf)
            out[tokens] = torch.einsum("hqk,khe->qhe", scores.softmax(dim=-1), read(v_cache)).to(out.dtype)
            lse[tokens] = scores.logsumexp(dim=-1).T.to(lse.dtype)

    def sink(self, attn: Tensor, lse: Tensor, sinks: Tensor) -> None:
        lse, sinks = lse.to(self.dtype), sinks.to(self.dtype)
        share = (lse - torch.logaddexp(lse, sinks.expand_as(lse))).exp()
        attn.copy_(attn.to(self.dtype) * share.unsqueeze(-1))

    def copy(self, x: Tensor, out: Tensor) -> None:
        out.copy_(x)

    def attend_texts(
        self, qkv: Tensor, starts: Sequence[int], scale: float, out: Tensor, reach: int | None = None
    ) -> None:
        for begin, end in pairwise(starts):
            q, k, v = qkv[begin:end].to(self.dtype).permute(1, 2, 0, 3)
            place = torch.arange(end - begin)
            far = (place[:, None] - place).abs() > (end - begin if reach is None else reach)
            out[begin:end] = ((scale * q @ k.mT).masked_fill(far, -torch.inf).softmax(-1) @ v).transpose(0, 1)

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        gate, up = gate_up.to(self.dtype).chunk(2, dim=-1)
        out.copy_(gate / (1 + torch.exp(-gate)) * up)

    def gelu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        gate, up = gate_up.to(self.dtype).chunk(2, dim=-1)
        out.copy_(_gelu_tanh(gate) * up)

    def activate(self, kind: Activation, x: Tensor, out: Tensor) -> None:
        x = x.to(self.dtype)
        if kind == "relu":
            out.copy_(x.clamp(min=0))
        elif kind == "gelu":
            out.copy_(0.5 * x * torch.erfc(-x / math.sqrt(2)))
        else:
            out.copy_(_gelu_tanh(x))

    def mix_experts(self, x: Tensor, router: Tensor, experts: Experts, out: Tensor) -> None:
        out.copy_(mix(x.to(self.dtype), router.to(self.dtype), experts, self._product))

    def gather_rows(self, x: Tensor, index: Tensor, out: Tensor) -> None:
        _check_range("index", index, len(x))
        out.copy_(x[index.long()])

    def sample(self, logits: Tensor, inputs: SampleInput) -> SampleOutput:
        return sample(logits, inputs)

    def _product(self, x: Tensor, weight: Tensor | Quantized) -> Tensor:
        """x [T, K] or [K] times the packed weight, transposed."""
        if isinstance(weight, Tensor):
            return x.to(self.dtype) @ weight.T
        return product(x.view(-1, x.shape[-1]), weight, self.dtype).view(*x.shape[:-1], -1)

    def _rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.to(self.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] elements of the heads x [T, heads, E], first half against second half."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _softcap(x: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(x / softcap)


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _check_range(name: str, index: Tensor, limit: int) -> None:
    bad = ((index < 0) | (index >= limit)).nonzero()
    if len(bad):
        i = int(bad[0])
        raise ValueError(f"{name}[{i}]={int(index[i])} is not in [0, {limit})")
