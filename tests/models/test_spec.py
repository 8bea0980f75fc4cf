"""ModelSpec from configs and GGUF metadata; every way in which they can be unusable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models.tiny_models import TINY, TinyModel

from batchinfer.models.architectures import ARCHITECTURES
from batchinfer.models.files import ModelError
from batchinfer.models.gguf import GgufFile
from batchinfer.models.gguf_spec import spec_from_gguf
from batchinfer.models.layout import num_parameters
from batchinfer.models.model_spec import ModelSpec
from batchinfer.models.spec import load_spec, spec_from_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "eos_token_id": [2, 5],
    "bos_token_id": 1,
}


def spec(**changes: Any) -> ModelSpec:
    config = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    return spec_from_config(config, "config.json")


def test_plain_llama() -> None:
    got = spec()
    assert (got.layers, got.width, got.heads, got.kv_heads, got.head_dim, got.mlp_width) == (3, 64, 8, 2, 8, 96)
    assert (got.vocab_size, got.norm_eps, got.max_positions) == (100, 1e-6, 4096)
    assert (got.qkv_bias, got.o_bias, got.mlp_bias, got.qk_norm, got.tied_embeddings) == (
        False,
        False,
        False,
        "",
        False,
    )
    assert (got.bos_id, got.eos_ids, got.windows) == (1, (2, 5), ())
    assert (got.rope.type, got.rope.theta, got.rope.width) == ("default", 10000.0, 8)


def test_llama_1_has_as_many_kv_heads_as_heads() -> None:
    assert spec(num_key_value_heads=None).kv_heads == 8


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [  # qkv_bias, o_bias, mlp_bias, qk_norm
        ("LlamaForCausalLM", {"attention_bias": True}, (True, True, False, "")),
        ("LlamaForCausalLM", {"mlp_bias": True}, (False, False, True, "")),
        ("MistralForCausalLM", {"attention_bias": True}, (False, False, False, "")),
        ("Qwen2ForCausalLM", {}, (True, False, False, "")),
        ("Qwen3ForCausalLM", {}, (False, False, False, "head")),
        ("Qwen3ForCausalLM", {"attention_bias": True}, (True, True, False, "head")),
    ],
)
def test_flags_of_architectures(name: str, changes: dict[str, Any], expected: tuple[bool, ...]) -> None:
    got = spec(architectures=[name], **changes)
    assert (got.qkv_bias, got.o_bias, got.mlp_bias, got.qk_norm) == expected


@pytest.mark.parametrize("name", TINY)
def test_parameters_are_counted_as_transformers_does(name: str, tiny: Callable[[str], TinyModel]) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny(name).folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    corrections = sum(buffer.numel() for key, buffer in model.named_buffers() if "correction" in key)
    assert num_parameters(load_spec(str(folder))) == model.num_parameters() + corrections


def test_rope_in_the_old_spelling_is_that_in_the_new() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    new = spec(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    assert new == spec(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    assert new == spec(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    assert (new.rope.type, new.rope.theta, new.rope.trained_positions) == ("llama3", 5e5, 512)


def test_yarn_reaches_as_far_as_its_factor_says() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert spec(rope_scaling=scaling).max_positions == 16384
    assert spec(rope_scaling=scaling, max_position_embeddings=20000).max_positions == 20000


def test_resolve_length() -> None:
    assert spec().resolve_length() == 4096
    assert spec().resolve_length(100) == 100
    with pytest.raises(ModelError, match=r"engine\.max_model_len=4097 .* 4096 positions"):
        spec().resolve_length(4097)
    dynamic = spec(rope_scaling={"type": "dynamic", "factor": 2.0})
    assert dynamic.resolve_length() == 4096
    assert dynamic.resolve_length(8192) == 8192
    with pytest.raises(ModelError, match="8192 positions"):
        dynamic.resolve_length(8193)


LATE = ["full_attention", "full_attention", "sliding_attention"]
QWEN, ON = "Qwen2ForCausalLM", {"use_sliding_window": True}


@pytest.mark.parametrize(
    ("name", "changes", "windows"),
    [
        ("MistralForCausalLM", {}, (512, 512, 512)),
        ("MistralForCausalLM", {"sliding_window": None}, ()),
        ("LlamaForCausalLM", {}, ()),
        (QWEN, {}, ()),
        (QWEN, {"use_sliding_window": False}, ()),
        (QWEN, ON | {"max_window_layers": 3}, ()),
        (QWEN, ON | {"layer_types": ["full_attention"] * 3}, ()),
        (QWEN, ON | {"max_window_layers": 2}, (0, 0, 512)),
        (QWEN, ON | {"layer_types": LATE}, (0, 0, 512)),
        ("Qwen3MoeForCausalLM", ON, (512, 512, 512)),
        ("Qwen2MoeForCausalLM", ON, (512, 0, 512)),
        ("Gemma2ForCausalLM", {}, (512, 0, 512)),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 2}, (512, 0, 512)),
        ("Gemma3ForCausalLM", {"layer_types": LATE}, (0, 0, 512)),
        ("SmolLM3ForCausalLM", ON | {"no_rope_layer_interval": 2}, (0, 512, 0)),
    ],
)
def test_windows(name: str, changes: dict[str, Any], windows: tuple[int, ...]) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    assert spec(architectures=[name], **{"sliding_window": 512} | experts | changes).windows == windows


def test_a_window_wider_than_the_run_is_none() -> None:
    gemma = spec(architectures=["Gemma3ForCausalLM"], sliding_window=512, sliding_window_pattern=2)
    assert gemma.layer_kinds(513) == ((512, "local"), (0, "global"), (512, "local"))
    assert gemma.layer_kinds(512) == ((0, "local"), (0, "global"), (0, "local"))
    assert (gemma.local_rope.theta, gemma.rope.theta) == (1e4, 1e6)


def test_layers_without_rope() -> None:
    kinds = spec(architectures=["SmolLM3ForCausalLM"], no_rope_layers=[1, 0, 1]).layer_kinds(9)
    assert [kind.rope for kind in kinds] == ["global", "", "global"]
    assert {kind.rope for kind in spec(architectures=["OPTForCausalLM"]).layer_kinds(9)} == {""}


def test_gemma_3_in_both_spellings() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = spec(architectures=["Gemma3ForCausalLM"], rope_local_base_freq=2e4, rope_theta=2e6, rope_scaling=scaling)
    both = {"full_attention": scaling | {"rope_theta": 2e6}, "sliding_attention": {"rope_theta": 2e4}}
    assert old == spec(architectures=["Gemma3ForCausalLM"], rope_parameters=both)
    assert (old.rope.factor, old.local_rope.type) == (8.0, "default")


def test_granite_keeps_a_residual_that_is_divided_by_its_multiplier() -> None:
    got = spec(architectures=["GraniteForCausalLM"], residual_multiplier=0.5, embedding_multiplier=12.0)
    assert (got.embed_scale, got.norm_eps) == (24.0, 4e-6)


def test_experts() -> None:
    given = {"architectures": ["Qwen2MoeForCausalLM"], "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    got = spec(**given, num_experts=4, mlp_only_layers=[2], shared_expert_intermediate_size=16).experts
    assert (got.widths, got.renormalise, got.layers) == ((8, 8, 8, 8, 16), False, (True, True, False))
    assert spec(**given, num_experts=4, decoder_sparse_step=2).experts.layers == (False, True, False)
    with pytest.raises(ModelError, match="num_experts_per_tok=2 is more than num_experts=1"):
        spec(**given, num_experts=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "does not name its architecture .* LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": ["GPTBigCode"]}, "'GPTBigCode' is not supported; supported are LlamaForCausalLM"),
        ({"architectures": ["LLaMAForCausalLM"]}, "nearest is LlamaForCausalLM"),
        ({"architectures": ["MyModel"], "auto_map": {"AutoModel": "x.Y"}}, "auto_map.* never run"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"rms_norm_eps": None}, "no 'rms_norm_eps'"),
        ({"vocab_size": "100"}, "vocab_size='100' must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a whole number above 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True must be a whole number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a number above 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
        ({"num_attention_heads": 7}, "hidden_size=64 is not a multiple of num_attention_heads=7"),
        ({"num_key_value_heads": 3}, "8 attention heads cannot share 3 key/value heads"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; it must be one of silu, swish"),
        ({"hidden_act": "tanh", "architectures": ["OPTForCausalLM"]}, "activation_function='tanh' is not supported"),
        ({"architectures": ["GPT2LMHeadModel"], "hidden_size": None}, "no 'n_embd'"),
        ({"architectures": ["OPTForCausalLM"], "word_embed_proj_dim": 32}, "word_embed_proj_dim=32 .* hidden_size=64"),
        ({"architectures": ["OPTForCausalLM"], "do_layer_norm_before": False}, "do_layer_norm_before=False .* be true"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]}, "no_rope_layers must be a list of 3"),
        ({"architectures": ["Gemma2ForCausalLM"], "sliding_window": 9, "layer_types": ["x"]}, "layer_types must be a"),
        ({"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.4}, "partial_rotary_factor=0.4 makes 3 of"),
        ({"architectures": ["DeepseekV32ForCausalLM"]}, "nearest is DeepseekV3ForCausalLM"),
        ({"architectures": ["Phi4ForCausalLM"]}, "nearest is Phi3ForCausalLM"),
        ({"architectures": ["Qwen2VLForConditionalGeneration"]}, "nearest is Qwen2ForCausalLM"),
        ({"architectures": ["FalconForCausalLM"]}, "nearest is LlamaForCausalLM"),
        (
            {"quantization_config": {"quant_method": "exl2"}},
            r"has quant_method='exl2', which is not supported; it must be one of 'fp8', .*'awq'.* use",
        ),
        ({"rope_scaling": {"type": "mrope"}}, "rope_type='mrope' is not supported; supported are default, linear"),
        ({"rope_scaling": {"type": "linear"}}, r"config.json \(rope_scaling\) has no 'factor'"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_theta": -1}, "rope_theta=-1 must be a number above 0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 4}},
            "short_factor must be a list of 4 numbers",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [0.0] * 4}},
            r"long_factor\[0\]=0.0 must be a number above 0",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "low_freq_factor must be below high_freq_factor",
        ),
    ],
)
def test_unusable_configs_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        spec(**changes)
    assert caught.value.exit_code == 64
    assert "config.json" in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "factor", "x"]), inner),
    max_leaves=5,
)
KEYS = [*LLAMA, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "quantization_config"]
KEYS += ["no_rope_layers", "num_experts", "num_experts_per_tok", "mlp_only_layers", "decoder_sparse_step", "n_embd"]
KEYS += ["partial_rotary_factor", "residual_multiplier", "query_pre_attn_scalar", "attn_logit_softcapping"]
KEYS += ["layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "tie_word_embeddings", "mlp_bias"]


@settings(max_examples=200)
@given(name=st.sampled_from(sorted(ARCHITECTURES)), changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_no_config_raises_anything_else(name: str, changes: dict[str, Any]) -> None:
    try:
        got = spec_from_config({**LLAMA, "architectures": [name], **changes})
    except ModelError:
        return
    assert got.heads % got.kv_heads == 0


def test_folders_without_a_usable_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither a folder nor a \.gguf file"):
        load_spec(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"config\.json is missing: model\.path must be a Hugging Face model folder"):
        load_spec(str(tmp_path))
    config = tmp_path / "config.json"
    for text, message in [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object, not list"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ("[" * 100_000, "is not valid JSON"),
    ]:
        config.write_text(text)
        with pytest.raises(ModelError, match=message):
            load_spec(str(tmp_path))
    config.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ModelError, match="is not valid JSON"):
        load_spec(str(tmp_path))


def test_every_architecture_is_tested_against_transformers(tiny: Callable[[str], TinyModel]) -> None:
    saved = {json.loads((tiny(name).folder / "config.json").read_text())["architectures"][0] for name in TINY}
    assert saved == set(ARCHITECTURES)


QWEN_GGUF = {
    "general.architecture": "qwen2",
    "qwen2.block_count": 3,
    "qwen2.context_length": 4096,
    "qwen2.embedding_length": 64,
    "qwen2.feed_forward_length": 96,
    "qwen2.attention.head_count": 8,
    "qwen2.attention.head_count_kv": 2,
    "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen2.vocab_size": 100,
    "qwen2.rope.freq_base": 1e6,
    "tokenizer.ggml.eos_token_id": 2,
}


def gguf(**changes: Any) -> GgufFile:
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {key: value for key, value in (QWEN_GGUF | keys).items() if value is not None}
    return GgufFile("model.gguf", 0, metadata, (), 0)


def test_gguf_metadata_says_the_same() -> None:
    got = spec_from_gguf(gguf())
    want = spec(architectures=["Qwen2ForCausalLM"], rope_theta=1e6, eos_token_id=2, bos_token_id=None)
    # A file without tensors has neither biases nor an output matrix; tests of weights cover those.
    assert (want.qkv_bias, got.qkv_bias, want.tied_embeddings, got.tied_embeddings) == (True, False, False, True)
    assert got == spec_from_gguf(gguf(qwen2__attention__key_length=8))
    for name in ("architecture", "layers", "width", "heads", "kv_heads", "head_dim", "mlp_width", "vocab_size", "rope"):
        assert getattr(got, name) == getattr(want, name), name
    assert (got.max_positions, got.eos_ids, got.bos_id) == (4096, (2,), None)


def test_gguf_rope_scaling() -> None:
    scaling = {"qwen2__rope__scaling__type": "yarn", "qwen2__rope__scaling__factor": 4.0}
    got = spec_from_gguf(gguf(**scaling, qwen2__rope__scaling__original_context_length=1024)).rope
    want = spec(
        rope_theta=1e6, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    ).rope
    assert got == want
    linear = spec_from_gguf(gguf(**scaling | {"qwen2__rope__scaling__type": "linear"})).rope
    assert (linear.type, linear.factor) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": None}, "no metadata key 'general.architecture'"),
        ({"general__architecture": "qwen2moe"}, "'qwen2moe' is not supported; .* nearest is qwen2"),
        ({"qwen2__block_count": None}, "no metadata key 'qwen2.block_count'"),
        ({"qwen2__block_count": "3"}, "'qwen2.block_count' must be int, not str"),
        ({"qwen2__expert_count": 8}, "mixtures of experts are not supported"),
        ({"qwen2__rope__dimension_count": 4}, "rope.dimension_count must be the head's width 8"),
        ({"qwen2__attention__value_length": 4}, "value_length differs from key_length"),
        ({"qwen2__rope__scaling__type": "longrope"}, "'longrope' is not supported; supported are none, linear, yarn"),
        ({"qwen2__rope__scaling__type": "linear"}, "no metadata key 'qwen2.rope.scaling.factor'"),
        ({"qwen2__attention__head_count_kv": 3}, "8 attention heads cannot share 3"),
    ],
)
def test_unusable_gguf_metadata_names_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        spec_from_gguf(gguf(**changes))
    assert "model.gguf" in str(caught.value)
