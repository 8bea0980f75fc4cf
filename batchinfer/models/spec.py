"""ModelSpec from a model's config.json. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from batchinfer.models.architectures import ARCHITECTURES, Traits, named_architecture, unknown_architecture
from batchinfer.models.files import Keys, ModelError, read_json
from batchinfer.models.gguf import is_gguf, read_gguf
from batchinfer.models.gguf_spec import spec_from_gguf
from batchinfer.models.labels import labels
from batchinfer.models.model_spec import MAX_LAYERS, Activation, ExpertSpec, ModelSpec, checked, token_ids
from batchinfer.models.rope import local_rope_from_config, rope_from_config
from batchinfer.models.scheme import scheme_from_config

PLAIN: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
GATED: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""hidden_act of MLPs without and with a gate."""

LAYER_TYPES = ("full_attention", "sliding_attention")

HARMLESS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "do_layer_norm_before": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
    "use_bidirectional_attention": False,
}
"""Keys of variants that the decoder lacks, with the value that leaves them out."""


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
    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    known = named_architecture(name)
    if known is None:
        raise unknown_architecture(name, "architectures", list(ARCHITECTURES), where, "auto_map" in config)
    name, head = known
    traits = ARCHITECTURES[name]
    keys = _renamed(config, traits, where)
    _refuse_unsupported(keys)

    heads, width = keys.count("num_attention_heads"), keys.count("hidden_size")
    if keys.config.get("head_dim") is None and width % heads:
        raise ModelError(f"{where}: hidden_size={width} is not a multiple of num_attention_heads={heads}; set head_dim")
    layers, head_dim = keys.count("num_hidden_layers"), keys.count("head_dim", width // heads)
    if layers > MAX_LAYERS:
        raise ModelError(f"{where}: num_hidden_layers={layers} is more than any model has ({MAX_LAYERS})")
    max_positions, rope, local_rope = keys.count("max_position_embeddings"), None, None
    position_rows = 0 if traits.rope else max_positions + traits.positions_offset
    if traits.rope:
        rope, max_positions = rope_from_config(keys, head_dim, max_positions, traits.partial_rope)
    if traits.local_rope:
        local_rope = local_rope_from_config(keys, head_dim, max_positions)
    nope = _nope(keys, layers) if traits.nope_layers else ()
    residual = keys.number("residual_multiplier", 1.0) if traits.multipliers else 1.0
    return checked(
        ModelSpec(
            architecture=name,
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=keys.count("num_key_value_heads", heads),
            head_dim=head_dim,
            mlp_width=keys.count("intermediate_size", 4 * width if name == "GPT2LMHeadModel" else None),
            vocab_size=keys.count("vocab_size"),
            # Norms forget the scale of what they read. So a residual of which all terms but the first are multiplied by
            # m is kept divided by m (here and in embed_scale), and no term is multiplied at all.
            norm_eps=keys.number("rms_norm_eps") / residual**2,
            tied_embeddings=keys.flag("tie_word_embeddings"),
            qkv_bias=keys.flag(traits.qkv_bias),
            o_bias=keys.flag(traits.o_bias),
            mlp_bias=keys.flag(traits.mlp_bias),
            qk_norm=traits.qk_norm,
            rope=rope,
            max_positions=max_positions,
            local_rope=local_rope,
            windows=_windows(keys, traits, layers, nope),
            nope=nope,
            position_rows=position_rows,
            position_offset=traits.positions_offset,
            layer_norm=traits.layer_norm,
            pre_norm=traits.pre_norm,
            post_norm=traits.post_norm,
            norm_offset=traits.norm_offset,
            parallel=bool(traits.parallel) and keys.flag(traits.parallel),
            activation=_activation(keys, traits),
            gated=traits.gated,
            experts=_experts(keys, layers) if traits.experts else None,
            embed_scale=_embed_scale(keys, traits, width) / residual,
            score_scale=_score_scale(keys, traits, head_dim),
            logit_scale=1 / keys.number("logits_scaling", 1.0) if traits.multipliers else 1.0,
            score_softcap=_cap(keys, "attn_logit_softcapping") if traits.soft_caps else 0.0,
            logit_softcap=_cap(keys, "final_logit_softcapping") if traits.soft_caps else 0.0,
            classes=len(labels(config, where)) if head == "classes" else 0,
            scheme=scheme_from_config(keys),
            bos_id=(token_ids(config.get("bos_token_id")) or (None,))[0],
            eos_ids=token_ids(config.get("eos_token_id")),
        ),
        where,
    ).with_head(head)


def _renamed(config: Mapping[str, Any], traits: Traits, where: str) -> Keys:
    """The config under Llama's names, defaults included."""
    given = {key: value for key, value in config.items() if value is not None}
    theirs = {ours: given[name] for ours, name in traits.keys.items() if name in given}
    return Keys({**traits.defaults, **given, **theirs}, where, traits.keys)


def refuse_quantised(keys: Keys) -> None:
    """Raise ModelError for a config of quantised weights: of encoders, which are small."""
    quantisation = keys.config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "?") if isinstance(quantisation, dict) else quantisation
        raise ModelError(
            f"{keys.where}: quantization_config ({method}) is not supported: use the unquantised (bf16, fp16, fp32) "
            "weights or a GGUF file of the model"
        )


