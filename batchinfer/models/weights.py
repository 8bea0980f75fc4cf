"""Weights as a stream of (name, tensor): read in file order, merged, converted; never the whole model twice.

Names and shapes are those of :mod:`batchinfer.models.layout`, each once. Matrices have the engine's dtype, vectors
(norms and biases) are float32.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from batchinfer.models.encoder_spec import EncoderSpec, encoder_layout
from batchinfer.models.files import Block, BlockReader, ModelError, OwnReading, Source, StoredTensor
from batchinfer.models.gguf import is_gguf, read_gguf
from batchinfer.models.gguf_blocks import FORMS, Form, codes_of
from batchinfer.models.layout import TABLES, Layout, Part, layout
from batchinfer.models.model_spec import ModelSpec
from batchinfer.models.safetensors import open_folder
from batchinfer.models.scheme import Scheme
from batchinfer.models.stored_matrix import Gathered, quantised_layout
from batchinfer.ops.grouped import GroupQuantized, stacked
from batchinfer.ops.quantized import Quantized

BLOCK_BYTES = 16 << 20
"""Read at a time: large enough for a parallel file system, small against a rank's memory, which holds up to four."""

ALIGNMENT = 8
"""Of a tensor in its block, in bytes: an element's address is a multiple of its size."""

PADDING = 64
"""Most bytes between two tensors that are read along; GGUF has up to 31."""

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

CODES = {"I32": torch.int32, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}
"""Of what quantised matrices are stored as."""

IGNORED = re.compile(
    r".*rotary_emb\.inv_freq|(.*\.)?h\.\d+\.attn\.(masked_)?bias|.*attention\.(masked_)?bias|.*\.self_attn\.[kv]_scale"
)
"""Derived values that old checkpoints store: rope's frequencies, causal masks. And scales for a cache in 8 bits."""


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


def load_weights(
    model_path: str,
    spec: ModelSpec | EncoderSpec,
    dtype: torch.dtype,
    source: Source | None = None,
    keep: bool = False,
) -> Iterator[tuple[str, torch.Tensor | Quantized | GroupQuantized]]:
    """Yield every target of the model's layout once, in about the order of the files.

    Everything that headers can tell is checked before the first tensor is read. ``source`` None reads all here.
    ``keep``: matrices that are quantised in the file stay so, in GGUF Quantized, in a folder GroupQuantized; and a tied
    model whose embedding is has a ``lm_head`` too, before it. Raises ModelError naming the file and the tensor:
    missing, left over, wrong shape, unsupported dtype, truncated; or with ``keep`` a file without a matrix that can be
    kept.
    """
    source = source or OwnReading()
    plan = layout_of(spec, is_gguf(model_path))
    scheme = spec.scheme if isinstance(spec, ModelSpec) else None
    files = source.value(lambda: _stored(model_path))
    if scheme is not None:
        dtypes = {tensor.name: tensor.dtype for _, tensors in files for tensor in tensors}
        plan = quantised_layout(plan, scheme, dtypes)
    stored = [(path, [tensor for tensor in tensors if not _unused(tensor.name, plan)]) for path, tensors in files]
    _check(stored, plan, spec, model_path)
    every = [tensor for _, tensors in stored for tensor in tensors]
    coded = Counter((part.target, part.row) for part in plan.parts.values() if part.component is not None)
    forms = kept_forms(every, plan) if keep else {}
    if keep and not forms and not coded:
        raise ModelError(
            f"{model_path} holds no matrix that engine.weights=keep could keep: that takes a GGUF file with the types "
            f"{', '.join(FORMS)}, or a folder with quantised weights; engine.weights=auto computes with any"
        )
    blocks = [block for path, tensors in stored for block in cut(path, tensors)]
    missing: Counter[str] = Counter()  # stored elements
    for tensor in every:
        missing[plan.parts[plan.name(tensor.name)].target] += math.prod(tensor.shape)
    of_codes = {target for target, _ in coded}
    open_targets: dict[str, Mapping[str, Dense | Kept | Coded]] = {}
    with BlockReader() as reader:
        for block, data in zip(blocks, source.stream(blocks, reader.read), strict=True):
            for piece in block.pieces:
                part = plan.parts[plan.name(piece.tensor.name)]
                if part.target in of_codes:
                    shape = plan.targets[part.target]
                    open_targets.setdefault(part.target, {part.target: Coded(shape, dtype, scheme, coded, keep)})
                elif part.target not in open_targets:
                    open_targets[part.target] = _begin(part.target, plan, dtype, forms, spec.tied_head)
                for one in open_targets[part.target].values():
                    one.put(data, piece, part, block.path)
                missing[part.target] -= piece.rows * math.prod(piece.tensor.shape[1:])
                if missing[part.target] == 0:
                    for name, one in open_targets.pop(part.target).items():
                        yield name, one.value


