"""Random small configs of every architecture: what a config may say, drawn by a seed or by hypothesis."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

VOCAB, POSITIONS = 64, 96
CONFIGS = 20
"""Of each architecture, at least, and as many of each of its rope types. All take 40 s of one core."""

BOOLEANS = (True, False)
WINDOWS = (None, 5, 17, 40, 200)
BIASES = {"attention_bias": BOOLEANS, "mlp_bias": BOOLEANS}
EXPERTS = {"num_experts": (3, 8), "num_experts_per_tok": (1, 3), "moe_intermediate_size": (24, 40)}
LATENT = {"q_lora_rank": (None, 24), "kv_lora_rank": (16, 40), "v_head_dim": (8, 24), "n_shared_experts": (1, 2)}
LATENT |= {"qk_nope_head_dim": (8, 24), "qk_rope_head_dim": (8, 16), "first_k_dense_replace": (0, 1, 2)}
LATENT |= {"n_routed_experts": (8,), "num_experts_per_tok": (1, 3), "moe_intermediate_size": (24, 40)}
LATENT |= {"routed_scaling_factor": (1.0, 2.5)}
LATE = {"use_sliding_window": BOOLEANS, "sliding_window": (6, 30), "max_window_layers": (0, 1)}
SQUARE = ("head_dim", "num_key_value_heads")
"""Keys that a family lacks: its heads are as wide as they fit, and as many for keys as for queries."""


@dataclass(frozen=True)
class Family:
    """``model``: its name in transformers. ``choices``: config key -> the values to draw from. ``ropes``: kinds of
    scaling that it takes. ``without``: common keys that it lacks; ``names``: those with another name."""

    model: str
    choices: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    ropes: tuple[str, ...] = ("default",)
    without: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)

    @property
    def configs_of_a_rope_type(self) -> int:
        return -(-CONFIGS // (len(self.ropes) or 1))


ALL_ROPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
GEMMA = {"attention_bias": BOOLEANS}
CAPS = {"attn_logit_softcapping": (2.0, None), "final_logit_softcapping": (1.5, None), "sliding_window": (5, 17, 200)}

FAMILIES = {
    "LlamaForCausalLM": Family("Llama", BIASES, ALL_ROPES),
    "MistralForCausalLM": Family("Mistral", {"sliding_window": WINDOWS}, ALL_ROPES),
    "MixtralForCausalLM": Family(
        "Mixtral", {"sliding_window": WINDOWS, "num_local_experts": (3, 8), "num_experts_per_tok": (1, 2)}, ALL_ROPES
    ),
    "Qwen2ForCausalLM": Family("Qwen2", LATE, ALL_ROPES),
    "Qwen2MoeForCausalLM": Family(
        "Qwen2Moe",
        LATE
        | EXPERTS
        | {"shared_expert_intermediate_size": (16, 56), "qkv_bias": BOOLEANS, "decoder_sparse_step": (1, 2)},
        ALL_ROPES,
    ),
    "Qwen3ForCausalLM": Family("Qwen3", LATE | {"attention_bias": BOOLEANS}, ALL_ROPES),
    "Qwen3MoeForCausalLM": Family(
        "Qwen3Moe", EXPERTS | {"norm_topk_prob": BOOLEANS, "mlp_only_layers": ([], [1])}, ALL_ROPES
    ),
    "GemmaForCausalLM": Family("Gemma", GEMMA, ALL_ROPES),
    "Gemma2ForCausalLM": Family("Gemma2", GEMMA | CAPS | {"query_pre_attn_scalar": (16, 50)}, ALL_ROPES),
    "Gemma3ForCausalLM": Family(
        "Gemma3Text",
        GEMMA
        | CAPS
        | {"attn_logit_softcapping": (None,), "query_pre_attn_scalar": (16, 50), "sliding_window_pattern": (2, 3)},
        ALL_ROPES,
    ),
    "Phi3ForCausalLM": Family("Phi3", {"sliding_window": WINDOWS}, ("default", "longrope"), ("head_dim",)),
    "Olmo2ForCausalLM": Family("Olmo2", {"attention_bias": BOOLEANS}, ALL_ROPES, ("head_dim",)),
    "GraniteForCausalLM": Family(
        "Granite",
        BIASES
        | {
            "embedding_multiplier": (1.0, 12.0),
            "residual_multiplier": (0.22, 1.0),
            "attention_multiplier": (0.1, 0.5),
            "logits_scaling": (1.0, 8.0),
        },
        ALL_ROPES,
        ("head_dim",),
    ),
    "SmolLM3ForCausalLM": Family(
        "SmolLM3",
        BIASES | {"no_rope_layer_interval": (2, 3), "use_sliding_window": BOOLEANS, "sliding_window": (6, 30)},
        ALL_ROPES,
        ("head_dim",),
    ),
    "Starcoder2ForCausalLM": Family(
        "Starcoder2", {"use_bias": BOOLEANS, "sliding_window": WINDOWS}, ALL_ROPES, ("head_dim",)
    ),
    "GptOssForCausalLM": Family(
        "GptOss",
        {
            "attention_bias": BOOLEANS,
            "sliding_window": (5, 17, 200),
            "num_local_experts": (3, 8),
            "num_experts_per_tok": (1, 3),
        },
        ALL_ROPES,
    ),
    "DeepseekV2ForCausalLM": Family(
        "DeepseekV2",
        LATENT | {"topk_method": ("greedy", "group_limited_greedy"), "n_group": (2,), "topk_group": (1,)},
        ALL_ROPES,
        SQUARE,
    ),
    "DeepseekV3ForCausalLM": Family(
        "DeepseekV3",
        LATENT
        | {"n_group": (1, 2), "topk_group": (1,), "norm_topk_prob": BOOLEANS, "rope_interleave": BOOLEANS}
        | {"attention_bias": BOOLEANS, "num_key_value_heads": (None,)},
        ALL_ROPES,
        SQUARE,
    ),
    "GPT2LMHeadModel": Family(
        "GPT2",
        {"activation_function": ("gelu_new", "gelu", "relu")},
        (),
        SQUARE,
        {
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
        },
    ),
    "GPTNeoXForCausalLM": Family(
        "GPTNeoX",
        {"use_parallel_residual": BOOLEANS, "attention_bias": BOOLEANS, "rotary_pct": (0.25, 0.5, 1.0)},
        ALL_ROPES,
        SQUARE,
    ),
    "OPTForCausalLM": Family(
        "OPT",
        {"enable_bias": BOOLEANS, "activation_function": ("relu", "gelu")},
        (),
        SQUARE,
        {"intermediate_size": "ffn_dim"},
    ),
}


def draw_config(architecture: str, seed: int) -> Any:
    """The ``seed``-th transformers config of the architecture."""
    rng = Random(f"{architecture} {seed}")
    return config_of(architecture, rng.choice(FAMILIES[architecture].ropes or ("",)), rng)


def config_of(architecture: str, rope: str, rng: Random) -> Any:
    """A transformers config of the architecture with this rope type, "" where positions are not rotated."""
    import transformers

    family = FAMILIES[architecture]
    groups = rng.choice((1, 2, 3))
    heads, head_dim = groups * rng.choice((1, 2, 4)), rng.choice((8, 16, 24, 32))
    common = {
        "vocab_size": VOCAB,
        "hidden_size": heads * head_dim if "head_dim" in family.without else heads * rng.choice((8, 12)),
        "intermediate_size": rng.choice((40, 64)),
        "num_hidden_layers": rng.choice((2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": rng.choice(BOOLEANS),
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    given = {family.names.get(key, key): value for key, value in common.items() if key not in family.without}
    given |= {key: rng.choice(values) for key, values in family.choices.items()}
    if family.model == "OPT":
        given["word_embed_proj_dim"] = given["hidden_size"]
    if rope:
        given |= rope_of(family, rope, given, rng)
    return getattr(transformers, f"{family.model}Config")(**given)


def rope_of(family: Family, rope: str, given: dict[str, Any], rng: Random) -> dict[str, Any]:
    """What says so in a config whose other keys are ``given``."""
    width = given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"]
    if "Deepseek" in family.model:
        width = given["qk_rope_head_dim"]
    if family.model == "GPTNeoX":
        share = 1.0 if rope == "dynamic" else given["rotary_pct"]  # transformers divides by the width less 2
        return {"rope_parameters": draw_rope(rope, int(width * share), rng) | {"partial_rotary_factor": share}}
    drawn = draw_rope(rope, width, rng)
    if rope == "yarn" and "Deepseek" in family.model:
        drawn |= {"mscale": rng.choice((0.7, 1.0)), "mscale_all_dim": rng.choice((0.0, 0.7))}
    if family.model == "Gemma3Text":
        return {"rope_parameters": {"full_attention": drawn, "sliding_attention": draw_rope("default", width, rng)}}
    if rope == "longrope":  # Phi-3's place for it
        return {"rope_parameters": drawn, "original_max_position_embeddings": drawn["original_max_position_embeddings"]}
    return {"rope_parameters": drawn}


def vary(model: Any, large: tuple[str, ...], deviation: float = 0.2) -> None:
    """Random weights of any kind: biases, norms and buffers come as zeros and ones, which hide mistakes. ``large``:
    parts of the names of what has the deviation 1."""
    for name, weight in model.named_parameters():
        norm = name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
        weight.data.normal_(float(norm), 1.0 if any(part in name for part in large) else deviation)
    for name, buffer in model.named_buffers():
        if "correction" in name:
            buffer.normal_(0.0, deviation)


def draw_rope(kind: str, width: int, rng: Random) -> dict[str, Any]:
    """dynamic does not stretch and longrope does not switch within ``POSITIONS``: transformers does both in the middle
    of a text, with keys in the cache that were rotated otherwise."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": rng.choice((1e4, 1e6))}
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        rope["factor"] = rng.choice((2.0, 4.0))
    if kind in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = 32
        rope |= {"truncate": False} if kind == "yarn" and rng.choice(BOOLEANS) else {}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        rope["original_max_position_embeddings"] = rng.choice((2, POSITIONS))
        rope |= {f"{name}_factor": [rng.uniform(1, 8) for _ in range(width // 2)] for name in ("short", "long")}
    return rope
