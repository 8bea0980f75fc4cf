"""What the files of a model must hold, and where each stored tensor goes: a table made of the spec. No I/O.

The names and shapes of what weights are streamed as (``Layout.targets``, each once):

    embed [V, D], positions [rows, D], norm [D], lm_head [V, D] (absent when tied; classes [C, D] of a classifier stand
    in its place, or nothing), and for every layer i, as ``layers.i.NAME``: attn_norm, attn_post_norm, mlp_norm,
    mlp_post_norm [D]; qkv [(H+2G)*E, D], or with latent attention what _add_latent makes; o [D, H*E]; q_norm, k_norm
    [E] or [H*E], [G*E]; sinks [H]; gate_up [2*I, D] ([I, D] without a gate); down [D, I]; or of a mixture: router
    [X, D] (one row more for a weighed shared expert), router_correction [X], experts.j.gate_up, experts.j.down, the
    shared expert last. Biases have the name of their matrix or norm with ``_bias``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from batchinfer.models.architectures import ARCHITECTURES, Names
from batchinfer.models.model_spec import LatentSpec, ModelSpec
from batchinfer.models.mxfp4 import MXFP4_BLOCK
from batchinfer.models.scheme import Component

Order = Literal["", "pairs", "transposed", "transposed_pairs", "by_head", "blocks", "block_pairs", "scales"]
MXFP4_ORDERS = ("blocks", "block_pairs", "scales")

TABLES = ("embed", "positions", "word", "position", "token_type")
"""Matrices of which rows are gathered."""


@dataclass(frozen=True)
class Part:
    """Where a stored tensor goes: ``shape`` rows from ``row`` on of ``target``.

    ``order`` of what is stored: "pairs": each of ``heads`` heads has its rotary pairs side by side, not in halves;
    "transposed"; "transposed_pairs": both; "by_head": q, k, v of one head, then of the next; "blocks" and "scales": the
    two parts of a matrix in MXFP4 (models/mxfp4.py), of which "block_pairs" has rows that are pairs. ``offset`` is
    added. ``component``: the tensor is one of those that these rows are stored as.
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
        return self.shape[::-1] if self.order.startswith("transposed") else self.shape

    @property
    def pairs(self) -> bool:
        return self.order.endswith("pairs")


@dataclass
class Layout:
    """``parts``: stored name -> Part. ``targets``: streamed name -> shape. ``ignored``: stored names without a use.
    ``root`` is what some checkpoints leave out before a name. ``stacks``: stored names of several tensors in one, which
    are as many parts: NAME[0], NAME[1] ... ``ignored_under``: nor is there a use for what begins so, the layer of
    DeepSeek-V3 that guesses the token after the next."""

    root: str = ""
    parts: dict[str, Part] = field(default_factory=dict)
    targets: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    stacks: set[str] = field(default_factory=set)
    ignored_under: str | None = None

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

    def add_stack(self, targets: list[str], name: str, shape: tuple[int, ...], order: Order) -> None:
        """Matrices (or vectors) of one shape, all in one stored tensor."""
        self.stacks.add(name)
        for j, target in enumerate(targets):
            self.parts[f"{name}[{j}]"] = Part(target, 0, shape, order, heads=1)

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
    if spec.latent is not None:
        plan.ignored_under = names.root + names.layer.format(spec.layers)
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
    if spec.latent is not None:
        q = _add_latent(plan, spec, spec.latent, ours, stored + "self_attn.")
    else:
        plan.add(f"{ours}qkv", full(names.qkv), (q, kv, kv), d, spec.qkv_bias, orders, heads)
    if spec.qk_norm:
        widths = (spec.head_dim, spec.head_dim) if spec.qk_norm == "head" else (q, kv)
        for kind, name, width in zip("qk", (names.q_norm, names.k_norm), widths, strict=True):
            _add_norm(plan, spec, f"{ours}{kind}_norm", stored + name, gguf, width)
    plan.add(f"{ours}o", full((names.o,)), (d,), q, spec.o_bias, (matrix,))
    if spec.sinks:
        plan.parts[f"{stored}self_attn.sinks"] = Part(f"{ours}sinks", 0, (spec.heads,))
        plan.targets[f"{ours}sinks"] = (spec.heads,)
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


