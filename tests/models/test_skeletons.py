"""GPT-OSS and DeepSeek: sizes of the published models, and the promises that hold for every model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from models.test_deepseek import V2_LITE, V3, spec
from models.test_heads import vectors
from models.test_parity import prompts
from models.tiny_models import TinyModel

from batchinfer.models.layout import num_parameters
from batchinfer.types import PoolSpec

GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
DEEPSEEK_V3 = V3 | {
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "vocab_size": 129280,
}


@pytest.mark.parametrize(
    ("config", "billions"), [(GPT_OSS_20B, 20.91), (V2_LITE, 15.71), (DEEPSEEK_V3, 671.03)], ids=["20b", "lite", "v3"]
)
def test_published_models_have_as_many_parameters_as_their_authors_say(config: dict[str, Any], billions: float) -> None:
    assert num_parameters(spec(config)) / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_smaller_gpt_oss() -> None:
    got = spec(GPT_OSS_20B)
    assert (got.windows[:3], got.max_positions, got.sinks) == ((128, 0, 128), 131072, True)
    assert (got.rope.truncate, got.rope.factor, round(got.rope.magnitude, 4)) == (False, 32.0, 1.3466)
    assert (got.experts.mxfp4, got.experts.clamp.alpha, got.experts.renormalise) == (True, 1.702, True)


@pytest.mark.feature("models", "GPT-OSS and DeepSeek: a row's states are the same bits in any batch, on the CPU")
@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v2", "deepseek-v3"])
def test_a_row_does_not_depend_on_its_neighbours(tiny: Callable[[str], TinyModel], name: str) -> None:
    folder, pool, asked = tiny(name).folder, PoolSpec("last", 64), [text[:50] for text in prompts(4)]
    together = vectors(folder, pool, asked, max_slots=8, max_step_tokens=64)
    for options in ({"max_slots": 1, "max_step_tokens": 64}, {"max_slots": 3, "max_step_tokens": 7, "threads": 2}):
        other = vectors(folder, pool, asked, **options)
        assert all(np.array_equal(a, b) for a, b in zip(together, other, strict=True))


@pytest.mark.parametrize(("options", "bound"), [({"weights": "int8"}, 0.98), ({"dtype": "bf16"}, 0.98)], ids=str)
@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v2", "deepseek-v3"])
def test_shorter_weights_are_near(
    tiny: Callable[[str], TinyModel], name: str, options: dict[str, Any], bound: float
) -> None:
    """Of most texts: a token that goes through another expert is elsewhere."""
    folder, pool, asked = tiny(name).folder, PoolSpec("last", 64, activation="normalise"), prompts(5)
    asked = [text[:50] for text in asked]
    exact, near = vectors(folder, pool, asked), vectors(folder, pool, asked, **options)
    alike = [float(a @ b) for a, b in zip(exact, near, strict=True)]
    assert np.median(alike) > bound
    assert min(alike) < 1 - 1e-6
