"""DeepSeek-V2 and V3: what a config may say of routing and latent attention, and what a checkpoint may hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.tiny_models import TinyModel, edit_json
from safetensors.torch import load_file, save_file

from batchinfer.models.decoder import KVCache
from batchinfer.models.files import ModelError, read_json
from batchinfer.models.model_spec import ModelSpec
from batchinfer.models.spec import load_spec, spec_from_config
from batchinfer.models.weights import load_weights

V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V3 = V2_LITE | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "q_lora_rank": 1536,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


def spec(base: dict[str, Any], **changes: Any) -> ModelSpec:
    return spec_from_config({key: value for key, value in (base | changes).items() if value is not None})


def test_the_smaller_published_model() -> None:
    got = spec(V2_LITE)
    assert (got.heads, got.kv_heads, got.head_dim, got.rope.width) == (16, 16, 192, 64)
    assert got.score_scale == pytest.approx(0.1147213867929261)  # of a config's mscale, 192 ** -0.5 * 1.2608 ** 2
    assert got.rope.magnitude == 1.0
    assert (got.experts.widths[0], got.experts.widths[-1], got.experts.layers[:2]) == (1408, 2816, (False, True))
    # As the README has it: 12 times the 2 * 27 * 576 bytes that the latent values are.
    assert KVCache.bytes_per_page(got, 1, torch.bfloat16) == 2 * 27 * 6144


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (V2_LITE, {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' .* must be one of greedy, group_limited_greedy"),
        (V2_LITE, {"norm_topk_prob": True}, "norm_topk_prob=True is not supported; it must be false"),
        (V2_LITE, {"scoring_func": "sigmoid"}, "scoring_func='sigmoid' is not supported; it must be softmax"),
        (V2_LITE, {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported; it must be 1"),
        (V2_LITE, {"first_k_dense_replace": -1}, "first_k_dense_replace=-1 must be a number of layers"),
        (V2_LITE, {"kv_lora_rank": None}, "no 'kv_lora_rank'"),
        (V2_LITE, {"qk_rope_head_dim": 63}, "qk_rope_head_dim=63 must be even"),
        (V3, {"topk_method": "greedy"}, "it must be one of noaux_tc"),
        (V3, {"n_group": 7}, "6 of 64 experts cannot come from topk_group=4 of n_group=7 groups"),
        (V3, {"n_group": 64, "topk_group": 8}, "topk_group=8 of n_group=64 groups of equal size"),
        (V3, {"n_group": 16, "topk_group": 1}, "6 of 64 experts cannot come from topk_group=1 of n_group=16"),
    ],
)
def test_configs_that_are_refused(base: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec(base, **changes)


def test_the_layer_that_guesses_ahead_is_left_out(tiny: Callable[[str], TinyModel], tmp_path: Any) -> None:
    source = tiny("deepseek-v3").folder
    tensors = load_file(source / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    assert read_json(str(tmp_path / "config.json"))["num_hidden_layers"] == 2
    save_file(tensors | {"model.layers.2.eh_proj.weight": torch.zeros(3, 5)}, tmp_path / "model.safetensors")
    got, want = (dict(load_weights(str(f), load_spec(str(f)), torch.float32)) for f in (tmp_path, source))
    assert got.keys() == want.keys()
    save_file(tensors | {"model.layers.1.eh_proj.weight": torch.zeros(3, 5)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.eh_proj\.weight', for which Deepseek"):
        dict(load_weights(str(tmp_path), load_spec(str(tmp_path)), torch.float32))


@pytest.mark.feature("models", "DeepSeek-V3 in float8, in blocks of 128, as it is published")
def test_a_checkpoint_in_float8(tiny: Callable[[str], TinyModel], tmp_path: Any) -> None:
    source = tiny("deepseek-v3").folder
    tensors, values = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        tensors[name] = values[name] = weight
        if name.endswith("_proj.weight") or "kv_a_proj" in name:
            scale = torch.full([-(-size // 128) for size in weight.shape], 0.5)
            tensors[name] = (2 * weight).to(torch.float8_e4m3fn)
            tensors[name.replace("weight", "weight_scale_inv")] = scale
            values[name] = tensors[name].float() / 2
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    folders = tmp_path / "float8", tmp_path / "plain"
    for folder, stored in zip(folders, (tensors, values), strict=True):
        folder.mkdir()
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        save_file(stored, folder / "model.safetensors")
    edit_json(folders[0] / "config.json", quantization_config=quantised)
    got, want = (dict(load_weights(str(folder), load_spec(str(folder)), torch.float32)) for folder in folders)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in got)
