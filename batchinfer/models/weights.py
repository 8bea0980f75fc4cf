"""Weights as a stream of (name, tensor): read in file order, merged, converted; never the whole model twice.

Names and shapes are those of :mod:`batchinfer.models.layout`, each once. Matrices have the engine's dtype, vectors
(norms and biases) are float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from batchinfer.models.files import ModelError, StoredTensor, open_for_reading, read_at
from batchinfer.models.gguf import is_gguf, read_gguf
from batchinfer.models.layout import Layout, Part, layout
from batchinfer.models.model_spec import ModelSpec
from batchinfer.models.safetensors import open_folder

BLOCK_BYTES = 32 << 20
"""Read at a time: large enough for a parallel file system, small against a rank's memory."""

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

IGNORED = re.compile(r".*rotary_emb\.inv_freq|(.*\.)?h\.\d+\.attn\.(masked_)?bias|.*attention\.(masked_)?bias")
"""Derived values that old checkpoints store: rope's frequencies, causal masks."""


def load_weights(model_path: str, spec: ModelSpec, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every target of the model's layout once, in about the order of the files.

    Everything that headers can tell is checked before the first tensor is read. Raises ModelError naming the file and
    the tensor: missing, left over, wrong shape, unsupported dtype, truncated.
    """
    gguf = is_gguf(model_path)
    files = [read_gguf(model_path)] if gguf else open_folder(model_path)
    plan = layout(spec, gguf)
    stored = [(file.path, [tensor for tensor in file.tensors if not _unused(tensor.name, plan)]) for file in files]
    _check(stored, plan, spec, model_path)
    missing_rows = {target: shape[0] for target, shape in plan.targets.items()}
    open_targets: dict[str, torch.Tensor] = {}
    staging = bytearray(BLOCK_BYTES)
    for path, tensors in stored:
        with open_for_reading(path) as (fd, _):
            for tensor in tensors:
                part = plan.parts[plan.name(tensor.name)]
                if part.target not in open_targets:
                    shape = plan.targets[part.target]
                    open_targets[part.target] = torch.empty(shape, dtype=dtype if len(shape) == 2 else torch.float32)
                rows = part.shape[0]
                out = open_targets[part.target][part.row : part.row + rows]
                raw = torch.empty(tensor.shape, dtype=out.dtype) if part.order == "transposed" else out
                _read_tensor(fd, path, tensor, staging, raw)
                _arrange(raw, part, out)
                missing_rows[part.target] -= rows
                if missing_rows[part.target] == 0:
                    yield part.target, open_targets.pop(part.target)


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


def _unused(name: str, plan: Layout) -> bool:
    return name in plan.ignored or IGNORED.fullmatch(name) is not None


def _check(stored: list[tuple[str, list[StoredTensor]]], plan: Layout, spec: ModelSpec, model_path: str) -> None:
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
        if tensor.shape != wanted:
            raise ModelError(
                f"{path}: tensor {tensor.name!r} has the shape {tensor.shape}; the config makes it {wanted}"
            )
        if tensor.dtype not in DTYPES and not is_gguf(path):
            raise ModelError(f"{path}: tensor {tensor.name!r} is {tensor.dtype}; supported are {', '.join(DTYPES)}")
    missing = sorted(plan.parts.keys() - seen)
    if missing:
        hint = "; for a tied model set tie_word_embeddings=true in config.json" if missing == ["lm_head.weight"] else ""
        raise ModelError(f"{model_path} lacks {len(missing)} tensors of the model, the first is {missing[0]!r}{hint}")


def _read_tensor(fd: int, path: str, tensor: StoredTensor, staging: bytearray, out: torch.Tensor) -> None:
    """Read the tensor in blocks of whole rows and convert them into ``out``."""
    rows = tensor.shape[0]
    row_bytes = tensor.nbytes // max(rows, 1)
    # Dequantising makes several float32 copies of a block, so those blocks are smaller.
    limit = len(staging) if tensor.dtype in DTYPES else len(staging) // 16
    step = max(1, limit // max(row_bytes, 1))
    if row_bytes > len(staging):
        staging = bytearray(row_bytes)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        block = memoryview(staging)[: count * row_bytes]
        read_at(fd, tensor.offset + row * row_bytes, block, path)
        out[row : row + count].copy_(_decode(block, tensor, count, path))


def _decode(block: memoryview, tensor: StoredTensor, rows: int, path: str) -> torch.Tensor:
    """Bytes of ``rows`` rows -> a tensor, a view where the dtype is torch's own."""
    shape = (rows, *tensor.shape[1:])
    if tensor.dtype in DTYPES:
        return torch.frombuffer(block, dtype=DTYPES[tensor.dtype]).view(shape)
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    try:
        values = dequantize(np.frombuffer(block, np.uint8).reshape(rows, -1), GGMLQuantizationType[tensor.dtype])
    except (NotImplementedError, ValueError) as error:
        raise ModelError(
            f"{path}: tensor {tensor.name!r} is {tensor.dtype}, which cannot be dequantised: {error}"
        ) from None
    return torch.from_numpy(values).view(shape)


def _arrange(stored: torch.Tensor, part: Part, out: torch.Tensor) -> None:
    """The stored values in the order of ``part``, as the decoder wants them, into ``out``, which may be ``stored``."""
    if part.order == "transposed":
        out.copy_(stored.T)
    elif part.order == "pairs":  # rows (2j, 2j+1) of each head -> (j, j + E/2)
        out.copy_(stored.view(part.heads, -1, 2, *out.shape[1:]).transpose(1, 2).reshape(out.shape))
    elif part.order == "by_head":  # [H, 3, E] -> [3, H, E]
        out.copy_(stored.view(part.heads, 3, -1, *out.shape[1:]).transpose(0, 1).reshape(out.shape))
    if part.offset:
        out.add_(part.offset)
