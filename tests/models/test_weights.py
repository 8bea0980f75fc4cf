"""The weight stream: merged, converted, the same from every container; files that do not fit the config."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import recorder
import torch
from models.tiny_models import GGUF, TinyModel, assert_relative, edit_json, parity_cases
from safetensors.torch import load_file, save_file

from batchinfer.models import weights as module
from batchinfer.models.files import ModelError, StoredTensor
from batchinfer.models.layout import layout
from batchinfer.models.spec import load_spec
from batchinfer.models.weights import load_weights

Copy = Callable[..., Path]


def load(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return dict(load_weights(str(path), load_spec(str(path)), dtype))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["llama-biased-tied", "qwen2", "qwen3", "qwen2-moe", "gpt2", "opt"])
def test_every_target_once_with_the_shape_of_the_layout(name: str, tiny: Callable[[str], TinyModel]) -> None:
    folder = tiny(name).folder
    spec = load_spec(str(folder))
    got = list(load_weights(str(folder), spec, torch.bfloat16))
    assert sorted(name for name, _ in got) == sorted(layout(spec).targets)
    for target, tensor in got:
        assert tensor.shape == layout(spec).targets[target]
        assert tensor.dtype == (torch.bfloat16 if tensor.ndim == 2 else torch.float32)


def test_parts_are_merged_in_order(tiny: Callable[[str], TinyModel]) -> None:
    folder = tiny("llama-biased-tied").folder
    stored, got = load_file(folder / "model.safetensors"), load(folder)
    layer = "model.layers.1."
    qkv = [f"{layer}self_attn.{part}_proj" for part in "qkv"]
    assert torch.equal(got["layers.1.qkv"], torch.cat([stored[f"{part}.weight"] for part in qkv]))
    assert torch.equal(got["layers.1.qkv_bias"], torch.cat([stored[f"{part}.bias"] for part in qkv]))
    gate_up = torch.cat([stored[f"{layer}mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(got["layers.1.gate_up"], gate_up)
    assert torch.equal(got["layers.1.mlp_norm"], stored[f"{layer}post_attention_layernorm.weight"])


def test_other_orders_of_rows(tiny: Callable[[str], TinyModel]) -> None:
    folder = tiny("gpt2").folder
    stored, got = load_file(folder / "model.safetensors"), load(folder)
    assert torch.equal(got["layers.1.qkv"], stored["transformer.h.1.attn.c_attn.weight"].T)
    folder = tiny("gpt-neox").folder
    stored, got = load_file(folder / "model.safetensors"), load(folder)
    by_head = stored["gpt_neox.layers.0.attention.query_key_value.weight"].view(4, 3, 16, 64)
    for i, part in enumerate(got["layers.0.qkv"].chunk(3)):
        assert torch.equal(part.view(4, 16, 64), by_head[:, i])
    folder = tiny("gemma").folder
    stored, got = load_file(folder / "model.safetensors"), load(folder)
    assert torch.equal(got["norm"], stored["model.norm.weight"] + 1)


def test_names_may_come_without_their_root(copy_of: Copy) -> None:
    folder = copy_of("gpt2")
    stored = load_file(folder / "model.safetensors")
    want = load(folder)
    plain = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file(plain | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, folder / "model.safetensors")
    assert same(load(folder), want)
    save_file(stored | {"ln_f.bias": torch.ones(64)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"ln_f\.bias' twice, with and without 'transformer\.'"):
        load(folder)


def test_shards_give_the_same_as_one_file(tiny: Callable[[str], TinyModel], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny("qwen2-yarn").folder
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    assert same(load(tmp_path), load(folder))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_conversion_is_that_of_torch(copy_of: Copy, stored: torch.dtype, wanted: torch.dtype) -> None:
    folder = copy_of()
    file = folder / "model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(file).items()}, file)
    exact = load_file(file)
    got = load(folder, wanted)
    assert torch.equal(got["embed"], exact["model.embed_tokens.weight"].to(wanted))
    assert torch.equal(got["norm"], exact["model.norm.weight"].float())


def test_blocks_smaller_than_a_tensor_change_nothing(tiny: Callable[[str], TinyModel], monkeypatch: Any) -> None:
    folder = tiny("qwen3").folder
    whole = load(folder)
    for size in (1000, 7):  # the second is smaller than one row
        monkeypatch.setattr(module, "BLOCK_BYTES", size)
        assert same(load(folder), whole)


def test_blocks_are_large_and_hold_whole_rows() -> None:
    def tensor(name: str, rows: int, offset: int, dtype: str = "BF16") -> StoredTensor:
        return StoredTensor(name, dtype, (rows, 1 << 19), offset, rows << 20)

    large, small, far = tensor("a", 20, 0), tensor("b", 3, 20 << 20), tensor("c", 1, 40 << 20)
    blocks = module.cut("file", [large, small, far])
    assert [(b.offset >> 20, b.nbytes >> 20) for b in blocks] == [(0, 16), (16, 7), (40, 1)]
    assert [(p.tensor.name, p.row, p.rows, p.start >> 20) for p in blocks[1].pieces] == [
        ("a", 16, 4, 0),
        ("b", 0, 3, 4),
    ]
    odd = StoredTensor("odd", "F32", (1,), (20 << 20) + 4, 4)
    assert len(module.cut("file", [StoredTensor("a", "BF16", (2,), 20 << 20, 4), odd])) == 2  # it would lie across
    assert len(module.cut("file", [tensor("q", 4, 0, "Q4_1")])[0].pieces) == 2  # smaller pieces, in one block


def test_tied_models_may_store_the_head_and_old_ones_their_frequencies(copy_of: Copy) -> None:
    folder = copy_of("qwen2")
    before = load(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, file)
    assert same(load(folder), before)


def spoil(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), rf"lacks 1 tensors of the model, the first is '{NORM}'$"),
        (lambda t: t.pop("lm_head.weight"), r"'lm_head\.weight'; for a tied model set tie_word_embeddings=true"),
        (lambda t: t.update({"model.extra": torch.ones(2)}), r"'model\.extra', for which LlamaForCausalLM has no use"),
        (lambda t: t.update({NORM: torch.ones(65)}), rf"'{NORM}' has the shape \(65,\); the config makes it \(64,\)"),
        (lambda t: t.update({NORM: torch.ones(64, 1)}), r"has the shape \(64, 1\)"),
        (
            lambda t: t.update({NORM: torch.ones(64).to(torch.float8_e4m3fn)}),
            rf"'{NORM}' is F8_E4M3; supported are F32, F16, BF16",
        ),
        (lambda t: t.update({NORM: torch.ones(64, dtype=torch.float64)}), "is F64; supported are F32, F16, BF16"),
    ],
)
def test_tensors_that_do_not_fit_the_config(
    copy_of: Copy, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    folder = copy_of()
    spoil(folder, change)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert caught.value.exit_code == 64
    assert str(folder) in str(caught.value)


def test_a_truncated_file_names_the_tensor_before_anything_is_read(copy_of: Copy) -> None:
    folder = copy_of()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated: tensor 'model\.norm\.weight' ends at"):
        next(load_weights(str(folder), load_spec(str(folder)), torch.float32))


def test_a_file_that_shrinks_while_it_is_read(copy_of: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 20_000)
    folder = copy_of()
    file = folder / "model.safetensors"
    stream = load_weights(str(folder), load_spec(str(folder)), torch.float32)
    next(stream)
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(ModelError, match=r"model\.safetensors ends at byte 20000, but was at least \d+ bytes longer"):
        list(stream)


def test_config_of_another_model(copy_of: Copy) -> None:
    folder = copy_of()
    edit_json(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"'model\.layers\.1\..*', for which LlamaForCausalLM has no use"):
        load(folder)
    edit_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lacks 9 tensors of the model, the first is 'model\.layers\.2\."):
        load(folder)


# GGUF ----------------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
POST_NORMS = {"post_attention_layernorm": "post_attention_norm"}


def gguf_name(name: str, arch: str) -> str:
    base, kind = name.rsplit(".", 1)
    names = GGUF_NAMES | (POST_NORMS if arch in ("gemma2", "gemma3", "olmo2") else {})
    if base.startswith("model.layers."):
        _, _, layer, rest = base.split(".", 3)
        return f"blk.{layer}.{names[rest]}.{kind}"
    return f"{names[base]}.{kind}"


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """How llama.cpp stores q and k of its llama architecture: row j of a head's first half, then j of its second."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(array.shape)


