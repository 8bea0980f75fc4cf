"""What the files of a model must hold, and where each stored tensor goes: a table made of the spec. No I/O.

The names and shapes of what weights are streamed as (``Layout.targets``, each once):

    embed [V, D], positions [rows, D], norm [D], lm_head [V, D] (absent when tied; classes [C, D] of a classifier stand
    in its place, or nothing), and for every layer i, as ``layers.i.NAME``: attn_norm, attn_post_norm, mlp_norm,
    mlp_post_norm [D]; qkv [(H+2G)*E, D]; o [D, H*E]; q_norm, k_norm [E] or [H*E], [G*E]; gate_up [2*I, D] ([I, D]
    without a gate); down [D, I]; or of a mixture: router [X, D] (one row more for a shared expert), experts.j.gate_up,
    experts.j.down, the shared expert last. Biases have the name of their matrix or norm with ``_bias``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from batchinfer.models.architectures import ARCHITECTURES, Names
from batchinfer.models.model_spec import ModelSpec
from batchinfer.models.scheme import Component

Order = Literal["", "pairs", "transposed", "by_head"]


TABLES = ("embed", "positions", "word", "position", "token_type")
"""Matrices of which rows are gathered."""


@dataclass(frozen=True)
class Part:
    """Where a stored tensor goes: ``shape`` rows from ``row`` on of ``target``.

    ``order`` of what is stored: "pairs": each of ``heads`` heads has its rotary pairs side by side, not in halves;
    "transposed"; "by_head": q, k, v of one head, then of the next. ``offset`` is added. ``component``: the tensor is
    one of those that these rows are stored as.
    """

    target: str
    row: int
    shape: tuple[int, ...]
    order: Order = ""
    heads: int = 0
    offset: float = 0.0
    component: Component | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the file."""
        return self.shape[::-1] if self.order == "transposed" else self.shape


@dataclass
class Layout:
    """``parts``: stored name -> Part. ``targets``: streamed name -> shape. ``ignored``: stored names without a use.
    ``root`` is what some checkpoints leave out before a name."""

    root: str = ""
    parts: dict[str, Part] = field(default_factory=dict)
    targets: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    def add(
        self,
        target: str,
        names: tuple[str, ...],
        rows: tuple[int, ...],
        columns: int = 0,
        bias: bool = False,
        orders: tuple[Order, ...] = (),
        heads: tuple[int, ...] = (),
        offset: float = 0.0,
    ) -> None:
        """A matrix (or a vector, without ``columns``) of stored tensors with so many rows; one name holds all rows."""
        if len(names) == 1:
            rows = (sum(rows),)
        orders, heads = orders or ("",) * len(names), heads or (0,) * len(names)
        row = 0
        for name, count, order, its_heads in zip(names, rows, orders, heads, strict=True):
            shape = (count, columns) if columns else (count,)
            self.parts[name + ".weight"] = Part(target, row, shape, order, its_heads, offset)
            if bias:
                plain = "" if order == "transposed" else order
                self.parts[name + ".bias"] = Part(f"{target}_bias", row, (count,), plain, its_heads)
            row += count
        self.targets[target] = (row, columns) if columns else (row,)
        if bias:
            self.targets[f"{target}_bias"] = (row,)

    def name(self, stored: str) -> str:
        """The name in ``parts`` of a stored tensor's name."""
        return stored if stored in self.parts or self.root + stored not in self.parts else self.root + stored


GGUF_NAMES = Names(
    root="",
    embed="token_embd",
    positions="position_embd",
    layer="blk.{}.",
    norm="output_norm",
    head="output",
    attn_norm="attn_norm",
    qkv=("attn_q", "attn_k", "attn_v"),
    q_norm="attn_q_norm",
    k_norm="attn_k_norm",
    o="attn_output",
    attn_post_norm="post_attention_norm",
    mlp_norm="ffn_norm",
    gate_up=("ffn_gate", "ffn_up"),
    down="ffn_down",
    mlp_post_norm="post_ffw_norm",
)
CLASSES = "score"
"""What Hugging Face calls the matrix of a classification head, in every architecture."""

PAIRED = {"LlamaForCausalLM", "GraniteForCausalLM"}
"""llama.cpp rotates neighbours (2j, 2j+1) for these and stores q and k accordingly."""


def layout(spec: ModelSpec, gguf: bool = False) -> Layout:
    """The layout under the names of Hugging Face or of GGUF."""
    traits = ARCHITECTURES[spec.architecture]
    names = _gguf_names(spec) if gguf else traits.names
    plan = Layout(root=names.root[: names.root.find(".") + 1])
    plan.add("embed", (names.root + names.embed,), (spec.vocab_size,), spec.width)
    if spec.position_rows:
        plan.add("positions", (names.root + names.positions,), (spec.position_rows,), spec.width)
    for i in range(spec.layers):
        _add_layer(plan, spec, names, i, gguf)
    _add_norm(plan, spec, "norm", names.root + names.norm, gguf)
    own_head = spec.head == "tokens" and not spec.tied_embeddings
    if own_head:
        plan.add("lm_head", (names.head,), (spec.vocab_size,), spec.width)
    if spec.head == "classes":
        plan.add("classes", (CLASSES,), (spec.classes,), spec.width)
    unused = {"rope_freqs.weight"} if gguf else set()
    if spec.head != "tokens" or (spec.tied_embeddings and not gguf):
        unused.add(f"{names.head}.weight")
    if spec.head == "hidden":
        unused.add(f"{CLASSES}.weight")
    plan.ignored = frozenset(unused)
    return plan


