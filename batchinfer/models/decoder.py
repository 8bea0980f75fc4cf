"""The one decoder, driven by ModelSpec: a step of tokens in, logits of the sampled rows or pooled states out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchinfer.models.latent import LATENT_NORM_EPS, LatentInput, LatentOutput
from batchinfer.models.layers import (
    Attention,
    Copies,
    Layer,
    Linear,
    Mixture,
    Mlp,
    Norm,
    Workspace,
    attend,
    feed,
    keep_rows,
    normed,
    project,
)
from batchinfer.models.lora import NO_ADAPTERS, AdapterRows, Adapters
from batchinfer.models.model_spec import ExpertSpec, LatentSpec, LayerKind, ModelSpec
from batchinfer.ops import AttentionInput, Experts, HeadNorm, Ops, Rope
from batchinfer.ops.quantized import kv_row
from batchinfer.types import Pooling

Plans = dict[int, Any]
"""Of attention in a step, by the layers' window."""


@dataclass(frozen=True)
class ScoreInput:
    """M tokens of a step, ``row`` int32 [M], and what the text goes on with after each, ``token`` int64 [M]; ``wide``:
    how many of the most likely tokens are wanted beside it."""

    row: Tensor
    token: Tensor
    wide: int = 1


@dataclass(frozen=True)
class Scores:
    """Log-probabilities (natural log) after M tokens: ``chosen`` float32 [M] of the token that was given, ``top``
    float32 [M, K] of the most likely ones, whose ids are ``top_ids`` int64 [M, K], most likely first."""

    chosen: Tensor
    top_ids: Tensor
    top: Tensor


@dataclass(frozen=True)
class StepInput:
    """One step: T tokens of S sequences, N of which are sampled from.

    ``token_ids``, ``positions`` int32 [T]; ``kv_index`` int64 [T], the token's place in the cache (page * page size +
    offset); ``sample_row`` int32 [N], which of the T tokens. ``score`` and ``copies`` are None in most steps.
    ``adapters``: the rows that do not go through the base model alone.
    """

    token_ids: Tensor
    positions: Tensor
    kv_index: Tensor
    attention: AttentionInput
    sample_row: Tensor
    score: ScoreInput | None = None
    adapters: AdapterRows = NO_ADAPTERS
    copies: Copies | None = None


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all pages: per layer one tensor [P, G, B, E] each, or of int8 [P, G, B, E + 4].

    Layers with a sliding window keep all positions too: pages belong to all layers together, and so does a prefix.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]

    @staticmethod
    def bytes_per_page(spec: ModelSpec, page_size: int, dtype: torch.dtype) -> int:
        """Memory of one page over all layers, in a cache of ``dtype``."""
        return 2 * spec.layers * spec.kv_heads * page_size * kv_row(spec.head_dim, dtype) * dtype.itemsize


