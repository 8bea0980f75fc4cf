"""Weights as a stream of (name, tensor): read in file order, merged, converted; never the whole model twice.

The names and shapes of what comes out (all of :class:`Layout`'s targets, each once):

    embed [V, D], norm [D], lm_head [V, D] (absent when tied), and for every layer i, as ``layers.i.NAME``:
    attn_norm, mlp_norm [D]; qkv [(H+2G)*E, D]; o [D, H*E]; gate_up [2*I, D]; down [D, I]; q_norm, k_norm [E];
    qkv_bias, o_bias, gate_up_bias, down_bias

Matrices have the engine's dtype, vectors (norms and biases) are float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from batchinfer.models.files import Block, BlockReader, ModelError, OwnReading, Source, StoredTensor
from batchinfer.models.gguf import is_gguf, read_gguf
from batchinfer.models.safetensors import open_folder
from batchinfer.models.spec import ModelSpec

BLOCK_BYTES = 16 << 20
"""Read at a time: large enough for a parallel file system, small against a rank's memory, which holds up to four."""

ALIGNMENT = 8
"""Of a tensor in its block, in bytes: an element's address is a multiple of its size."""

PADDING = 64
"""Most bytes between two tensors that are read along; GGUF has up to 31."""

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Derived values that old checkpoints store."""


@dataclass(frozen=True)
class Part:
    """Where a stored tensor goes: ``shape`` rows from ``row`` on of ``target``. ``heads`` > 0: its rows are stored with
    each head's rotary pairs side by side and are put back into halves."""

    target: str
    row: int
    shape: tuple[int, ...]
    heads: int = 0


@dataclass(frozen=True)
class Piece:
    """``rows`` rows of a stored tensor from ``row`` on: the bytes from ``start`` to ``end`` of a block."""

    tensor: StoredTensor
    row: int
    rows: int
    start: int
    end: int


@dataclass(frozen=True)
class WeightBlock(Block):
    """A block and the rows in it."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Layout:
    """``parts``: stored name -> Part. ``targets``: streamed name -> shape. ``ignored``: stored names without a use."""

    parts: dict[str, Part]
    targets: dict[str, tuple[int, ...]]
    ignored: frozenset[str]


def layout(spec: ModelSpec, gguf: bool = False) -> Layout:
    """What the files of a model must hold, under the names of Hugging Face or of GGUF."""
    e, d, i = spec.head_dim, spec.width, spec.mlp_width
    q, kv = spec.heads * e, spec.kv_heads * e
    # target: ((rows of each part, stored names in Hugging Face and GGUF), ...), columns, bias?
    per_layer = {
        "attn_norm": ([(d, "input_layernorm", "attn_norm")], 0, False),
        "qkv": (
            [(q, "self_attn.q_proj", "attn_q"), (kv, "self_attn.k_proj", "attn_k"), (kv, "self_attn.v_proj", "attn_v")],
            d,
            spec.qkv_bias,
        ),
        "q_norm": ([(e, "self_attn.q_norm", "attn_q_norm")] if spec.qk_norm else [], 0, False),
        "k_norm": ([(e, "self_attn.k_norm", "attn_k_norm")] if spec.qk_norm else [], 0, False),
        "o": ([(d, "self_attn.o_proj", "attn_output")], q, spec.o_bias),
        "mlp_norm": ([(d, "post_attention_layernorm", "ffn_norm")], 0, False),
        "gate_up": ([(i, "mlp.gate_proj", "ffn_gate"), (i, "mlp.up_proj", "ffn_up")], d, spec.mlp_bias),
        "down": ([(d, "mlp.down_proj", "ffn_down")], i, spec.mlp_bias),
    }
    # llama.cpp rotates neighbours (2j, 2j+1) for its llama architecture and stores q and k accordingly.
    paired = {"attn_q": spec.heads, "attn_k": spec.kv_heads} if gguf and spec.architecture == "LlamaForCausalLM" else {}

    parts: dict[str, Part] = {}
    targets: dict[str, tuple[int, ...]] = {}

    def add(target: str, sources: list[tuple[int, str]], columns: int, heads: list[int]) -> None:
        row = 0
        for (rows, name), count in zip(sources, heads, strict=True):
            parts[name] = Part(target, row, (rows, columns) if columns else (rows,), count)
            row += rows
        targets[target] = (row, columns) if columns else (row,)

    add("embed", [(spec.vocab_size, "token_embd.weight" if gguf else "model.embed_tokens.weight")], d, [0])
    for layer in range(spec.layers):
        prefix = f"blk.{layer}" if gguf else f"model.layers.{layer}"
        for target, (sources, columns, bias) in per_layer.items():
            names = [(rows, f"{prefix}.{theirs if gguf else ours}") for rows, ours, theirs in sources]
            heads = [paired.get(theirs, 0) for _, _, theirs in sources]
            if names:
                add(f"layers.{layer}.{target}", [(rows, f"{name}.weight") for rows, name in names], columns, heads)
            if bias:
                add(f"layers.{layer}.{target}_bias", [(rows, f"{name}.bias") for rows, name in names], 0, heads)
    add("norm", [(d, "output_norm.weight" if gguf else "model.norm.weight")], 0, [0])
    head = "output.weight" if gguf else "lm_head.weight"
    if not spec.tied_embeddings:
        add("lm_head", [(spec.vocab_size, head)], d, [0])
    return Layout(parts, targets, frozenset({"rope_freqs.weight"} if gguf else {head} if spec.tied_embeddings else ()))


def load_weights(
    model_path: str, spec: ModelSpec, dtype: torch.dtype, source: Source | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every target of the model's layout once, in about the order of the files.

    Everything that headers can tell is checked before the first tensor is read. ``source`` None reads all here. Raises
    ModelError naming the file and the tensor: missing, left over, wrong shape, unsupported dtype, truncated.
    """
    source = source or OwnReading()
    plan = layout(spec, is_gguf(model_path))
    stored = [
        (path, [tensor for tensor in tensors if not _unused(tensor.name, plan)])
        for path, tensors in source.value(lambda: _stored(model_path))
    ]
    _check(stored, plan, spec, model_path)
    blocks = [block for path, tensors in stored for block in cut(path, tensors)]
    missing_rows = {target: shape[0] for target, shape in plan.targets.items()}
    open_targets: dict[str, torch.Tensor] = {}
    with BlockReader() as reader:
        for block, data in zip(blocks, source.stream(blocks, reader.read), strict=True):
            for piece in block.pieces:
                part = plan.parts[piece.tensor.name]
                if part.target not in open_targets:
                    shape = plan.targets[part.target]
                    open_targets[part.target] = torch.empty(shape, dtype=dtype if len(shape) == 2 else torch.float32)
                out = open_targets[part.target][part.row : part.row + part.shape[0]]
                out[piece.row : piece.row + piece.rows].copy_(_decode(data, piece, block.path))
                if part.heads and piece.row + piece.rows == part.shape[0]:
                    out.copy_(_halves(out, part.heads))
                missing_rows[part.target] -= piece.rows
                if missing_rows[part.target] == 0:
                    yield part.target, open_targets.pop(part.target)


