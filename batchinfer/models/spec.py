"""What kind of decoder a model is: ModelSpec, from config.json or from GGUF metadata. No torch.

``ARCHITECTURES`` is the whole list of what is supported: an architecture is a row of flags for the one decoder.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchinfer.models.files import Keys, ModelError, read_json
from batchinfer.models.gguf import GgufFile, is_gguf, read_gguf
from batchinfer.models.rope import RopeSpec, rope_from_config, rope_from_gguf

MAX_LAYERS = 10_000
"""Names are made for every tensor of every layer before the files are compared with them."""


@dataclass(frozen=True)
class Traits:
    """Where an architecture differs: each bias is True, False, or the config key that decides."""

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    window: str = ""  # config key of the sliding window
    window_switch: str = ""  # config key that must be true for the window to count


ARCHITECTURES = {
    "LlamaForCausalLM": Traits(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Traits(window="sliding_window"),
    "Qwen2ForCausalLM": Traits(qkv_bias=True, window="sliding_window", window_switch="use_sliding_window"),
    "Qwen3ForCausalLM": Traits(
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        window="sliding_window",
        window_switch="use_sliding_window",
    ),
}
GGUF_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True)
class ModelSpec:
    """A decoder of the Llama family. ``max_positions`` is the longest sequence the model is meant for;
    ``sliding_window`` the number of positions a token sees (None: all)."""

    architecture: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeSpec
    max_positions: int
    sliding_window: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def resolve_length(self, max_model_len: int = 0) -> int:
        """The longest sequence of a run: ``max_model_len``, or the model's own for 0. Raises ModelError."""
        length = max_model_len or self.max_positions
        # Dynamic scaling stretches the frequencies of a run that is longer than the training, and of no other.
        limit = int(self.max_positions * (self.rope.factor if self.rope.type == "dynamic" else 1))
        if length > limit:
            raise ModelError(f"engine.max_model_len={length} is above the model's {limit} positions: lower it")
        if self.sliding_window is not None and self.sliding_window < length:
            raise ModelError(
                f"the model's sliding_window={self.sliding_window} is shorter than its sequences ({length}), which is "
                f"not supported: set engine.max_model_len={self.sliding_window} or less, where no token needs a window"
            )
        return length

    @property
    def num_parameters(self) -> int:
        """Weights, biases and norms, a tied embedding counted once."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        bias = self.qkv_bias * (self.heads + 2 * self.kv_heads) * self.head_dim + self.o_bias * self.width
        bias += self.mlp_bias * (2 * self.mlp_width + self.width)
        norms = 2 * self.width + self.qk_norm * 2 * self.head_dim
        layer = attention + 3 * self.width * self.mlp_width + bias + norms
        return self.layers * layer + self.width + self.vocab_size * self.width * (1 if self.tied_embeddings else 2)


def load_spec(model_path: str) -> ModelSpec:
    """The spec of a model folder (config.json) or of a GGUF file. Raises ModelError."""
    if is_gguf(model_path):
        return spec_from_gguf(read_gguf(model_path))
    if not os.path.isdir(model_path):
        raise ModelError(f"model.path={model_path} is neither a folder nor a .gguf file")
    path = os.path.join(model_path, "config.json")
    if not os.path.exists(path):
        raise ModelError(
            f"{path} is missing: model.path must be a Hugging Face model folder (config.json, tokenizer.json, "
            "*.safetensors) or a .gguf file"
        )
    return spec_from_config(read_json(path), path)


def spec_from_config(config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """ModelSpec of a Hugging Face config. Raises ModelError naming the key and ``where``."""
    keys = Keys(config, where)
    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if name not in ARCHITECTURES:
        raise _unknown_architecture(name, "architectures", list(ARCHITECTURES), where, "auto_map" in config)
    traits = ARCHITECTURES[name]
    if config.get("quantization_config"):
        quantisation = config["quantization_config"]
        method = quantisation.get("quant_method", "?") if isinstance(quantisation, dict) else quantisation
        raise ModelError(
            f"{where}: quantization_config ({method}) is not supported: use the unquantised (bf16, fp16, fp32) weights "
            "or a GGUF file of the model"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"{where}: hidden_act={activation!r} is not supported; it must be 'silu'")

    heads, width = keys.count("num_attention_heads"), keys.count("hidden_size")
    if config.get("head_dim") is None and width % heads:
        raise ModelError(f"{where}: hidden_size={width} is not a multiple of num_attention_heads={heads}; set head_dim")
    head_dim = keys.count("head_dim", width // heads)
    max_positions = keys.count("max_position_embeddings")
    rope, max_positions = rope_from_config(keys, head_dim, max_positions)
    return _checked(
        ModelSpec(
            architecture=name,
            layers=keys.count("num_hidden_layers"),
            width=width,
            heads=heads,
            kv_heads=keys.count("num_key_value_heads", heads),
            head_dim=head_dim,
            mlp_width=keys.count("intermediate_size"),
            vocab_size=keys.count("vocab_size"),
            norm_eps=keys.number("rms_norm_eps"),
            tied_embeddings=keys.flag("tie_word_embeddings"),
            qkv_bias=keys.flag(traits.qkv_bias),
            o_bias=keys.flag(traits.o_bias),
            mlp_bias=keys.flag(traits.mlp_bias),
            qk_norm=traits.qk_norm,
            rope=rope,
            max_positions=max_positions,
            sliding_window=_window(keys, traits),
            bos_id=(token_ids(config.get("bos_token_id")) or (None,))[0],
            eos_ids=token_ids(config.get("eos_token_id")),
        ),
        where,
    )


def spec_from_gguf(file: GgufFile) -> ModelSpec:
    """ModelSpec of a GGUF file. Raises ModelError naming file and key."""
    arch = file.get("general.architecture", str, required=True)
    if arch not in GGUF_ARCHITECTURES:
        raise _unknown_architecture(arch, "general.architecture", list(GGUF_ARCHITECTURES), file.path)
    tensors = {tensor.name: tensor for tensor in file.tensors}

    def need(key: str, kind: type = int) -> Any:
        return file.get(f"{arch}.{key}", kind, required=True)

    def have(key: str, kind: type, default: Any = None) -> Any:
        return file.get(f"{arch}.{key}", kind, default)

    width, heads = need("embedding_length"), need("attention.head_count")
    head_dim = have("attention.key_length", int, width // max(heads, 1))
    if have("attention.value_length", int, head_dim) != head_dim:
        raise ModelError(f"{file.path}: {arch}.attention.value_length differs from key_length, which is not supported")
    if have("rope.dimension_count", int, head_dim) != head_dim:
        raise ModelError(f"{file.path}: {arch}.rope.dimension_count must be the head's width {head_dim}")
    if have("expert_count", int, 0):
        raise ModelError(f"{file.path}: {arch}.expert_count: mixtures of experts are not supported")
    positions = need("context_length")
    return _checked(
        ModelSpec(
            architecture=GGUF_ARCHITECTURES[arch],
            layers=need("block_count"),
            width=width,
            heads=heads,
            kv_heads=have("attention.head_count_kv", int, heads),
            head_dim=head_dim,
            mlp_width=need("feed_forward_length"),
            vocab_size=tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else need("vocab_size"),
            norm_eps=need("attention.layer_norm_rms_epsilon", float),
            tied_embeddings="output.weight" not in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
            o_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_up.bias" in tensors,
            qk_norm=ARCHITECTURES[GGUF_ARCHITECTURES[arch]].qk_norm,
            rope=rope_from_gguf(file, arch, head_dim, positions),
            max_positions=positions,
            sliding_window=have("attention.sliding_window", int) or None,
            bos_id=file.get("tokenizer.ggml.bos_token_id", int),
            eos_ids=token_ids(file.get("tokenizer.ggml.eos_token_id", int)),
        ),
        file.path,
    )


def token_ids(value: Any) -> tuple[int, ...]:
    """A config's token id: absent, one number or a list of them."""
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if type(item) is int and item >= 0)


