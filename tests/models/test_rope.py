"""Rope tables against transformers' rotary embedding, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models.tiny_models import TINY, TinyModel

from batchinfer.models.rope import RopeSpec
from batchinfer.models.spec import load_spec, spec_from_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": YARN,
    "yarn-without-rounding": {**YARN, "truncate": False},
    "yarn-with-mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn-with-everything": {**YARN, "beta_fast": 20.0, "beta_slow": 2.0, "attention_factor": 1.25},
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 512,
        "short_factor": [1.0 + i / 64 for i in range(32)],
        "long_factor": [1.0 + i for i in range(32)],
    },
}


@pytest.mark.feature("models", "rope: default, linear, dynamic, yarn, llama3, longrope")
@pytest.mark.parametrize("positions", [300, 3000])
@pytest.mark.parametrize("name", SCALINGS)
def test_table_is_that_of_transformers(name: str, positions: int) -> None:
    """transformers computes frequencies in float32: their relative error of 1e-7 grows with the position."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 500000.0, **SCALINGS[name]},
    )
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1, dtype=torch.float64), torch.arange(positions)[None])
    rope = spec_from_config({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}).rope
    table = rope.table(positions)
    assert table.shape == (positions, 64)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table[:, :32], cos[0, :, :32].numpy(), atol=1e-6 * positions)
    np.testing.assert_allclose(table[:, 32:], sin[0, :, :32].numpy(), atol=1e-6 * positions)
    np.testing.assert_allclose(rope.frequencies(positions), rotary.inv_freq.double().numpy(), rtol=1e-5)
    assert rope.magnitude == pytest.approx(rotary.attention_scaling)


@pytest.mark.parametrize("name", [name for name in TINY if "-" in name])
def test_saved_configs_keep_their_scaling(name: str, tiny: Callable[[str], TinyModel]) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny(name).folder
    rotary = AutoModelForCausalLM.from_pretrained(folder).base_model.rotary_emb
    got = load_spec(str(folder)).rope.frequencies(1)
    np.testing.assert_allclose(got, rotary.inv_freq.double().numpy(), rtol=1e-5)


def test_far_positions_are_exact() -> None:
    """In float32 the angle of position 131,071 alone would be off by 0.004."""
    table = RopeSpec("default", 10000.0, 4, 131072).table(131072)
    for pair, frequency in enumerate((1.0, 10000.0**-0.5)):
        assert table[131071, pair] == np.float32(math.cos(131071 * frequency))
        assert table[131071, 2 + pair] == np.float32(math.sin(131071 * frequency))