def layout_of(spec: ModelSpec | EncoderSpec, gguf: bool = False) -> Layout:
    """A decoder's under the names of Hugging Face or of GGUF; an encoder's."""
    return encoder_layout(spec) if isinstance(spec, EncoderSpec) else layout(spec, gguf)


class Dense:
    """A target in ``dtype``, while its parts come."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self.value = torch.empty(shape, dtype=dtype)

    def put(self, data: memoryview, piece: Piece, part: Part, path: str) -> None:
        _put(_decode(data, piece, path), piece, part, self.value[part.row : part.row + part.shape[0]])


class Kept:
    """A target as codes, while its parts come."""

    def __init__(self, shape: tuple[int, ...], form: Form):
        rows, columns = shape
        scales, minima = (torch.empty(rows, columns // form.block, dtype=torch.float16) for _ in range(2))
        self.value = Quantized(torch.empty(shape, dtype=torch.uint8), scales, minima, form.bits)

    def put(self, data: memoryview, piece: Piece, part: Part, path: str) -> None:
        raw, kind = np.frombuffer(data[piece.start : piece.end], np.uint8), piece.tensor.dtype
        try:
            codes, *blocks = (torch.from_numpy(array) for array in codes_of(raw.reshape(piece.rows, -1), kind))
        except ValueError as error:
            raise ModelError(f"{path}: tensor {piece.tensor.name!r} ({kind}) is damaged: {error}") from None
        shorter = FORMS[kind].block // self.value.block
        values = (codes, *(block.repeat_interleave(shorter, 1) for block in blocks))
        for value, out in zip(values, (self.value.codes, self.value.scales, self.value.minima), strict=True):
            _put(value, piece, part, out[part.row : part.row + part.shape[0]])


class Coded:
    """A target of which parts are quantised in a folder's files, while the components of these come. ``components``:
    how many there are of the part at a row of a target. ``keep``: it stays codes, if all parts can together."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        scheme: Scheme,
        components: Mapping[tuple[str, int], int],
        keep: bool,
    ):
        self._dense, self._scheme, self._components, self._keep = Dense(shape, dtype), scheme, components, keep
        self._open: dict[int, Gathered] = {}
        self._kept: dict[int, tuple[Part, GroupQuantized]] = {}

    def put(self, data: memoryview, piece: Piece, part: Part, path: str) -> None:
        if part.component is None:
            self._dense.put(data, piece, part, path)
            return
        if part.row not in self._open:
            self._open[part.row] = Gathered(self._scheme, part, self._components[part.target, part.row])
        name, shape = piece.tensor.name, piece.tensor.shape
        rows = _decode(data, piece, path, DTYPES | CODES)
        if not self._open[part.row].put(part.component.holds, name, shape, piece.row, rows):
            return
        try:
            matrix = self._open.pop(part.row).matrix()
        except ValueError as error:
            raise ModelError(f"{path}: tensor {error}: copy or download the model again") from None
        if self._keep:
            self._kept[part.row] = part, matrix
        else:
            self._fill(part, matrix)

    @property
    def value(self) -> torch.Tensor | GroupQuantized:
        kept = [
            matrix.chosen(reorder(torch.arange(part.shape[0]), part).tolist()) if part.order else matrix
            for _, (part, matrix) in sorted(self._kept.items())
        ]
        if kept and sum(matrix.shape[0] for matrix in kept) == len(self._dense.value):
            together = stacked(kept)
            if together is not None:
                return together
        for part, matrix in self._kept.values():
            self._fill(part, matrix)
        return self._dense.value

    def _fill(self, part: Part, matrix: GroupQuantized) -> None:
        out = self._dense.value[part.row : part.row + part.shape[0]]
        out.copy_(reorder(matrix.dense(out.dtype), part))


def kept_forms(stored: Sequence[StoredTensor], plan: Layout) -> dict[str, Form]:
    """The targets that can be kept quantised, all parts of which are in some form, and one that suits all of them."""
    kinds: dict[str, list[str]] = {}
    for tensor in stored:
        part = plan.parts[plan.name(tensor.name)]
        kinds.setdefault(part.target, []).append(tensor.dtype if len(part.shape) == 2 else "")
    return {
        target: functools.reduce(operator.or_, (FORMS[kind] for kind in of_parts))
        for target, of_parts in kinds.items()
        if all(kind in FORMS for kind in of_parts)
    }


def _begin(
    target: str, plan: Layout, dtype: torch.dtype, forms: dict[str, Form], tied: bool
) -> dict[str, Dense | Kept]:
    """What is to be made of a target. Rows of tables are gathered, which takes values."""
    shape, form = plan.targets[target], forms.get(target)
    dense = Dense(shape, dtype if len(shape) == 2 else torch.float32)
    if form is None or target in TABLES:
        head = {"lm_head": Kept(shape, form)} if form and tied and target == "embed" else {}
        return {**head, target: dense}
    return {target: Kept(shape, form)}


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
        rows = tensor.shape[0] if tensor.shape else 1
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
            yield name, torch.full(shape, 0.0 if name.endswith("_bias") else 1.0, device=device)


