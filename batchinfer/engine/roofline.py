"""The least time that steps can take: what the model must compute and read, against what the device can.

Williams, Waterman & Patterson, "Roofline: an insightful visual performance model for multicore architectures", Comm.
ACM 52 (2009). No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchinfer.models.model_spec import ModelSpec
from batchinfer.types import StepWork


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: floating-point operations a second in matrix products, bytes a second from its memory."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Costs:
    """Of a model: operations for each token in the layers, for each token sampled and for each (query, key) pair; bytes
    of the weights that every step reads, and of the keys and values of one position."""

    token_flops: int
    sample_flops: int
    pair_flops: int
    weight_bytes: int
    kv_bytes: int

    @classmethod
    def of(cls, spec: ModelSpec, itemsize: int) -> Costs:
        """``itemsize``: bytes of a weight, and of an entry of the cache. Of a mixture of experts, what one token goes
        through. Sliding windows are left out: beyond them, models that have some can be faster than this."""
        layers = spec.layers * _attention_weights(spec) + sum(_mlp_weights(spec, i) for i in range(spec.layers))
        output = spec.vocab_size * spec.width
        return cls(
            token_flops=2 * layers,
            sample_flops=2 * output,
            pair_flops=4 * spec.layers * spec.heads * spec.head_dim,
            weight_bytes=itemsize * (layers + output),
            kv_bytes=2 * itemsize * spec.layers * spec.kv_heads * spec.head_dim,
        )


def _attention_weights(spec: ModelSpec) -> int:
    latent = spec.latent
    if latent is None:
        return spec.width * spec.head_dim * 2 * (spec.heads + spec.kv_heads)
    queries = spec.heads * (latent.plain + latent.rotated) * (latent.query_rank or spec.width)
    shared = spec.width * (latent.query_rank + latent.rank + latent.rotated)
    return queries + shared + spec.heads * ((latent.plain + latent.values) * latent.rank + latent.values * spec.width)


def _mlp_weights(spec: ModelSpec, layer: int) -> int:
    """Weights of a layer's MLP that a token meets."""
    experts = spec.experts
    if experts is None or not spec.mixed(layer):
        return (2 + spec.gated) * spec.width * spec.mlp_width
    return spec.width * (3 * (experts.per_token * experts.width + experts.shared_width) + experts.logits)


def least_seconds(work: StepWork, costs: Costs, ceilings: Ceilings) -> float:
    """No schedule of these steps is faster, unless sequences that share pages read them together."""
    flops = work.tokens * costs.token_flops + work.samples * costs.sample_flops + work.pairs * costs.pair_flops
    read = work.steps * costs.weight_bytes + work.context * costs.kv_bytes
    return max(flops / ceilings.flops, read / ceilings.bandwidth)
