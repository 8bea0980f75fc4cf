"""What a config of DeepSeek says: the sizes of latent attention, and how experts are routed. No torch.

DeepSeek-V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437).
"""

from __future__ import annotations

from dataclasses import replace

from batchinfer.models.architectures import Traits
from batchinfer.models.files import Keys, ModelError
from batchinfer.models.model_spec import ExpertSpec, LatentSpec

METHODS = {"softmax": ("greedy", "group_limited_greedy"), "sigmoid": ("noaux_tc",)}
"""topk_method, by the kind of scores."""


def latent_from_config(keys: Keys) -> LatentSpec:
    """Raises ModelError."""
    rotated = keys.count("qk_rope_head_dim")
    if rotated % 2:
        raise ModelError(f"{keys.where}: qk_rope_head_dim={rotated} must be even")
    return LatentSpec(
        query_rank=keys.count("q_lora_rank") if keys.config.get("q_lora_rank") is not None else 0,
        rank=keys.count("kv_lora_rank"),
        plain=keys.count("qk_nope_head_dim"),
        rotated=rotated,
        values=keys.count("v_head_dim"),
        interleaved=keys.config.get("rope_interleave") is not False,
    )


def routed(experts: ExpertSpec, keys: Keys, traits: Traits) -> ExpertSpec:
    """``experts`` with DeepSeek's routing and shared expert. Raises ModelError."""
    where, method, known = keys.where, keys.config.get("topk_method"), METHODS[traits.scores]
    if method not in known:
        raise ModelError(f"{where}: topk_method={method!r} is not supported; it must be one of {', '.join(known)}")
    for key, allowed in (("scoring_func", traits.scores), ("moe_layer_freq", 1)):
        if keys.config.get(key, allowed) != allowed:
            raise ModelError(f"{where}: {key}={keys.config[key]!r} is not supported; it must be {allowed}")
    if traits.scores == "softmax" and experts.renormalise:
        raise ModelError(f"{where}: norm_topk_prob=True is not supported; it must be false")
    groups = kept = 1
    if method != "greedy":
        groups, kept = keys.count("n_group", 1), keys.count("topk_group", 1)
    size, rest = divmod(experts.count, groups)
    least = 2 if traits.scores == "sigmoid" and kept < groups else 1
    if rest or size < least or kept > groups or experts.per_token > kept * size:
        raise ModelError(
            f"{where}: {experts.per_token} of {experts.count} experts cannot come from topk_group={kept} of "
            f"n_group={groups} groups of equal size"
        )
    return replace(
        experts,
        shared_width=experts.width * keys.count("n_shared_experts") if keys.config.get("n_shared_experts") else 0,
        shared_gate=False,
        scores=traits.scores,
        scale=keys.number("routed_scaling_factor", 1.0),
        correction=traits.scores == "sigmoid",
        groups=groups,
        kept_groups=kept,
    )