def write_gguf(folder: Path, path: Path, kind: str) -> Path:
    """The model of a folder as GGUF; matrices of type ``kind``, vectors F32, as converters write them."""
    config = json.loads((folder / "config.json").read_text())
    arch = config["model_type"].removesuffix("_text")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if "norm_epsilon" in config:
        writer.add_layer_norm_eps(config["norm_epsilon"])
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    optional = {
        "sliding_window": writer.add_sliding_window,
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "attention_multiplier": writer.add_attention_scale,
        "logits_scaling": writer.add_logit_scale,
    }
    for key, add in optional.items():
        if config.get(key) is not None:
            add(config[key])
    for name, tensor in load_file(folder / "model.safetensors").items():
        array = tensor.numpy() + (arch.startswith("gemma") and "norm" in name)
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if arch in ("llama", "granite") and f"{part}." in name:
                array = interleave(array, config[heads])
        ggml = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        writer.add_tensor(gguf_name(name, arch), gguf.quantize(array, ggml), raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def wide(tiny: Callable[[str], TinyModel], tmp_path: Path) -> Callable[[str], Path]:
    """The tiny model with an MLP of 96 = 3 blocks of 32: quantised rows are whole blocks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(name: str) -> Path:
        config = AutoConfig.from_pretrained(tiny(name).folder, intermediate_size=96)
        if hasattr(config, "query_pre_attn_scalar"):  # GGUF does not hold it: it is known of every model
            config.query_pre_attn_scalar = config.head_dim
        if hasattr(config, "layer_types") and name == "gemma3":
            config.layer_types = ["sliding_attention"] * 3
        model = AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():
            weight.data.normal_(0.0, 0.2)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return build


@pytest.mark.feature("models", "GGUF, dequantised")
@pytest.mark.parametrize("name", parity_cases("weights from GGUF", GGUF))
def test_gguf_is_the_same_model(name: str, wide: Callable[[str], Path], tmp_path: Path) -> None:
    folder = wide(name)
    path = write_gguf(folder, tmp_path / "x.gguf", "F32")
    ours, theirs = load_spec(str(path)), load_spec(str(folder))
    rounded = {
        name: pytest.approx(getattr(theirs, name), rel=1e-6)
        for name in ("norm_eps", "embed_scale", "score_scale", "logit_scale")
    }
    # Metadata are float32; norms are stored with their offset.
    assert {name: getattr(ours, name) for name in rounded} == rounded
    assert replace(ours, norm_offset=theirs.norm_offset, **{name: getattr(theirs, name) for name in rounded}) == theirs
    assert same(load(path), load(folder))
    recorder.note(f"cpu {recorder.machine_kind()}", "run")


@pytest.mark.parametrize(("kind", "bound"), [("F16", 1e-3), ("BF16", 4e-3), ("Q8_0", 1e-2), ("Q4_0", 0.15)])
def test_quantised_gguf_is_near_and_exactly_what_the_package_makes_of_it(
    kind: str, bound: float, wide: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = wide("llama")
    exact, got = load(folder), load(write_gguf(folder, tmp_path / "x.gguf", kind))
    for name in exact:
        assert_relative(got[name], exact[name], bound if exact[name].ndim == 2 else 0.0)
    ggml = gguf.GGMLQuantizationType[kind]
    down = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].numpy()
    np.testing.assert_array_equal(got["layers.0.down"], gguf.dequantize(gguf.quantize(down, ggml), ggml))


def test_llama_3_scaling_in_a_tensor(wide: Callable[[str], Path], tmp_path: Path) -> None:
    folder = wide("llama-llama3")
    scaled = load_spec(str(folder)).rope
    plain = scaled.theta ** (-np.arange(0, 16, 2) / 16)
    factors = (plain / scaled.frequencies(1)).astype(np.float32)
    path = tmp_path / "x.gguf"

    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self, *args: Any, **kwargs: Any) -> None:
            self.add_tensor("rope_freqs.weight", factors)
            super().write_header_to_file(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        write_gguf(folder, path, "F32")
    np.testing.assert_allclose(load_spec(str(path)).rope.frequencies(64), scaled.frequencies(64), rtol=1e-6)
    assert same(load(path), load(folder))


def test_gguf_types_that_cannot_be_dequantised(wide: Callable[[str], Path], tmp_path: Path) -> None:
    path = write_gguf(wide("llama"), tmp_path / "x.gguf", "Q8_0")
    data = path.read_bytes()
    name = b"blk.0.ffn_down.weight"
    at = data.index(name) + len(name) + 4 + 16
    assert data[at] == gguf.GGMLQuantizationType.Q8_0
    # Q8_1 holds the same numbers in blocks of 36 bytes and occurs in activations only; it would overlap its neighbour.
    path.write_bytes(data[:at] + bytes([gguf.GGMLQuantizationType.Q8_1]) + data[at + 1 :])
    with pytest.raises(ModelError, match="overlap"):
        load(path)
    path.write_bytes(data[:at] + bytes([gguf.GGMLQuantizationType.I8]) + data[at + 1 :])
    with pytest.raises(ModelError, match=r"'blk\.0\.ffn_down\.weight' is I8, which cannot be dequantised"):
        load(path)
