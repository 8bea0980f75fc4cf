"""What kind of decoder a model is, as numbers and flags: ModelSpec. No torch, no files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from batchinfer.models.architectures import QKNorm
from batchinfer.models.files import ModelError
from batchinfer.models.rope import RopeSpec
from batchinfer.models.scheme import Scheme
from batchinfer.types import Head

MAX_LAYERS = 10_000
"""Names are made for every tensor of every layer before the files are compared with them."""

Activation = Literal["silu", "gelu_tanh", "gelu", "relu"]


@dataclass(frozen=True)
class ExpertSpec:
    """A mixture of experts in place of the MLP: ``count`` MLPs of ``width``, ``per_token`` of which a token goes
    through, weighted by the router's softmax (``renormalise``: divided by the sum of what was chosen).

    ``shared_width`` > 0: one more, that every token goes through, weighted by a sigmoid. ``layers``: which layers are
    mixtures.
    """

    count: int
    per_token: int
    width: int
    renormalise: bool
    shared_width: int
    layers: tuple[bool, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Of all experts, the shared one last."""
        return (self.width,) * self.count + ((self.shared_width,) if self.shared_width else ())


class LayerKind(NamedTuple):
    """What a layer's attention sees (``window`` positions, 0: all) and how it rotates ("": not)."""

    window: int
    rope: Literal["", "global", "local"]


@dataclass(frozen=True)
class ModelSpec:
    """The one decoder's flags. ``max_positions`` is the longest sequence that the model is meant for.

    ``windows`` per layer: the number of positions that a token sees (0: all). ``rope`` None: positions are learned, or
    of no account; ``local_rope``: that of the windowed layers. ``nope``: which layers do not rotate. ``position_rows``:
    rows of the table of learned positions, that of position 0 is ``position_offset``. ``pre_norm`` before attention and
    MLP, ``post_norm`` behind. ``parallel``: attention and MLP read the same residual. ``norm_offset`` is added to the
    norms' stored weights. ``embed_scale``, ``score_scale`` and ``logit_scale`` multiply embeddings, attention's scores
    and logits; the soft caps (0: none) bound the latter two. ``scheme``: what its files store quantised matrices as.
    """

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
    qk_norm: QKNorm
    rope: RopeSpec | None
    max_positions: int
    local_rope: RopeSpec | None = None
    windows: tuple[int, ...] = ()
    nope: tuple[bool, ...] = ()
    position_rows: int = 0
    position_offset: int = 0
    layer_norm: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    norm_offset: float = 0.0
    parallel: bool = False
    activation: Activation = "silu"
    gated: bool = True
    experts: ExpertSpec | None = None
    embed_scale: float = 1.0
    score_scale: float = 0.0  # 0: one over the root of head_dim
    logit_scale: float = 1.0
    score_softcap: float = 0.0
    logit_softcap: float = 0.0
    head: Head = "tokens"
    classes: int = 0  # of a classification head
    scheme: Scheme | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @property
    def fused_gate(self) -> bool:
        """Whether the MLP is silu(gate) * up, which is one op together with its product."""
        return self.gated and self.activation == "silu"

    @property
    def tied_head(self) -> bool:
        """Whether the embedding is the LM head too."""
        return self.head == "tokens" and self.tied_embeddings

    def resolve_length(self, max_model_len: int = 0) -> int:
        """The longest sequence of a run: ``max_model_len``, or the model's own for 0. Raises ModelError."""
        length = max_model_len or self.max_positions
        # Dynamic scaling stretches the frequencies of a run that is longer than the training, and of no other.
        stretch = self.rope.factor if self.rope is not None and self.rope.type == "dynamic" else 1
        limit = int(self.max_positions * stretch)
        if length > limit:
            raise ModelError(f"engine.max_model_len={length} is above the model's {limit} positions: lower it")
        return length

    def with_head(self, head: Head) -> ModelSpec:
        """The spec of the same layers, used with another head. What scales and bounds logits is the LM head's."""
        return self if head == self.head else replace(self, head=head, logit_scale=1.0, logit_softcap=0.0)

    def with_token_head(self, tokens: int) -> ModelSpec:
        """The spec of the model with that many tokens in its LM head, as a classification head."""
        return replace(self, head="classes", classes=tokens)

    def layer_kinds(self, max_positions: int) -> tuple[LayerKind, ...]:
        """Of each layer, for sequences of at most ``max_positions`` tokens, where wider windows change nothing."""
        kinds = []
        for i in range(self.layers):
            window = self.windows[i] if self.windows else 0
            rope = "local" if window and self.local_rope is not None else "global"
            if self.rope is None or (self.nope and self.nope[i]):
                rope = ""
            kinds.append(LayerKind(window if window < max_positions else 0, rope))
        return tuple(kinds)

    def mixed(self, layer: int) -> bool:
        """Whether the layer's MLP is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]


def checked(spec: ModelSpec, where: str) -> ModelSpec:
    """The spec, if what must hold between its numbers does. Raises ModelError."""
    if spec.layers > MAX_LAYERS:
        raise ModelError(
            f"{where}: {spec.layers} layers are more than any model has ({MAX_LAYERS}): the file is damaged"
        )
    if spec.heads % spec.kv_heads:
        raise ModelError(f"{where}: {spec.heads} attention heads cannot share {spec.kv_heads} key/value heads evenly")
    if spec.rope is not None and spec.head_dim % 2:
        raise ModelError(f"{where}: head_dim={spec.head_dim} is odd; rotary embeddings need an even one")
    return spec


def token_ids(value: object) -> tuple[int, ...]:
    """A config's token id: absent, one number or a list of them."""
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if type(item) is int and item >= 0)
