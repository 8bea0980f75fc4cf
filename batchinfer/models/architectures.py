"""The supported architectures: one table, from the name in a config to the traits of the one decoder.

``ARCHITECTURES`` is the whole list of what is supported. An architecture differs from Llama in what its row says.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from batchinfer.models.files import ModelError
from batchinfer.ops import Scores
from batchinfer.types import Head

QKNorm = Literal["", "head", "all"]
Windows = Literal["", "all", "late", "early", "even", "every", "nope"]


@dataclass(frozen=True)
class Names:
    """What Hugging Face calls the weights, without ``.weight`` and ``.bias``; "" for what an architecture lacks.

    ``root`` stands before the embedding, the layers and the last norm. Several names of one matrix are merged in this
    order, one name holds all of it.
    """

    root: str = "model."
    embed: str = "embed_tokens"
    positions: str = ""
    layer: str = "layers.{}."
    norm: str = "norm"
    head: str = "lm_head"
    attn_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o: str = "self_attn.o_proj"
    attn_post_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    mlp_post_norm: str = "post_feedforward_layernorm"
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}."
    expert_gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    expert_down: str = "down_proj"
    shared_router: str = "mlp.shared_expert_gate"
    shared_expert: str = "mlp.shared_expert."


@dataclass(frozen=True)
class Traits:
    """Where an architecture differs from Llama. A bias is True, False, or the config key that decides.

    ``keys`` are config keys with another name than Llama's (Llama's: theirs), ``defaults`` what holds where a config
    leaves a key out, under Llama's name.
    ``qk_norm``: RMSNorm of each head, or of all heads together. ``windows``: which layers have the sliding window,
    where the config lists no ``layer_types``: all; "late": from max_window_layers on; "early": every other before it;
    "even": every other, from the first; "every": all but each sliding_window_pattern-th; "nope": those without rope.
    The config's ``window_switch`` must be true for it. ``norm_offset`` is added to the stored weights of norms.
    """

    names: Names = field(default_factory=Names)
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: QKNorm = ""
    layer_norm: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    norm_offset: float = 0.0
    parallel: str = ""  # config key: attention and MLP read the same sum
    gated: bool = True
    gelu_is_tanh: bool = False  # old configs say "gelu" for the approximation
    rope: bool = True
    partial_rope: bool = False  # partial_rotary_factor counts
    nope_layers: bool = False
    local_rope: bool = False  # windowed layers rotate by another table
    positions_offset: int = 0  # rows of the table of learned positions before that of position 0
    windows: Windows = ""
    window_switch: str = ""
    scaled_embedding: bool = False  # by the root of the width
    soft_caps: bool = False
    multipliers: bool = False  # Granite's
    experts: bool = False
    stacked_experts: bool = False  # GPT-OSS's: one tensor of all of them, biases, a gate that is cut
    sinks: bool = False  # a learned score of each head that every softmax has in its sum
    latent: bool = False  # DeepSeek's attention: keys and values of all heads from a few values
    scores: Scores = "softmax"  # of experts
    transposed: bool = False  # matrices are stored [in, out]
    qkv_by_head: bool = False  # stored as q, k, v of the first head, then of the next


TIED = {"tie_word_embeddings": True}
GEMMA = {"defaults": TIED | {"hidden_act": "gelu_pytorch_tanh", "head_dim": 256}, "qkv_bias": "attention_bias"}
GEMMA |= {"o_bias": "attention_bias", "norm_offset": 1.0, "scaled_embedding": True, "gelu_is_tanh": True}
GEMMA_KEYS = {"hidden_act": "hidden_activation"}
GEMMA_NAMES = Names(mlp_norm="pre_feedforward_layernorm")
QWEN_WINDOWS = {"windows": "late", "window_switch": "use_sliding_window"}
DEEPSEEK = {"names": Names(shared_expert="mlp.shared_experts."), "keys": {"num_experts": "n_routed_experts"}}
DEEPSEEK |= {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "experts": True, "latent": True}
BIASED = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}

ARCHITECTURES = {
    "LlamaForCausalLM": Traits(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Traits(windows="all"),
    "MixtralForCausalLM": Traits(
        names=Names(
            router="block_sparse_moe.gate",
            expert="block_sparse_moe.experts.{}.",
            expert_gate_up=("w1", "w3"),
            expert_down="w2",
        ),
        keys={"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        defaults={"norm_topk_prob": True},
        windows="all",
        experts=True,
    ),
    "Qwen2ForCausalLM": Traits(qkv_bias=True, **QWEN_WINDOWS),
    "Qwen2MoeForCausalLM": Traits(
        defaults={"qkv_bias": True},
        qkv_bias="qkv_bias",
        windows="early",
        window_switch="use_sliding_window",
        experts=True,
    ),
    "Qwen3ForCausalLM": Traits(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm="head", **QWEN_WINDOWS),
    "Qwen3MoeForCausalLM": Traits(
        keys={"num_experts": "num_local_experts"},
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="head",
        windows="all",
        window_switch="use_sliding_window",
        experts=True,
    ),
    "GemmaForCausalLM": Traits(keys=GEMMA_KEYS, **GEMMA),
    "Gemma2ForCausalLM": Traits(
        names=GEMMA_NAMES, keys=GEMMA_KEYS, post_norm=True, windows="even", soft_caps=True, **GEMMA
    ),
    "Gemma3ForCausalLM": Traits(
        names=GEMMA_NAMES,
        keys=GEMMA_KEYS,
        post_norm=True,
        qk_norm="head",
        windows="every",
        local_rope=True,
        soft_caps=True,
        **GEMMA | {"defaults": GEMMA["defaults"] | {"rope_theta": 1e6, "rope_local_base_freq": 1e4}},
    ),
    "Phi3ForCausalLM": Traits(
        names=Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)), partial_rope=True, windows="all"
    ),
    "Olmo2ForCausalLM": Traits(
        qkv_bias="attention_bias", o_bias="attention_bias", qk_norm="all", pre_norm=False, post_norm=True
    ),
    "GraniteForCausalLM": Traits(
        qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias", multipliers=True
    ),
    "SmolLM3ForCausalLM": Traits(
        defaults=TIED,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        nope_layers=True,
        windows="nope",
        window_switch="use_sliding_window",
    ),
    "Starcoder2ForCausalLM": Traits(
        names=Names(gate_up=("mlp.c_fc",), down="mlp.c_proj"),
        keys={"rms_norm_eps": "norm_epsilon"},
        defaults=TIED | {"use_bias": True, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-5},
        qkv_bias="use_bias",
        o_bias="use_bias",
        mlp_bias="use_bias",
        layer_norm=True,
        gated=False,
        windows="all",
    ),
    "GptOssForCausalLM": Traits(
        names=Names(router="mlp.router"),
        keys={"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        defaults={"attention_bias": True, "norm_topk_prob": True, "head_dim": 64, "rope_theta": 150000.0},
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        windows="even",
        experts=True,
        stacked_experts=True,
        sinks=True,
    ),
    "DeepseekV2ForCausalLM": Traits(defaults={"first_k_dense_replace": 0, "topk_method": "greedy"}, **DEEPSEEK),
    "DeepseekV3ForCausalLM": Traits(
        defaults={"first_k_dense_replace": 3, "topk_method": "noaux_tc", "norm_topk_prob": True},
        scores="sigmoid",
        **DEEPSEEK,
    ),
    "GPT2LMHeadModel": Traits(
        names=Names(
            root="transformer.",
            embed="wte",
            positions="wpe",
            layer="h.{}.",
            norm="ln_f",
            attn_norm="ln_1",
            qkv=("attn.c_attn",),
            o="attn.c_proj",
            mlp_norm="ln_2",
            gate_up=("mlp.c_fc",),
            down="mlp.c_proj",
        ),
        keys={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "rms_norm_eps": "layer_norm_epsilon",
            "hidden_act": "activation_function",
        },
        defaults=TIED | {"hidden_act": "gelu_new"},
        layer_norm=True,
        gated=False,
        rope=False,
        transposed=True,
        **BIASED,
    ),
    "GPTNeoXForCausalLM": Traits(
        names=Names(
            root="gpt_neox.",
            embed="embed_in",
            norm="final_layer_norm",
            head="embed_out",
            qkv=("attention.query_key_value",),
            o="attention.dense",
            gate_up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
        ),
        keys={"rms_norm_eps": "layer_norm_eps", "rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        defaults={
            "attention_bias": True,
            "use_parallel_residual": True,
            "hidden_act": "gelu",
            "partial_rotary_factor": 0.25,
        },
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias=True,
        layer_norm=True,
        parallel="use_parallel_residual",
        gated=False,
        partial_rope=True,
        qkv_by_head=True,
    ),
    "OPTForCausalLM": Traits(
        names=Names(
            root="model.decoder.",
            positions="embed_positions",
            norm="final_layer_norm",
            attn_norm="self_attn_layer_norm",
            o="self_attn.out_proj",
            mlp_norm="final_layer_norm",
            gate_up=("fc1",),
            down="fc2",
        ),
        keys={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        defaults=TIED | {"rms_norm_eps": 1e-5, "hidden_act": "relu", "enable_bias": True},
        qkv_bias="enable_bias",
        o_bias="enable_bias",
        mlp_bias="enable_bias",
        layer_norm=True,
        gated=False,
        rope=False,
        positions_offset=2,
    ),
}

STEMS = {re.sub("ForCausalLM|LMHeadModel", "", name): name for name in ARCHITECTURES}
STEMS |= {"Gemma3Text": STEMS.pop("Gemma3")}  # without the suffix it is the one that sees images
OTHER_HEADS: dict[str, Head] = {"ForSequenceClassification": "classes", "Model": "hidden"}
"""Suffixes of the names that the same layers have with another head, or with none."""

GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}


def named_architecture(name: str) -> tuple[str, Head] | None:
    """The row of the table that a config's name stands for, and the model's head; None for an unknown one."""
    if name in ARCHITECTURES:
        return name, "tokens"
    for suffix, head in OTHER_HEADS.items():
        if name.endswith(suffix) and name.removesuffix(suffix) in STEMS:
            return STEMS[name.removesuffix(suffix)], head
    return None


def _stem(name: str) -> str:
    return re.sub(r"(For[A-Z]\w*|LMHeadModel|Model)$", "", name).lower()


def _alike(one: str, other: str) -> int:
    """Letters at the beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def unknown_architecture(name: str, key: str, known: list[str], where: str, remote_code: bool = False) -> ModelError:
    """The error for a model of another architecture, with the nearest of those that work: by the longest beginning that
    the names share without what they end with, from three letters on, else by their letters, else Llama, after which
    most are modelled."""
    if not name:
        return ModelError(f"{where} does not name its architecture ({key}); supported are {', '.join(known)}")
    stems = {_stem(other): other for other in known}
    shared = max(stems, key=lambda stem: _alike(stem, _stem(name)))
    if _alike(shared, _stem(name)) < 3:
        (shared, *_) = [*difflib.get_close_matches(_stem(name), stems, 1), *stems]
    return ModelError(
        f"{where}: the architecture {name!r} is not supported; supported are {', '.join(known)}"
        f" (the nearest is {stems[shared]})"
        + (". The model brings its own Python code (auto_map), which is never run" if remote_code else "")
    )