def with_token_head(
    weights: Iterable[tuple[str, torch.Tensor | Quantized | GroupQuantized]], spec: ModelSpec, tokens: Sequence[int]
) -> Iterator[tuple[str, torch.Tensor | Quantized | GroupQuantized]]:
    """The weights of the model ``spec`` for :meth:`ModelSpec.with_token_head`: of its LM head the rows of ``tokens``
    alone, as a classification head."""
    for name, tensor in weights:
        if name == ("embed" if spec.tied_embeddings else "lm_head"):
            yield "classes", tensor[list(tokens)] if isinstance(tensor, torch.Tensor) else tensor.chosen(tokens)
        if name != "lm_head":
            yield name, tensor


def _stored(model_path: str) -> list[tuple[str, tuple[StoredTensor, ...]]]:
    """Path and tensors of each file."""
    files = [read_gguf(model_path)] if is_gguf(model_path) else open_folder(model_path)
    return [(file.path, file.tensors) for file in files]


def _unused(name: str, plan: Layout) -> bool:
    return name in plan.ignored or IGNORED.fullmatch(name) is not None


def _check(
    stored: list[tuple[str, list[StoredTensor]]], plan: Layout, spec: ModelSpec | EncoderSpec, model_path: str
) -> None:
    """The headers against the layout."""
    seen: set[str] = set()
    for path, tensor in ((path, tensor) for path, tensors in stored for tensor in tensors):
        name = plan.name(tensor.name)
        if name not in plan.parts:
            raise ModelError(f"{path} holds the tensor {tensor.name!r}, for which {spec.architecture} has no use")
        if name in seen:
            raise ModelError(f"{path} holds the tensor {tensor.name!r} twice, with and without {plan.root!r} before it")
        seen.add(name)
        wanted = plan.parts[name].stored_shape
        component = plan.parts[name].component
        shapes, dtypes = (component.shapes, component.dtypes) if component else ((wanted,), tuple(DTYPES))
        if tensor.shape not in shapes:
            raise ModelError(
                f"{path}: tensor {tensor.name!r} has the shape {tensor.shape}; the config makes it "
                f"{' or '.join(map(str, shapes))}"
            )
        if tensor.dtype not in dtypes and not is_gguf(path):
            raise ModelError(f"{path}: tensor {tensor.name!r} is {tensor.dtype}; supported are {', '.join(dtypes)}")
    missing = sorted(plan.parts.keys() - seen)
    if missing:
        hint = "; for a tied model set tie_word_embeddings=true in config.json" if missing == ["lm_head.weight"] else ""
        raise ModelError(f"{model_path} lacks {len(missing)} tensors of the model, the first is {missing[0]!r}{hint}")


def _decode(data: memoryview, piece: Piece, path: str, dtypes: Mapping[str, torch.dtype] = DTYPES) -> torch.Tensor:
    """The piece in a block's bytes as a tensor, a view where the dtype is one of ``dtypes``."""
    block, tensor = data[piece.start : piece.end], piece.tensor
    shape = (piece.rows, *tensor.shape[1:])
    if tensor.dtype in dtypes:
        return torch.frombuffer(block, dtype=dtypes[tensor.dtype]).view(shape)
    from gguf import GGMLQuantizationType, dequantize

    try:
        values = dequantize(np.frombuffer(block, np.uint8).reshape(piece.rows, -1), GGMLQuantizationType[tensor.dtype])
    except (NotImplementedError, ValueError) as error:
        raise ModelError(
            f"{path}: tensor {tensor.name!r} is {tensor.dtype}, which cannot be dequantised: {error}"
        ) from None
    return torch.from_numpy(values).view(shape)


def reorder(rows: torch.Tensor, part: Part) -> torch.Tensor:
    """The rows of a part [N, ...] in the decoder's order."""
    if part.order == "pairs":  # rows (2j, 2j+1) of each head -> (j, j + E/2)
        return rows.view(part.heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
    if part.order == "by_head":  # [H, 3, E] -> [3, H, E]
        return rows.view(part.heads, 3, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)
    return rows


def _put(values: torch.Tensor, piece: Piece, part: Part, out: torch.Tensor) -> None:
    """Rows of the stored tensor into its part ``out``, which is brought into the decoder's order with the last."""
    here = slice(piece.row, piece.row + piece.rows)
    target = out.T if part.order == "transposed" else out
    target[here].copy_(values)
    if here.stop < piece.tensor.shape[0]:
        return
    if part.order in ("pairs", "by_head"):
        out.copy_(reorder(out, part))
    if part.offset:
        out.add_(part.offset)
