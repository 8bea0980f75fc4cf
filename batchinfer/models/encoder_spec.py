"""What kind of encoder a model is (BERT and its like), and what its files must hold: EncoderSpec. No torch.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2019 (arXiv:1810.04805): every token sees all
others, norms stand behind attention and MLP, positions are learned.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from batchinfer.models.files import Keys, ModelError, read_json
from batchinfer.models.gguf import is_gguf
from batchinfer.models.labels import labels
from batchinfer.models.layout import Layout
from batchinfer.models.model_spec import MAX_LAYERS, Activation
from batchinfer.models.modernbert_spec import FAMILY, ModernBert, modernbert, modernbert_layout, plain_activation
from batchinfer.models.spec import refuse_quantised
from batchinfer.types import Head

ENCODERS = {"Bert": "bert.", "Roberta": "roberta.", "XLMRoberta": "roberta."}
"""BERT's families by what their names begin with, and the root of the names of their weights."""

SUFFIXES: dict[str, Head] = {"Model": "hidden", "ForMaskedLM": "hidden", "ForSequenceClassification": "classes"}

HARMLESS = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
"""Keys of variants that the encoder lacks, with the value that leaves them out."""


@dataclass(frozen=True)
class EncoderSpec:
    """``family``: a key of ENCODERS. ``position_rows`` of the table of positions, that of position 0 is
    ``position_offset``; ``type_rows``: kinds of texts (first, second). ``modern`` is None but for ModernBERT,
    which has neither table."""

    architecture: str
    family: str
    layers: int
    width: int
    heads: int
    mlp_width: int
    vocab_size: int
    position_rows: int
    position_offset: int
    type_rows: int
    norm_eps: float
    activation: Activation
    head: Head
    classes: int
    modern: ModernBert | None = None

    tied_head: ClassVar[bool] = False
    fused_gate: ClassVar[bool] = False
    """As in ModelSpec: no encoder has them."""

    @property
    def max_positions(self) -> int:
        return self.position_rows - self.position_offset

    def resolve_length(self, max_model_len: int = 0) -> int:
        """The longest text of a run: ``max_model_len``, or the model's own for 0. Raises ModelError."""
        if max_model_len > self.max_positions:
            raise ModelError(
                f"engine.max_model_len={max_model_len} is above the model's {self.max_positions} positions"
            )
        return max_model_len or self.max_positions


def encoder_spec(model_path: str) -> EncoderSpec | None:
    """The spec of a model folder, None if it is no encoder. Raises ModelError."""
    where = os.path.join(model_path, "config.json")
    if is_gguf(model_path) or not os.path.exists(where):
        return None
    config = read_json(where)
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    for family in (*ENCODERS, FAMILY):
        for suffix, head in SUFFIXES.items():
            if name == family + suffix:
                return _spec(name, family, head, config, where)
    return None


def _spec(name: str, family: str, head: Head, config: Mapping[str, Any], where: str) -> EncoderSpec:
    keys = Keys({key: value for key, value in config.items() if value is not None}, where)
    refuse_quantised(keys)
    modern = family == FAMILY
    for key, harmless in HARMLESS.items() if not modern else ():
        if keys.config.get(key, harmless) != harmless:
            raise ModelError(f"{where}: {key}={keys.config[key]!r} is not supported; it must be {harmless}")
    width, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    layers, offset = keys.count("num_hidden_layers"), 0
    if width % heads or layers > MAX_LAYERS:
        raise ModelError(f"{where}: {layers} layers with {heads} heads of {width} values together make no sense")
    if family not in ("Bert", FAMILY):  # positions are counted from the padding token's on, which has one itself
        pad = keys.config.get("pad_token_id", 1)
        if type(pad) is not int or pad < 0:
            raise ModelError(f"{where}: pad_token_id={pad!r} must be a token id, from which positions are counted")
        offset = pad + 1
    return EncoderSpec(
        architecture=name,
        family=family,
        layers=layers,
        width=width,
        heads=heads,
        mlp_width=keys.count("intermediate_size"),
        vocab_size=keys.count("vocab_size"),
        position_rows=keys.count("max_position_embeddings"),
        position_offset=offset,
        type_rows=1 if modern else keys.count("type_vocab_size"),
        norm_eps=keys.number("norm_eps", 1e-5) if modern else keys.number("layer_norm_eps", 1e-12),
        activation=plain_activation(keys, "hidden_activation" if modern else "hidden_act"),
        head=head,
        classes=len(labels(config, where)) if head == "classes" else 0,
        modern=modernbert(config, where, layers, width // heads) if modern else None,
    )


def encoder_layout(spec: EncoderSpec) -> Layout:
    """Where each stored tensor goes: words, positions, types, norm; of each layer qkv, o, attn_norm, up, down,
    mlp_norm; and of a classification head dense and classes. All but the tables have a bias."""
    if spec.modern is not None:
        return modernbert_layout(spec, spec.modern)
    root, d = ENCODERS[spec.family], spec.width
    plan = Layout(root)
    tables = {"word": spec.vocab_size, "position": spec.position_rows, "token_type": spec.type_rows}
    for name, rows in tables.items():
        plan.add(name, (f"{root}embeddings.{name}_embeddings",), (rows,), d)

    def norm(target: str, name: str) -> None:
        plan.add(target, (f"{root}{name}.LayerNorm",), (d,), bias=True)

    norm("norm", "embeddings")
    for i in range(spec.layers):
        stored, ours = f"encoder.layer.{i}.", f"layers.{i}."
        qkv = tuple(f"{root}{stored}attention.self.{part}" for part in ("query", "key", "value"))
        plan.add(f"{ours}qkv", qkv, (d, d, d), d, bias=True)
        plan.add(f"{ours}o", (f"{root}{stored}attention.output.dense",), (d,), d, bias=True)
        norm(f"{ours}attn_norm", f"{stored}attention.output")
        plan.add(f"{ours}up", (f"{root}{stored}intermediate.dense",), (spec.mlp_width,), d, bias=True)
        plan.add(f"{ours}down", (f"{root}{stored}output.dense",), (d,), spec.mlp_width, bias=True)
        norm(f"{ours}mlp_norm", f"{stored}output")
    pooler = f"{root}pooler.dense"
    if spec.head == "classes":
        bert = spec.family == "Bert"
        plan.add("dense", (pooler if bert else "classifier.dense",), (d,), d, bias=True)
        plan.add("classes", ("classifier" if bert else "classifier.out_proj",), (spec.classes,), d, bias=True)
    unused = {pooler, f"{root}embeddings.position_ids", *UNUSED} - {name.rpartition(".")[0] for name in plan.parts}
    names = {f"{name}{end}" for name in unused for end in ("", ".weight", ".bias")}
    plan.ignored = frozenset(names | {name.removeprefix(root) for name in names})
    return plan


UNUSED = ("cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")
UNUSED += ("cls.predictions.decoder", "cls.seq_relationship", "lm_head", "lm_head.dense", "lm_head.layer_norm")
UNUSED += ("lm_head.decoder",)
"""Heads of the training, that nothing here asks for."""