def num_parameters(spec: ModelSpec) -> int:
    """Weights, biases and norms, a tied embedding counted once."""
    return sum(math.prod(shape) for shape in layout(spec).targets.values())


def _add_layer(plan: Layout, spec: ModelSpec, names: Names, i: int, gguf: bool) -> None:
    traits = ARCHITECTURES[spec.architecture]
    d, q, kv = spec.width, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    stored, ours = names.root + names.layer.format(i), f"layers.{i}."
    matrix: Order = "transposed" if traits.transposed and not gguf else ""
    orders: tuple[Order, ...] = (matrix,) * len(names.qkv)
    heads: tuple[int, ...] = ()
    if traits.qkv_by_head and not gguf:
        orders, heads = ("by_head",), (spec.heads,)
    if gguf and spec.architecture in PAIRED:
        orders, heads = ("pairs", "pairs", ""), (spec.heads, spec.kv_heads, 0)

    def full(parts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(stored + part for part in parts)

    if spec.pre_norm:
        _add_norm(plan, spec, f"{ours}attn_norm", stored + names.attn_norm, gguf)
    plan.add(f"{ours}qkv", full(names.qkv), (q, kv, kv), d, spec.qkv_bias, orders, heads)
    if spec.qk_norm:
        widths = (spec.head_dim, spec.head_dim) if spec.qk_norm == "head" else (q, kv)
        for kind, name, width in zip("qk", (names.q_norm, names.k_norm), widths, strict=True):
            _add_norm(plan, spec, f"{ours}{kind}_norm", stored + name, gguf, width)
    plan.add(f"{ours}o", full((names.o,)), (d,), q, spec.o_bias, (matrix,))
    if spec.post_norm:
        _add_norm(plan, spec, f"{ours}attn_post_norm", stored + names.attn_post_norm, gguf)
    if spec.pre_norm:
        _add_norm(plan, spec, f"{ours}mlp_norm", stored + names.mlp_norm, gguf)
    if spec.mixed(i):
        _add_experts(plan, spec, names, ours, stored)
    else:
        width = spec.mlp_width
        rows = (width, width) if spec.gated else (width,)
        plan.add(f"{ours}gate_up", full(names.gate_up), rows, d, spec.mlp_bias, (matrix,) * len(names.gate_up))
        plan.add(f"{ours}down", full((names.down,)), (d,), width, spec.mlp_bias, (matrix,))
    if spec.post_norm:
        _add_norm(plan, spec, f"{ours}mlp_post_norm", stored + names.mlp_post_norm, gguf)


def _add_experts(plan: Layout, spec: ModelSpec, names: Names, ours: str, stored: str) -> None:
    """The router and the experts; a shared expert's gate is the router's last row, and it itself the last expert."""
    experts = spec.experts
    assert experts is not None
    routers, rows = (stored + names.router,), (experts.count,)
    places = [stored + names.expert.format(j) for j in range(experts.count)]
    if experts.shared_width:
        routers, rows = (*routers, stored + names.shared_router), (*rows, 1)
        places.append(stored + names.shared_expert)
    plan.add(f"{ours}router", routers, rows, spec.width)
    for j, (place, width) in enumerate(zip(places, experts.widths, strict=True)):
        gate_up = tuple(place + name for name in names.expert_gate_up)
        plan.add(f"{ours}experts.{j}.gate_up", gate_up, (width, width), spec.width)
        plan.add(f"{ours}experts.{j}.down", (place + names.expert_down,), (spec.width,), width)


def _add_norm(plan: Layout, spec: ModelSpec, target: str, name: str, gguf: bool, width: int = 0) -> None:
    # Files in GGUF hold the weights with the offset in them.
    offset = 0.0 if gguf else spec.norm_offset
    plan.add(target, (name,), (width or spec.width,), 0, spec.layer_norm, offset=offset)


def _gguf_names(spec: ModelSpec) -> Names:
    """GGUF has the same names for all architectures, but merges what the model's own files merge."""
    theirs = ARCHITECTURES[spec.architecture].names
    qkv = GGUF_NAMES.qkv if len(theirs.qkv) == 3 else ("attn_qkv",)
    gate_up = GGUF_NAMES.gate_up if len(theirs.gate_up) == 2 else ("ffn_up",)
    return dataclasses.replace(GGUF_NAMES, qkv=qkv, gate_up=gate_up)