def _refuse_unsupported(keys: Keys) -> None:
    for key, harmless in HARMLESS.items():
        value = keys.config.get(key, harmless)
        if value is not harmless:
            raise ModelError(f"{keys.where}: {key}={value!r} is not supported; it must be {str(harmless).lower()}")
    narrow, width = keys.config.get("word_embed_proj_dim"), keys.config.get("hidden_size")
    if narrow is not None and narrow != width:
        raise ModelError(
            f"{keys.where}: word_embed_proj_dim={narrow!r} is not supported; it must be hidden_size={width}"
        )


def _activation(keys: Keys, traits: Traits) -> Activation:
    known = GATED if traits.gated else PLAIN
    name = keys.config.get("hidden_act", "silu")
    if traits.gelu_is_tanh and name == "gelu":
        name = "gelu_pytorch_tanh"
    if not isinstance(name, str) or name not in known:
        shown = keys.names.get("hidden_act", "hidden_act")
        raise ModelError(f"{keys.where}: {shown}={name!r} is not supported; it must be one of {', '.join(known)}")
    return known[name]


def _embed_scale(keys: Keys, traits: Traits, width: int) -> float:
    if traits.scaled_embedding:
        return math.sqrt(width)
    return keys.number("embedding_multiplier", 1.0) if traits.multipliers else 1.0


def _score_scale(keys: Keys, traits: Traits, head_dim: int) -> float:
    if traits.multipliers:
        return keys.number("attention_multiplier", 1.0)
    return (keys.number("query_pre_attn_scalar", 256) if traits.soft_caps else head_dim) ** -0.5


def _cap(keys: Keys, key: str) -> float:
    return keys.number(key) if keys.config.get(key) is not None else 0.0


def _nope(keys: Keys, layers: int) -> tuple[bool, ...]:
    """Which layers do not rotate."""
    listed = keys.config.get("no_rope_layers")
    if listed is None:
        interval = keys.count("no_rope_layer_interval", 4)
        return tuple((i + 1) % interval == 0 for i in range(layers))
    if not isinstance(listed, list) or len(listed) != layers or any(item not in (0, 1) for item in listed):
        raise ModelError(f"{keys.where}: no_rope_layers must be a list of {layers} zeros (no rope) and ones")
    return tuple(item == 0 for item in listed)


def _windows(keys: Keys, traits: Traits, layers: int, nope: tuple[bool, ...]) -> tuple[int, ...]:
    """The window of each layer, 0 without one; () where no layer has one."""
    if not traits.windows or keys.config.get("sliding_window") in (None, 0):
        return ()
    if traits.window_switch and not keys.flag(traits.window_switch):
        return ()
    window, kinds = keys.count("sliding_window"), keys.config.get("layer_types")
    if kinds is not None and traits.windows != "all":
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in LAYER_TYPES for kind in kinds):
            raise ModelError(f"{keys.where}: layer_types must be a list of {layers}: {' or '.join(LAYER_TYPES)}")
        windowed = [kind == "sliding_attention" for kind in kinds]
    else:
        pattern, cut = keys.count("sliding_window_pattern", 6), keys.config.get("max_window_layers", 28)
        if type(cut) is not int or cut < 0:
            raise ModelError(f"{keys.where}: max_window_layers={cut!r} must be a whole number")
        rule: Callable[[int], bool] = {
            "all": lambda i: True,
            "late": lambda i: i >= cut,
            "early": lambda i: i < cut and i % 2 == 0,
            "even": lambda i: i % 2 == 0,
            "every": lambda i: (i + 1) % pattern != 0,
            "nope": lambda i: nope[i],
        }[traits.windows]
        windowed = [rule(i) for i in range(layers)]
    return tuple(window * has for has in windowed) if any(windowed) else ()


def _experts(keys: Keys, layers: int) -> ExpertSpec | None:
    step, dense = keys.count("decoder_sparse_step", 1), keys.config.get("mlp_only_layers", [])
    if not isinstance(dense, list) or any(type(item) is not int for item in dense):
        raise ModelError(f"{keys.where}: mlp_only_layers={dense!r} must be a list of layers")
    count, chosen = keys.count("num_experts"), keys.count("num_experts_per_tok")
    if chosen > count:
        raise ModelError(f"{keys.where}: num_experts_per_tok={chosen} is more than num_experts={count}")
    mixed = tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
    shared = keys.count("shared_expert_intermediate_size") if keys.config.get("shared_expert_intermediate_size") else 0
    width = keys.count("moe_intermediate_size")
    return ExpertSpec(count, chosen, width, keys.flag("norm_topk_prob"), shared, mixed) if any(mixed) else None