class Decoder:
    """Holds packed weights, adapters, the rope table and the workspace; the cache is the caller's.

    ``weights`` are what :func:`batchinfer.models.packing.pack` makes, with the names in ``adapters`` for ``adapted``. A
    step has at most ``max_step_tokens`` tokens at positions below ``max_positions``, and samples from at most
    ``max_samples``. ``pooling`` None: it is asked for :meth:`forward`, else for :meth:`pool`. ``kv_dtype`` None: the
    cache has ``dtype`` too.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Any],
        ops: Ops,
        dtype: torch.dtype,
        max_positions: int,
        max_step_tokens: int,
        max_samples: int,
        pooling: Pooling | None = None,
        adapters: Mapping[str, Adapters] | None = None,
        kv_dtype: torch.dtype | None = None,
    ):
        self.spec, self.ops, self.dtype, self.pooling = spec, ops, dtype, pooling
        self.kv_dtype = kv_dtype or dtype
        self.adapted = bool(adapters)
        self.layers, self.embed, self.positions, self.norm, self.head = _assemble(spec, weights, adapters or {})
        self.kinds = spec.layer_kinds(max_positions)
        self.different_kinds = tuple(dict.fromkeys(self.kinds))
        tables = {"global": spec.rope, "local": spec.local_rope}
        self.ropes = {
            name: Rope(torch.from_numpy(rope.table(max_positions)).to(ops.device))
            for name, rope in tables.items()
            if rope is not None
        }
        self.max_positions, self.max_step_tokens, self.max_samples = max_positions, max_step_tokens, max_samples
        self.workspace = Workspace.allocate(spec, max_step_tokens, ops, dtype)
        self.sampled = Workspace.allocate(spec, max_samples, ops, dtype)
        values = {"tokens": spec.vocab_size, "classes": spec.classes, "hidden": 0}[spec.head]
        self.logits = torch.empty(max_samples, values, dtype=torch.float32, device=ops.device)

    def new_cache(self, num_pages: int, page_size: int) -> KVCache:
        """A cache of zeros."""
        shape = (num_pages, self.spec.kv_heads, page_size, kv_row(self.spec.head_dim, self.kv_dtype))
        k, v = (tuple(self.ops.zeros(shape, self.kv_dtype) for _ in range(self.spec.layers)) for _ in "kv")
        return KVCache(k, v)

    def plans(self, step: StepInput, cache: KVCache) -> Plans:
        """The step's attention plans."""
        return {
            window: self.ops.plan_attention(step.attention, self.spec.heads, cache.k[0], window)
            for window in {kind.window for kind in self.different_kinds}
        }

    def forward(self, step: StepInput, cache: KVCache, plans: Plans | None = None) -> tuple[Tensor, Scores | None]:
        """Logits float32 [N, V] of the sampled rows, a view that the next call overwrites; and the scores that the step
        asks for. Writes the step's keys and values to ``cache``. ``plans``: those of the step, if they are made."""
        w = self._layers(step, cache, plans, whole=step.score is not None)
        if w is None:
            return self.logits[:0], None
        normed(self.ops, self.norm, w, pending=True)
        if step.score is None:
            return self._logits(w.x), None
        scores = self._score(w.x, step.score)
        return self._logits_of(w.x, step.sample_row), scores

    def pool(self, step: StepInput, cache: KVCache) -> Tensor:
        """What the step adds to its sequences' pooled states. Pooling "last": float32 [N, width], the final hidden
        states of the sampled rows, or [N, classes] with a head. "cls": float32 [S, width], that of each sequence's
        first token in the step. "mean": float64 [S, width], the sum over its tokens in the step, so exact that it does
        not matter where a text was cut. Writes keys and values as :meth:`forward` does."""
        w = self._layers(step, cache, None, whole=self.pooling != "last")
        if w is None:
            return self.logits[:0]
        if self.spec.head != "hidden":
            return self._logits(normed(self.ops, self.norm, w, pending=True)).clone()
        states = w.delta  # of the dtype of activations, which w.x may be shorter than
        self.norm(self.ops, w.delta, states, w.residual)
        starts = step.attention.q_start
        if self.pooling == "cls":
            return states.index_select(0, starts[:-1].clamp(max=len(states) - 1)).float()
        if self.pooling == "mean":
            return torch.segment_reduce(states.double(), "sum", offsets=starts.long(), axis=0)
        return states.to(torch.float32, copy=True)

    def _layers(self, step: StepInput, cache: KVCache, plans: Plans | None, whole: bool) -> Workspace | None:
        """What is left for the last norm to read: of all tokens if ``whole``, else of the sampled ones; None if there
        are none of these."""
        ops, spec, w = self.ops, self.spec, self.workspace.first(len(step.token_ids))
        attention, rows = self._attention(step, plans or self.plans(step, cache)), step.adapters.tokens
        ops.embed(step.token_ids, self.embed, w.residual, spec.embed_scale)
        if self.positions is not None:
            ops.embed(step.positions, self.positions, w.delta)
        for i, layer in enumerate(self.layers):
            # What was left in w.delta is added to the residual first.
            x = normed(ops, layer.attn_norm, w, pending=i > 0 or self.positions is not None)
            attend(ops, layer, x, w, attention[self.kinds[i]], cache.k[i], cache.v[i], rows)
            if i == spec.layers - 1 and not whole:
                # All keys and values are in the cache: from here on only the sampled rows matter.
                if not len(step.sample_row):
                    return None
                w, rows = keep_rows(ops, w, step.sample_row, self.sampled), step.adapters.samples
            if spec.parallel:
                feed(ops, spec, layer, normed(ops, layer.mlp_norm, w, pending=False), w, rows)
                project(ops, layer, w, w.y, rows)
                ops.add(w.y, w.residual)
            else:
                project(ops, layer, w, w.delta, rows)
                feed(ops, spec, layer, normed(ops, layer.mlp_norm, w, pending=True), w, rows)
        return w

    def _attention(self, step: StepInput, plans: Plans) -> dict[LayerKind, Attention]:
        """What the layers of each kind need of the step."""
        spec = self.spec
        scale = spec.score_scale or spec.head_dim**-0.5
        return {
            kind: Attention(
                step.positions,
                step.kv_index,
                plans[kind.window],
                self.ropes.get(kind.rope),
                scale,
                spec.score_softcap,
                step.copies,
            )
            for kind in self.different_kinds
        }

    def _logits(self, x: Tensor) -> Tensor:
        logits = self.logits[: len(x)]
        self.ops.linear(x, self.head, logits)
        if self.spec.logit_softcap:
            self.ops.softcap(logits, self.spec.logit_softcap)
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
            top, top_ids = (
                logits.max(1, keepdim=True) if score.wide == 1 else logits.topk(min(score.wide, logits.shape[1]))
            )
            slices.append((logits.gather(1, token.unsqueeze(1)).squeeze(1) - total, top_ids, top - total.unsqueeze(1)))
        return Scores(*(torch.cat(parts) for parts in zip(*slices, strict=True)))