def _unknown_architecture(name: str, key: str, known: list[str], where: str, remote_code: bool = False) -> ModelError:
    if not name:
        return ModelError(f"{where} does not name its architecture ({key}); supported are {', '.join(known)}")
    near = difflib.get_close_matches(name, known, 1, 0.6)
    return ModelError(
        f"{where}: the architecture {name!r} is not supported; supported are {', '.join(known)}"
        + (f" (the nearest is {near[0]})" if near else "")
        + (". The model brings its own Python code (auto_map), which is never run" if remote_code else "")
    )


def _checked(spec: ModelSpec, where: str) -> ModelSpec:
    """What must hold between the numbers."""
    if spec.layers > MAX_LAYERS:
        raise ModelError(
            f"{where}: {spec.layers} layers are more than any model has ({MAX_LAYERS}): the file is damaged"
        )
    if spec.heads % spec.kv_heads:
        raise ModelError(f"{where}: {spec.heads} attention heads cannot share {spec.kv_heads} key/value heads evenly")
    if spec.head_dim % 2:
        raise ModelError(f"{where}: head_dim={spec.head_dim} is odd; rotary embeddings need an even one")
    return spec


def _window(keys: Keys, traits: Traits) -> int | None:
    """The sliding window, None where no layer has one."""
    if not traits.window or keys.config.get(traits.window) is None:
        return None
    if traits.window_switch and not keys.flag(traits.window_switch):
        return None
    kinds = keys.config.get("layer_types")
    if isinstance(kinds, list) and kinds and all(kind == "full_attention" for kind in kinds):
        return None
    if not kinds and traits.window_switch and keys.count("max_window_layers", 28) >= keys.count("num_hidden_layers"):
        return None
    return keys.count(traits.window)