def cut(path: str, tensors: Sequence[StoredTensor]) -> list[WeightBlock]:
    """The tensors of a file, in its order, as blocks of whole rows: neighbours share one of up to BLOCK_BYTES. Only a
    single row may be larger."""
    blocks: list[WeightBlock] = []
    pieces: list[Piece] = []
    begin = end = 0

    def close() -> None:
        if pieces:
            blocks.append(WeightBlock(path, begin, end - begin, tuple(pieces)))
            pieces.clear()

    for tensor in tensors:
        rows = tensor.shape[0]
        row_bytes = tensor.nbytes // max(rows, 1)
        # Dequantising makes several float32 copies of a piece, so those are smaller.
        limit = BLOCK_BYTES if tensor.dtype in DTYPES else BLOCK_BYTES // 8
        step = max(1, limit // max(row_bytes, 1))
        for row in range(0, rows, step):
            count = min(step, rows - row)
            at, size = tensor.offset + row * row_bytes, count * row_bytes
            near = at - end < PADDING and (at - begin) % ALIGNMENT == 0
            if not near or at + size - begin > BLOCK_BYTES:
                close()
            begin = begin if pieces else at
            pieces.append(Piece(tensor, row, count, at - begin, at - begin + size))
            end = at + size
    close()
    return blocks


def dummy_weights(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Random targets of the spec's layout, made on ``device``: for measurements of a model whose weights are not here.

    Matrices have the deviation 0.02 that most families are initialised with; norms are ones and biases zeros.
    """
    generator = torch.Generator(device).manual_seed(0)
    for name, shape in layout(spec).targets.items():
        if len(shape) == 2:
            yield name, torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
        else:
            yield name, torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device=device)


def _stored(model_path: str) -> list[tuple[str, tuple[StoredTensor, ...]]]:
    """Path and tensors of each file."""
    files = [read_gguf(model_path)] if is_gguf(model_path) else open_folder(model_path)
    return [(file.path, file.tensors) for file in files]


def _unused(name: str, plan: Layout) -> bool:
    return name in plan.ignored or IGNORED.fullmatch(name) is not None


def _check(stored: list[tuple[str, list[StoredTensor]]], plan: Layout, spec: ModelSpec, model_path: str) -> None:
    """The headers against the layout."""
    for path, tensor in ((path, tensor) for path, tensors in stored for tensor in tensors):
        if tensor.name not in plan.parts:
            raise ModelError(f"{path} holds the tensor {tensor.name!r}, for which {spec.architecture} has no use")
        wanted = plan.parts[tensor.name].shape
        if tensor.shape != wanted:
            raise ModelError(
                f"{path}: tensor {tensor.name!r} has the shape {tensor.shape}; the config makes it {wanted}"
            )
        if tensor.dtype not in DTYPES and not is_gguf(path):
            raise ModelError(f"{path}: tensor {tensor.name!r} is {tensor.dtype}; supported are {', '.join(DTYPES)}")
    missing = sorted(plan.parts.keys() - {tensor.name for _, tensors in stored for tensor in tensors})
    if missing:
        hint = "; for a tied model set tie_word_embeddings=true in config.json" if missing == ["lm_head.weight"] else ""
        raise ModelError(f"{model_path} lacks {len(missing)} tensors of the model, the first is {missing[0]!r}{hint}")


def _decode(data: memoryview, piece: Piece, path: str) -> torch.Tensor:
    """The piece in a block's bytes as a tensor, a view where the dtype is torch's own."""
    block, tensor = data[piece.start : piece.end], piece.tensor
    shape = (piece.rows, *tensor.shape[1:])
    if tensor.dtype in DTYPES:
        return torch.frombuffer(block, dtype=DTYPES[tensor.dtype]).view(shape)
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    try:
        values = dequantize(np.frombuffer(block, np.uint8).reshape(piece.rows, -1), GGMLQuantizationType[tensor.dtype])
    except (NotImplementedError, ValueError) as error:
        raise ModelError(
            f"{path}: tensor {tensor.name!r} is {tensor.dtype}, which cannot be dequantised: {error}"
        ) from None
    return torch.from_numpy(values).view(shape)


def _halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (2j, 2j+1) of each head -> (j, j + E/2): from pairs of neighbours to pairs of halves."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape).contiguous()
