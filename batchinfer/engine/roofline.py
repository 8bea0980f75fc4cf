"""The least time that steps can take: what the model must compute and read, against what the device can.

Williams, Waterman & Patterson, "Roofline: an insightful visual performance model for multicore architectures", Comm.
ACM 52 (2009). No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    of the weights that every step reads, and of the keys and values of one position. Of a mixture: how many experts a
    layer has, through how many a token goes, and the bytes of one in all layers together."""

    token_flops: int
    sample_flops: int
    pair_flops: int
    weight_bytes: float
    kv_bytes: int
    experts: int = 0
    per_token: int = 0
    expert_bytes: float = 0

    @classmethod
    def of(cls, spec: ModelSpec, itemsize: int) -> Costs:
        """``itemsize``: bytes of a weight, and of an entry of the cache. Sliding windows are left out: beyond them,
        models that have some can be faster than this."""
        every = spec.layers * _attention_weights(spec) + sum(_mlp_weights(spec, i) for i in range(spec.layers))
        output = spec.vocab_size * spec.width
        costs = cls(
            token_flops=2 * every,
            sample_flops=2 * output,
            pair_flops=4 * spec.layers * spec.heads * spec.head_dim,
            weight_bytes=itemsize * (every + output),
            kv_bytes=2 * itemsize * spec.layers * spec.kv_heads * spec.head_dim,
        )
        if spec.experts is None:
            return costs
        count, chosen = spec.experts.count, spec.experts.per_token
        one = 3 * spec.width * spec.experts.width * sum(spec.experts.layers)
        with_chosen = costs.token_flops + 2 * chosen * one
        return replace(costs, token_flops=with_chosen, experts=count, per_token=chosen, expert_bytes=itemsize * one)

    def quantised(self, nbytes: int) -> Costs:
        """The same, of weights that take ``nbytes`` without the embedding, all experts among them."""
        share = nbytes / (self.weight_bytes + self.experts * self.expert_bytes)
        return replace(self, weight_bytes=share * self.weight_bytes, expert_bytes=share * self.expert_bytes)

    def step(self, tokens: int, samples: int, context: int, pairs: int) -> tuple[float, float]:
        """Operations and bytes read of a step, at least, unless sequences that share pages read them together, or
        tokens of a mixture agree on their experts. Arguments as the fields of StepWork."""
        flops = tokens * self.token_flops + samples * self.sample_flops + pairs * self.pair_flops
        read = self.weight_bytes + context * self.kv_bytes
        if self.experts:
            read += distinct_experts(tokens, self.experts, self.per_token) * self.expert_bytes
        return flops, read


def _attention_weights(spec: ModelSpec) -> int:
    latent = spec.latent
    if latent is None:
        return spec.width * spec.head_dim * 2 * (spec.heads + spec.kv_heads)
    queries = spec.heads * (latent.plain + latent.rotated) * (latent.query_rank or spec.width)
    shared = spec.width * (latent.query_rank + latent.rank + latent.rotated)
    return queries + shared + spec.heads * ((latent.plain + latent.values) * latent.rank + latent.values * spec.width)


def _mlp_weights(spec: ModelSpec, layer: int) -> int:
    """Weights of a layer's MLP that every token meets."""
    experts = spec.experts
    if experts is None or not spec.mixed(layer):
        return (2 + spec.gated) * spec.width * spec.mlp_width
    return spec.width * (3 * experts.shared_width + experts.logits)


def distinct_experts(tokens: int, experts: int, per_token: int) -> float:
    """How many of a layer's experts a step of ``tokens`` tokens is expected to read, where each chooses as it likes and
    all experts are liked alike. A trained router likes some more, and fewer are read."""
    return experts * (1 - (1 - per_token / experts) ** tokens)


def least_seconds(work: StepWork, ceilings: Ceilings) -> float:
    """No schedule of these steps is faster."""
    return max(work.least_flops / ceilings.flops, work.least_bytes / ceilings.bandwidth)


def roofline_share(work: StepWork, ceilings: Ceilings) -> float:
    """Of the time that the device took for the steps, what no device could have saved."""
    return least_seconds(work, ceilings) / work.seconds if work.seconds else 0.0
