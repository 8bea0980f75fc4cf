"""Tiny random models of every supported architecture, and the means to spoil their files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.drawn_models import FAMILIES, vary

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
ROPE = {"rope_theta": 10000.0}
TRAINED = {"original_max_position_embeddings": 32}
MHA = {"num_key_value_heads": None}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 24, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8}
LATENT |= {"v_head_dim": 16, "n_routed_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
LATENT |= {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "first_k_dense_replace": 1}

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biased-tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "llama-linear": ("Llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}}),
    "llama-dynamic": (
        "Llama",
        {"max_position_embeddings": 32, "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}},
    ),
    "llama-llama3": (
        "Llama",
        {
            "rope_parameters": {
                **ROPE,
                **TRAINED,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ),
    "llama-longrope": (
        "Llama",
        {
            "rope_parameters": {
                **ROPE,
                **TRAINED,
                "rope_type": "longrope",
                "short_factor": [1.0 + i / 8 for i in range(8)],
                "long_factor": [1.0 + i / 2 for i in range(8)],
            }
        },
    ),
    "mistral-wide-heads": ("Mistral", {"head_dim": 32, "sliding_window": 48, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": {**ROPE, **TRAINED, "rope_type": "yarn", "factor": 2.0}}),
    "qwen3": ("Qwen3", {"head_dim": 32, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen3-biased": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen2-late-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 20}),
    "qwen2-moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 48, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 32, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 32, "sliding_window": 13, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 32,
            "sliding_window": 13,
            "num_hidden_layers": 3,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 48,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 17}),
    "phi3-longrope": (
        "Phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                **ROPE,
                "rope_type": "longrope",
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + i / 8 for i in range(6)],
                "long_factor": [1.0 + i / 2 for i in range(6)],
            },
        },
    ),
    "olmo2": ("Olmo2", {"attention_bias": True}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "starcoder2": ("Starcoder2", {"sliding_window": 21, "norm_epsilon": 1e-5}),
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 16,
            "sliding_window": 11,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "rope_parameters": {**ROPE, **TRAINED, "rope_type": "yarn", "factor": 2.0, "truncate": False},
        },
    ),
    "deepseek-v2": (
        "DeepseekV2",
        {**LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0},
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            **LATENT,
            "q_lora_rank": 40,
            "rope_parameters": {
                **ROPE,
                **TRAINED,
                "rope_type": "yarn",
                "factor": 2.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
            },
        },
    ),
    "gpt2": ("GPT2", {**MHA, "intermediate_size": None, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt-neox": ("GPTNeoX", {**MHA, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "gpt-neox-sequential": ("GPTNeoX", {**MHA, "use_parallel_residual": False, "attention_bias": False}),
    "opt": ("OPT", {**MHA, "ffn_dim": 80, "word_embed_proj_dim": 64}),
}
"""Name: (transformers' family, what differs from COMMON)."""

BF16 = ["llama", "llama-biased-tied", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "granite", "starcoder2"]
BF16 += ["gpt2", "gpt-neox", "opt", "smollm3"]
"""Those compared in bfloat16 too. A mixture may choose another expert there, which is a jump."""

GGUF = ["llama", "llama-biased-tied", "qwen2", "qwen3-biased", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "granite"]
GGUF += ["starcoder2"]
"""Those also written as GGUF."""


FAMILIES_BY_MODEL = {family.model: name for name, family in FAMILIES.items()}


def parity_cases(check: str, names: Iterable[str]) -> list[Any]:
    """Parameters of a test, each marked with the architecture that it holds to the ``check``."""
    return [pytest.param(name, marks=pytest.mark.parity(check, FAMILIES_BY_MODEL[TINY[name][0]])) for name in names]


@dataclass(frozen=True)
class TinyModel:
    """A saved model and transformers' float32 logits [2, 45, V] for ``ids`` [2, 45]."""

    folder: Path
    ids: torch.Tensor
    logits: torch.Tensor


def build_model(name: str, folder: Path) -> TinyModel:
    """Save the model of that name in TINY, and compute what transformers makes of it."""
    import transformers

    family, settings = TINY[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    vary(model, large=())
    model.save_pretrained(folder)
    ids = torch.randint(3, config.vocab_size, (2, 45))
    with torch.inference_mode():
        return TinyModel(folder, ids, model(ids).logits)


def write_safetensors(path: Path, entries: dict[str, Any], data: bytes = b"") -> Path:
    """A file with exactly this header, right or wrong."""
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def assert_relative(got: Any, want: Any, bound: float) -> None:
    """Largest difference against the largest value."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= bound * np.abs(want).max()
