"""ModelSpec from the metadata of a GGUF file. No torch."""

from __future__ import annotations

import math
from typing import Any

from batchinfer.models.architectures import ARCHITECTURES, GGUF_ARCHITECTURES, unknown_architecture
from batchinfer.models.files import ModelError
from batchinfer.models.gguf import GgufFile
from batchinfer.models.model_spec import Activation, ModelSpec, checked, token_ids
from batchinfer.models.rope import RopeSpec, rope_from_gguf

LOCAL_THETA = 10_000.0
"""Of Gemma 3's windowed layers, where the file does not say."""

BY_WIDTH = (("gemma2", 46), ("gemma3", 62))
"""The 27B models scale scores by width / heads, which differs from head_dim and is not in the file."""


def spec_from_gguf(file: GgufFile) -> ModelSpec:
    """ModelSpec of a GGUF file. Raises ModelError naming file and key."""
    arch = file.get("general.architecture", str, required=True)
    if arch not in GGUF_ARCHITECTURES:
        raise unknown_architecture(arch, "general.architecture", list(GGUF_ARCHITECTURES), file.path)
    traits = ARCHITECTURES[GGUF_ARCHITECTURES[arch]]
    tensors = {tensor.name: tensor for tensor in file.tensors}

    def need(key: str, kind: type = int) -> Any:
        return file.get(f"{arch}.{key}", kind, required=True)

    def have(key: str, kind: type, default: Any = None) -> Any:
        return file.get(f"{arch}.{key}", kind, default)

    width, heads, layers = need("embedding_length"), need("attention.head_count"), need("block_count")
    head_dim = have("attention.key_length", int, width // max(heads, 1))
    if have("attention.value_length", int, head_dim) != head_dim:
        raise ModelError(f"{file.path}: {arch}.attention.value_length differs from key_length, which is not supported")
    rotary = have("rope.dimension_count", int, head_dim)
    if rotary != head_dim and not (traits.partial_rope and 0 < rotary < head_dim and rotary % 2 == 0):
        raise ModelError(f"{file.path}: {arch}.rope.dimension_count must be the head's width {head_dim}")
    if have("expert_count", int, 0):
        raise ModelError(f"{file.path}: {arch}.expert_count: mixtures of experts are not supported")
    positions = need("context_length")
    rope = rope_from_gguf(file, arch, rotary, positions)
    local = RopeSpec("default", have("rope.freq_base_swa", float, LOCAL_THETA), rotary, positions)
    epsilon = "attention.layer_norm_epsilon" if traits.layer_norm else "attention.layer_norm_rms_epsilon"
    residual = (have("residual_scale", float) or 1.0) if traits.multipliers else 1.0
    embed_scale = math.sqrt(width) if traits.scaled_embedding else have("embedding_scale", float, 1.0)
    by_width = (arch, layers) in BY_WIDTH
    activation: Activation = "gelu_tanh" if traits.scaled_embedding or not traits.gated else "silu"
    return checked(
        ModelSpec(
            architecture=GGUF_ARCHITECTURES[arch],
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=have("attention.head_count_kv", int, heads),
            head_dim=head_dim,
            mlp_width=need("feed_forward_length"),
            vocab_size=tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else need("vocab_size"),
            norm_eps=need(epsilon, float) / residual**2,  # as in spec_from_config
            tied_embeddings="output.weight" not in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
            o_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_up.bias" in tensors,
            qk_norm=traits.qk_norm,
            rope=rope,
            max_positions=positions,
            local_rope=local if traits.local_rope else None,
            windows=_windows(have("attention.sliding_window", int, 0), arch, layers),
            layer_norm=traits.layer_norm,
            pre_norm=traits.pre_norm,
            post_norm=traits.post_norm,
            activation=activation,
            gated=traits.gated,
            embed_scale=embed_scale / residual,
            score_scale=have("attention.scale", float, (width / heads if by_width else head_dim) ** -0.5),
            logit_scale=1 / (have("logit_scale", float) or 1.0),
            score_softcap=have("attn_logit_softcapping", float, 0.0),
            logit_softcap=have("final_logit_softcapping", float, 0.0),
            bos_id=file.get("tokenizer.ggml.bos_token_id", int),
            eos_ids=token_ids(file.get("tokenizer.ggml.eos_token_id", int)),
        ),
        file.path,
    )


def _windows(window: int, arch: str, layers: int) -> tuple[int, ...]:
    """The window of each layer; files name its width, and which layers have it follows from the architecture."""
    if not window:
        return ()
    every = {"gemma2": 2, "gemma3": 6}.get(arch)
    return tuple(0 if every and (i + 1) % every == 0 else window for i in range(layers))
