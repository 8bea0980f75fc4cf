"""The one decoder of the Llama family, driven by ModelSpec: a step of tokens in, logits of the sampled rows out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.models.layers import Attention, Layer, Linear, Workspace, attend, keep_rows, mlp, project
from batchinfer.models.spec import ModelSpec
from batchinfer.ops import AttentionInput, HeadNorm, Ops, Rope


@dataclass(frozen=True)
class ScoreInput:
    """M tokens of a step, ``row`` int32 [M], and what the text goes on with after each, ``token`` int64 [M]."""

    row: Tensor
    token: Tensor


@dataclass(frozen=True)
class Scores:
    """Log-probabilities (natural log) after M tokens: ``chosen`` float32 [M] of the token that was given, ``top``
    float32 [M] of the most likely one, whose id is ``top_id`` int64 [M]."""

    chosen: Tensor
    top_id: Tensor
    top: Tensor


@dataclass(frozen=True)
class StepInput:
    """One step: T tokens of S sequences, N of which are sampled from.

    ``token_ids``, ``positions`` int32 [T]; ``kv_index`` int64 [T], the token's place in the cache (page * page size +
    offset); ``sample_row`` int32 [N], which of the T tokens. ``score`` is None in most steps.
    """

    token_ids: Tensor
    positions: Tensor
    kv_index: Tensor
    attention: AttentionInput
    sample_row: Tensor
    score: ScoreInput | None = None


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all pages: per layer one tensor [P, G, B, E] each, in the engine's dtype."""

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]

    @staticmethod
    def bytes_per_page(spec: ModelSpec, page_size: int, dtype: torch.dtype) -> int:
        """Memory of one page over all layers."""
        return 2 * spec.layers * spec.kv_heads * page_size * spec.head_dim * dtype.itemsize


class Decoder:
    """Holds packed weights, the rope table and the workspace; the cache is the caller's.

    ``weights`` yields (name, tensor) as :func:`batchinfer.models.weights.load_weights` does and is used up tensor by
    tensor. A step has at most ``max_step_tokens`` tokens at positions below ``max_positions``, and samples from at most
    ``max_samples``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Iterable[tuple[str, Tensor]],
        ops: Ops,
        dtype: torch.dtype,
        max_positions: int,
        max_step_tokens: int,
        max_samples: int,
    ):
        self.spec, self.ops, self.dtype = spec, ops, dtype
        self.layers, self.embed, self.norm, self.head = _assemble(spec, weights, ops)
        self.rope = Rope(torch.from_numpy(spec.rope.table(max_positions)).to(ops.device))
        self.max_positions, self.max_step_tokens = max_positions, max_step_tokens
        self.workspace = Workspace.allocate(spec, max_step_tokens, ops, dtype)
        self.sampled = Workspace.allocate(spec, max_samples, ops, dtype)
        self.logits = torch.empty(max_samples, spec.vocab_size, dtype=torch.float32, device=ops.device)

    def new_cache(self, num_pages: int, page_size: int) -> KVCache:
        """A cache of zeros."""
        shape = (num_pages, self.spec.kv_heads, page_size, self.spec.head_dim)
        k, v = (tuple(self.ops.zeros(shape, self.dtype) for _ in range(self.spec.layers)) for _ in "kv")
        return KVCache(k, v)

    def forward(self, step: StepInput, cache: KVCache) -> tuple[Tensor, Scores | None]:
        """Logits float32 [N, V] of the sampled rows, a view that the next call overwrites; and the scores that the step
        asks for. Writes the step's keys and values to ``cache``."""
        ops, spec, w = self.ops, self.spec, self.workspace.first(len(step.token_ids))
        plan = ops.plan_attention(step.attention, spec.heads, cache.k[0])
        attention = Attention(step.positions, step.kv_index, plan, self.rope, spec.head_dim**-0.5)
        ops.embed(step.token_ids, self.embed, w.residual)
        for i, layer in enumerate(self.layers):
            # Each norm first adds w.delta to the residual; the first one finds the embedding there.
            ops.rms_norm(w.delta if i else w.residual, layer.attn_norm, spec.norm_eps, w.x, w.residual if i else None)
            attend(ops, layer, w, attention, cache.k[i], cache.v[i])
            if i == spec.layers - 1 and step.score is None:
                # All keys and values are in the cache: from here on only the sampled rows matter.
                if not len(step.sample_row):
                    return self.logits[:0], None
                w = keep_rows(ops, w, step.sample_row, self.sampled)
            project(ops, layer, w)
            ops.rms_norm(w.delta, layer.mlp_norm, spec.norm_eps, w.x, w.residual)
            mlp(ops, layer, w)
        ops.rms_norm(w.delta, self.norm, spec.norm_eps, w.x, w.residual)
        if step.score is None:
            return self._logits(w.x), None
        scores = self._score(w.x, step.score)
        return self._logits_of(w.x, step.sample_row), scores

    def _logits(self, x: Tensor) -> Tensor:
        logits = self.logits[: len(x)]
        self.ops.linear(x, self.head, logits)
        return logits

    def _logits_of(self, x: Tensor, row: Tensor) -> Tensor:
        kept = self.sampled.first(len(row)).x
        self.ops.gather_rows(x, row, kept)
        return self._logits(kept)

    def _score(self, x: Tensor, score: ScoreInput) -> Scores:
        """Through the LM head slice by slice: memory for [max_samples, V], not for [M, V]."""
        slices = []
        for row, token in zip(score.row.split(len(self.logits)), score.token.split(len(self.logits)), strict=True):
            logits = self._logits_of(x, row)
            total = logits.logsumexp(1)
            top, top_id = logits.max(1)
            slices.append((logits.gather(1, token.unsqueeze(1)).squeeze(1) - total, top_id, top - total))
        return Scores(*(torch.cat(parts) for parts in zip(*slices, strict=True)))


def _assemble(spec: ModelSpec, weights: Iterable[tuple[str, Tensor]], ops: Ops) -> tuple:
    """(layers, embedding [V, D], final norm, packed LM head). A matrix is packed as it comes."""
    got = {
        name: ops.pack_weight(t, gated=name.endswith(".gate_up"))
        if t.ndim == 2 and name != "embed"
        else t.to(ops.device)
        for name, t in weights
    }
    head = got.get("lm_head") if not spec.tied_embeddings else ops.pack_weight(got["embed"])

    def linear(name: str) -> Linear:
        return Linear(got[name], got.get(f"{name}_bias"))

    layers = []
    for prefix in (f"layers.{i}." for i in range(spec.layers)):
        norm = HeadNorm(got[prefix + "q_norm"], got[prefix + "k_norm"], spec.norm_eps) if spec.qk_norm else None
        layers.append(
            Layer(
                attn_norm=got[prefix + "attn_norm"],
                qkv=linear(prefix + "qkv"),
                head_norm=norm,
                o=linear(prefix + "o"),
                mlp_norm=got[prefix + "mlp_norm"],
                gate_up=linear(prefix + "gate_up"),
                down=linear(prefix + "down"),
            )
        )
    return tuple(layers), got["embed"], got["norm"], head