def _experts(spec: ExpertSpec, got: Mapping[str, Any], prefix: str) -> Experts:
    """Of the layer whose weights' names begin with ``prefix``."""
    parts = ("gate_up", "down")
    gate_up, down = (tuple(got[f"{prefix}experts.{j}.{part}"] for j in range(len(spec.widths))) for part in parts)
    biases: dict[str, Tensor] = {}
    if spec.stacked:
        for part in parts:
            each = [got[f"{prefix}experts.{j}.{part}_bias"] for j in range(spec.count)]
            biases[f"{part}_bias"] = torch.stack(each)
    return Experts(
        gate_up,
        down,
        spec.widths,
        spec.per_token,
        spec.renormalise,
        shared=spec.shared_width > 0,
        shared_gate=spec.shared_gate,
        scores=spec.scores,
        scale=spec.scale,
        correction=got.get(prefix + "router_correction"),
        groups=spec.groups,
        kept_groups=spec.kept_groups,
        clamp=spec.clamp,
        **biases,
    )


def _assemble(spec: ModelSpec, got: Mapping[str, Any], adapters: Mapping[str, Adapters]) -> tuple:
    """(layers, embedding [V, D], table of positions or None, final norm, packed head or None)."""

    def linear(name: str) -> Linear:
        return Linear(got[name], got.get(f"{name}_bias"), adapters.get(name))

    def norm(name: str, scale: float = 1.0) -> Norm | None:
        weight = got.get(name)
        if weight is None:
            return None
        return Norm(weight * scale, got.get(f"{name}_bias"), spec.norm_eps, spec.layer_norm)

    def latent(prefix: str, sizes: LatentSpec) -> tuple[LatentInput, LatentOutput]:
        heads, width = spec.heads, spec.head_dim
        q_a, q_norm = None, None
        if sizes.query_rank:
            q_a, q_norm = linear(prefix + "q_a"), Norm(got[prefix + "q_a_norm"], None, LATENT_NORM_EPS)
        kv_norm = Norm(got[prefix + "kv_a_norm"], None, LATENT_NORM_EPS)
        q_b, kv_a, kv_b = (linear(prefix + name) for name in ("q_b", "kv_a", "kv_b"))
        reads = LatentInput(sizes, heads, width, q_a, q_norm, q_b, kv_a, kv_norm, kv_b)
        return reads, LatentOutput(linear(prefix + "o"), heads, sizes.values)

    def mlp(prefix: str, layer: int) -> Mlp | Mixture:
        if spec.experts is None or not spec.mixed(layer):
            return Mlp(linear(prefix + "gate_up"), linear(prefix + "down"))
        return Mixture(linear(prefix + "router"), _experts(spec.experts, got, prefix))

    layers = []
    for i in range(spec.layers):
        prefix = f"layers.{i}."
        heads = HeadNorm(got[prefix + "q_norm"], got[prefix + "k_norm"], spec.norm_eps) if spec.qk_norm else None
        qkv, o = latent(prefix, spec.latent) if spec.latent else (linear(prefix + "qkv"), linear(prefix + "o"))
        layers.append(
            Layer(
                attn_norm=norm(prefix + "attn_norm"),
                qkv=qkv,
                head_norm=heads,
                o=o,
                attn_post_norm=norm(prefix + "attn_post_norm"),
                mlp_norm=norm(prefix + "mlp_norm"),
                mlp=mlp(prefix, i),
                mlp_post_norm=norm(prefix + "mlp_post_norm"),
                sinks=got.get(prefix + "sinks"),
            )
        )
    # The head is linear, so a scale of its logits may as well stand in the norm before it.
    positions = got["positions"][spec.position_offset :] if spec.position_rows else None
    head = got.get("lm_head", got.get("classes"))
    return tuple(layers), got["embed"], positions, norm("norm", spec.logit_scale), head