def _add_latent(plan: Layout, spec: ModelSpec, latent: LatentSpec, ours: str, stored: str) -> int:
    """q_b [H*(plain+rotated), query rank], of the latent queries q_a [query rank, D] with their q_a_norm, or [.., D]
    without; kv_a [rank+rotated, D], kv_a_norm [rank], kv_b [H*(plain+values), rank]. The width of what ``o`` reads."""

    def matrix(target: str, name: str, rows: int, columns: int, bias: bool = False) -> None:
        plan.add(ours + target, (stored + name,), (rows,), columns, bias)

    if latent.query_rank:
        matrix("q_a", "q_a_proj", latent.query_rank, spec.width, spec.qkv_bias)
        _add_norm(plan, spec, f"{ours}q_a_norm", stored + "q_a_layernorm", False, latent.query_rank)
    name = "q_b_proj" if latent.query_rank else "q_proj"
    matrix("q_b", name, spec.heads * (latent.plain + latent.rotated), latent.query_rank or spec.width)
    matrix("kv_a", "kv_a_proj_with_mqa", latent.rank + latent.rotated, spec.width, spec.qkv_bias)
    _add_norm(plan, spec, f"{ours}kv_a_norm", stored + "kv_a_layernorm", False, latent.rank)
    matrix("kv_b", "kv_b_proj", spec.heads * (latent.plain + latent.values), latent.rank)
    return spec.heads * latent.values


def _add_experts(plan: Layout, spec: ModelSpec, names: Names, ours: str, stored: str) -> None:
    """The router and the experts; a shared expert's gate is the router's last row, and it itself the last expert."""
    experts = spec.experts
    assert experts is not None
    routers, rows = (stored + names.router,), (experts.count,)
    places = [stored + names.expert.format(j) for j in range(experts.count)]
    if experts.shared_width and experts.shared_gate:
        routers, rows = (*routers, stored + names.shared_router), (*rows, 1)
    if experts.shared_width:
        places.append(stored + names.shared_expert)
    plan.add(f"{ours}router", routers, rows, spec.width, bias=experts.stacked)
    if experts.correction:
        target = f"{ours}router_correction"
        plan.parts[f"{stored}{names.router}.e_score_correction_bias"] = Part(target, 0, (experts.count,))
        plan.targets[target] = (experts.count,)
    if experts.stacked:
        _add_stacked(plan, spec, ours, stored + "mlp.experts.")
        return
    for j, (place, width) in enumerate(zip(places, experts.widths, strict=True)):
        gate_up = tuple(place + name for name in names.expert_gate_up)
        plan.add(f"{ours}experts.{j}.gate_up", gate_up, (width, width), spec.width)
        plan.add(f"{ours}experts.{j}.down", (place + names.expert_down,), (spec.width,), width)


def _add_stacked(plan: Layout, spec: ModelSpec, ours: str, stored: str) -> None:
    """Experts as GPT-OSS has them: matrices [in, out], of which gates and values alternate; or in MXFP4, [out, in]."""
    experts = spec.experts
    assert experts is not None
    shapes = {"gate_up": (2 * experts.width, spec.width), "down": (spec.width, experts.width)}
    for kind, (rows, columns) in shapes.items():
        name, pairs = f"{stored}{kind}_proj", kind == "gate_up"
        targets = [f"{ours}experts.{j}.{kind}" for j in range(experts.count)]
        biases = [f"{target}_bias" for target in targets]
        plan.targets |= dict.fromkeys(targets, (rows, columns)) | dict.fromkeys(biases, (rows,))
        plan.add_stack(biases, f"{name}_bias", (rows,), "pairs" if pairs else "")
        if experts.mxfp4:
            blocks = (rows, columns // MXFP4_BLOCK, MXFP4_BLOCK // 2)
            plan.add_stack(targets, f"{name}_blocks", blocks, "block_pairs" if pairs else "blocks")
            plan.add_stack(targets, f"{name}_scales", blocks[:2], "scales")
        else:
            plan.add_stack(targets, name, (rows, columns), "transposed_pairs" if pairs else "transposed")


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
