"""What a config of ModernBERT says, and what its files must hold. No torch.

Warner et al., "Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder", 2024 (arXiv:2412.13663): norms stand
before attention and MLP, positions rotate, the MLP has a gate, and most layers see their neighbourhood alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from batchinfer.models.files import Keys, ModelError
from batchinfer.models.layout import Layout
from batchinfer.models.model_spec import Activation
from batchinfer.models.rope import RopeSpec, local_rope_from_config, rope_from_config
from batchinfer.models.spec import PLAIN, layer_types

if TYPE_CHECKING:
    from batchinfer.models.encoder_spec import EncoderSpec

FAMILY, ROOT = "ModernBert", "model."


@dataclass(frozen=True)
class ModernBert:
    """Where ModernBERT differs from BERT. ``local``: the layers whose tokens see those up to ``reach`` positions away,
    and rotate by ``local_rope``. Biases: of attention and MLP, of norms, of the head's dense layer; the classes have
    one. ``pooled``: what a classification head reads."""

    rope: RopeSpec
    local_rope: RopeSpec
    local: tuple[bool, ...]
    reach: int
    attention_bias: bool
    mlp_bias: bool
    norm_bias: bool
    head_bias: bool
    head_activation: Activation
    pooled: Literal["cls", "mean"]


def modernbert(config: Mapping[str, Any], where: str, layers: int, head_width: int) -> ModernBert:
    """Raises ModelError."""
    given = {key: value for key, value in config.items() if value is not None}
    given |= {"rope_theta": given.get("global_rope_theta", 160000.0)}
    given |= {"rope_local_base_freq": given.get("local_rope_theta", 10000.0)}
    keys = Keys(given, where)
    positions = keys.count("max_position_embeddings")
    if head_width % 2:
        raise ModelError(f"{where}: heads of {head_width} values cannot rotate, which takes an even number")
    if "layer_types" in given:
        kinds = layer_types(keys, layers)
    else:
        every = keys.count("global_attn_every_n_layers", 3)
        kinds = ["sliding_attention" if i % every else "full_attention" for i in range(layers)]
    pooled = keys.config.get("classifier_pooling", "cls")
    if pooled not in ("cls", "mean"):
        raise ModelError(f"{where}: classifier_pooling={pooled!r} is not supported; it must be cls or mean")
    return ModernBert(
        rope=rope_from_config(keys, head_width, positions)[0],
        local_rope=local_rope_from_config(keys, head_width, positions),
        local=tuple(kind == "sliding_attention" for kind in kinds),
        reach=keys.count("local_attention", 128) // 2,
        attention_bias=keys.flag("attention_bias"),
        mlp_bias=keys.flag("mlp_bias"),
        norm_bias=keys.flag("norm_bias"),
        head_bias=keys.flag("classifier_bias"),
        head_activation=plain_activation(keys, "classifier_activation"),
        pooled=pooled,
    )


def plain_activation(keys: Keys, key: str) -> Activation:
    """Of the MLP's gate or the head; GELU where the config leaves it out. Raises ModelError."""
    name = keys.config.get(key, "gelu")
    if name not in PLAIN:
        raise ModelError(f"{keys.where}: {key}={name!r} is not supported; it must be one of {', '.join(PLAIN)}")
    return PLAIN[name]


def modernbert_layout(spec: EncoderSpec, modern: ModernBert) -> Layout:
    """As ``encoder_layout`` has it, but there is one table, ``word``; the first layer has no attn_norm; up [2*I, D] has
    what the activation is of in its first half; final_norm; and of a head dense, head_norm and classes."""
    plan, d, inner = Layout(ROOT), spec.width, spec.mlp_width
    plan.add("word", (f"{ROOT}embeddings.tok_embeddings",), (spec.vocab_size,), d)

    def norm(target: str, name: str) -> None:
        plan.add(target, (name,), (d,), bias=modern.norm_bias)

    norm("norm", f"{ROOT}embeddings.norm")
    for i in range(spec.layers):
        stored, ours = f"{ROOT}layers.{i}.", f"layers.{i}."
        if i:
            norm(f"{ours}attn_norm", f"{stored}attn_norm")
        plan.add(f"{ours}qkv", (f"{stored}attn.Wqkv",), (3 * d,), d, modern.attention_bias)
        plan.add(f"{ours}o", (f"{stored}attn.Wo",), (d,), d, modern.attention_bias)
        norm(f"{ours}mlp_norm", f"{stored}mlp_norm")
        plan.add(f"{ours}up", (f"{stored}mlp.Wi",), (2 * inner,), d, modern.mlp_bias)
        plan.add(f"{ours}down", (f"{stored}mlp.Wo",), (d,), inner, modern.mlp_bias)
    norm("final_norm", f"{ROOT}final_norm")
    if spec.head == "classes":
        plan.add("dense", ("head.dense",), (d,), d, modern.head_bias)
        norm("head_norm", "head.norm")
        plan.add("classes", ("classifier",), (spec.classes,), d, bias=True)
    unused = {"head.dense", "head.norm", "decoder", "classifier"} - {name.rpartition(".")[0] for name in plan.parts}
    plan.ignored = frozenset(f"{name}.{kind}" for name in unused for kind in ("weight", "bias"))
    return plan
