"""The plain torch truth of every op: what ``batchinfer.ops`` promises, in as few lines as possible.

It is the specification that compiled backends are tested against, and a complete, slow backend by itself. Sums are
taken in the compute dtype; with float32 a row's last bits may depend on the other rows of a call, because torch's
matrix product promises no order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer.ops import AttentionInput, HeadNorm, Rope, SampleInput, SampleOutput
from batchinfer.ops.reference_sampler import sample


class ReferenceOps:
    """All ops of :class:`batchinfer.ops.Ops`. Computes in ``dtype`` and rounds once, into the given output."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.dtype = dtype
        self.device = torch.device("cpu")

    def activations(self, weights: torch.dtype) -> torch.dtype:
        return torch.float32

    def linear_inputs(self, weights: torch.dtype) -> torch.dtype:
        return torch.float32

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def pack_weight(self, weight: Tensor, gated: bool = False) -> Tensor:
        return weight.to(self.dtype)

    def linear(self, x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        y = x.to(self.dtype) @ weight.T
        out.copy_(y if bias is None else y + bias)

    def gated_linear(self, x: Tensor, weight: Tensor, out: Tensor, sums: Tensor, bias: Tensor | None = None) -> None:
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
            q = self._rms_norm(q, norm.q, norm.eps)
            k = self._rms_norm(k, norm.k, norm.eps)
        if rope is not None:
            _check_range("positions", positions, len(rope.cos_sin))
            cos, sin = rope.cos_sin[positions.long()].to(self.dtype)[:, None, :].chunk(2, dim=-1)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        q_out.copy_(q)
        page, offset = kv_index // page_size, kv_index % page_size
        k_cache[page, :, offset] = k.to(k_cache.dtype)
        v_cache[page, :, offset] = v.to(v_cache.dtype)

    def plan_attention(self, inputs: AttentionInput, num_heads: int, k_cache: Tensor) -> AttentionInput:
        return inputs

    def attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionInput, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        _, heads, width = q.shape
        _, kv_heads, page_size, _ = k_cache.shape
        start = plan.q_start.tolist()
        for i, (kv_len, slot) in enumerate(zip(plan.kv_len.tolist(), plan.slot.tolist(), strict=True)):
            tokens = slice(start[i], start[i + 1])
            pages = plan.page_table[slot, : -(-kv_len // page_size)].long()

            def read(cache: Tensor, pages: Tensor = pages, kv_len: int = kv_len) -> Tensor:  # [kv_len, heads, width]
                rows = cache[pages].transpose(1, 2).reshape(-1, kv_heads, width)[:kv_len]
                return rows.to(self.dtype).repeat_interleave(heads // kv_heads, dim=1)

            scores = torch.einsum("qhe,khe->hqk", q[tokens].to(self.dtype), read(k_cache)) * scale
            position = torch.arange(kv_len - (tokens.stop - tokens.start), kv_len)
            scores.masked_fill_(torch.arange(kv_len) > position[:, None], -torch.inf)
            out[tokens] = torch.einsum("hqk,khe->qhe", scores.softmax(dim=-1), read(v_cache)).to(out.dtype)
            lse[tokens] = scores.logsumexp(dim=-1).T.to(lse.dtype)

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        gate, up = gate_up.to(self.dtype).chunk(2, dim=-1)
        out.copy_(gate / (1 + torch.exp(-gate)) * up)

    def gather_rows(self, x: Tensor, index: Tensor, out: Tensor) -> None:
        _check_range("index", index, len(x))
        out.copy_(x[index.long()])

    def sample(self, logits: Tensor, inputs: SampleInput) -> SampleOutput:
        return sample(logits, inputs)

    def _rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.to(self.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] elements of the heads x [T, heads, E], first half against second half."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _check_range(name: str, index: Tensor, limit: int) -> None:
    bad = ((index < 0) | (index >= limit)).nonzero()
    if len(bad):
        i = int(bad[0])
        raise ValueError(f"{name}[{i}]={int(index[i])} is not in [0, {limit})")
