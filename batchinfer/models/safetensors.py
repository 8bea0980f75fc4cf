"""The safetensors container: a bounded reader of its header and the shards of a model folder. No torch, no pickle.

Format: https://github.com/huggingface/safetensors#format. A file is 8 bytes of header length (little endian), a JSON
header naming dtype, shape and byte range of every tensor, then the data. The ranges must tile the data exactly: a
hole or an overlap is a broken or a crafted file. Values are not checked.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

from batchinfer.models.files import ModelError, StoredTensor, open_for_reading, parse_json, read_at, read_json

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class SafetensorsFile:
    """A checked header. ``tensors`` in file order; ``header`` the header's bytes."""

    path: str
    size: int
    header: bytes
    tensors: tuple[StoredTensor, ...]


def read_header(path: str) -> SafetensorsFile:
    """Read and check the header of one file. Raises ModelError naming file, tensor and what is wrong."""
    with open_for_reading(path) as (fd, size):
        if size < 8:
            raise ModelError(f"{path} has {size} bytes and is no safetensors file: copy or download it again")
        prefix = bytearray(8)
        read_at(fd, 0, memoryview(prefix), path)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise ModelError(
                f"{path} states a header of {length} bytes; the format allows {MAX_HEADER_BYTES}: "
                "it is not a safetensors file (a Git LFS pointer or a damaged copy?)"
            )
        if 8 + length > size:
            raise ModelError(f"{path} is truncated: its header needs {8 + length} bytes, the file has {size}")
        header = bytearray(length)
        read_at(fd, 8, memoryview(header), path)
    if not header.startswith(b"{"):
        raise ModelError(f"{path} is not a safetensors file: its header does not begin with '{{'")
    entries = parse_json(bytes(header), f"{path} (header)")
    entries.pop("__metadata__", None)
    tensors = [_entry(name, entry, 8 + length, path) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_tiling(tensors, 8 + length, size, path)
    return SafetensorsFile(path, size, bytes(header), tuple(tensors))


def _entry(name: str, entry: object, data_start: int, path: str) -> StoredTensor:
    """One header entry, checked by itself."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ModelError(f"{path}: tensor {name!r} needs dtype, shape and data_offsets in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise ModelError(f"{path}: tensor {name!r} has the unknown dtype {dtype!r}; known are {', '.join(ITEM_BYTES)}")
    if not _naturals(shape):
        raise ModelError(f"{path}: tensor {name!r} has the shape {shape!r}; it must be a list of numbers >= 0")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelError(f"{path}: tensor {name!r} has data_offsets {offsets!r}; they must be [begin, end]")
    begin, end = offsets
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != needed:
        raise ModelError(
            f"{path}: tensor {name!r} ({dtype} {shape}) needs {needed} bytes, the header gives it {end - begin}"
        )
    return StoredTensor(name, dtype, tuple(shape), data_start + begin, needed)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_tiling(tensors: list[StoredTensor], data_start: int, size: int, path: str) -> None:
    """The tensors must cover data_start..size without holes or overlap."""
    end, before = data_start, "the header"
    for tensor in tensors:
        if tensor.offset < end:
            raise ModelError(f"{path}: tensors {before!r} and {tensor.name!r} overlap by {end - tensor.offset} bytes")
        if tensor.offset > end:
            raise ModelError(
                f"{path}: {tensor.offset - end} bytes between {before!r} and {tensor.name!r} belong to no tensor"
            )
        end, before = tensor.offset + tensor.nbytes, tensor.name
        if end > size:
            raise ModelError(
                f"{path} is truncated: tensor {tensor.name!r} ends at byte {end}, the file has {size}: "
                "copy or download it again"
            )
    if end < size:
        raise ModelError(f"{path}: {size - end} bytes after the last tensor ({before!r}) belong to no tensor")


def open_folder(folder: str) -> list[SafetensorsFile]:
    """The checked headers of the weights of a model folder: one file, or the shards that its index names."""
    single, index = os.path.join(folder, SINGLE), os.path.join(folder, INDEX)
    if os.path.exists(single):
        return [read_header(single)]
    if not os.path.exists(index):
        raise ModelError(_why_no_weights(folder))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map (tensor name -> shard file)")
    for tensor, shard in weight_map.items():
        # Names decide what is opened: anything but a plain name could lead out of the folder.
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            raise ModelError(
                f"{index}: tensor {tensor!r} is in {shard!r}; allowed are plain file names like {SINGLE!r}"
            )
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not os.path.exists(os.path.join(folder, name))]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the {len(names)} shards that {INDEX} names: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}: copy or download the model again"
        )
    shards = [read_header(os.path.join(folder, name)) for name in names]
    _check_index(weight_map, shards, index)
    return shards


def _check_index(weight_map: dict[str, str], shards: list[SafetensorsFile], index: str) -> None:
    """Every tensor lies in one shard, and in the one that the index names."""
    found: dict[str, str] = {}
    for shard in shards:
        name = os.path.basename(shard.path)
        for tensor in shard.tensors:
            if tensor.name in found:
                raise ModelError(f"{index}: tensor {tensor.name!r} is in both {found[tensor.name]} and {name}")
            found[tensor.name] = name
    for tensor, name in weight_map.items():
        if found.get(tensor) != name:
            where = f"but is in {found[tensor]}" if tensor in found else "which does not hold it"
            raise ModelError(
                f"{index} says that tensor {tensor!r} is in {name}, {where}: the shards are of another model"
            )


def _why_no_weights(folder: str) -> str:
    """The most useful thing to say about a folder without readable weights."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f"model.path={folder} cannot be listed: {error.strerror}"
    if any(name.endswith(".safetensors") for name in names):
        shards = [name for name in names if name.endswith(".safetensors")]
        return f"{folder} holds {', '.join(shards[:3])} but neither {SINGLE} nor {INDEX}: copy the whole model"
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return f"{folder} holds GGUF files: name one, as in model.path={os.path.join(folder, gguf[0])}"
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        return (
            f"{folder} holds its weights only as pickle ({', '.join(pickled[:3])}), which can run code when it is read "
            "and is refused. Where you trust it, convert it once:\n"
            'python -c "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            '[C.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2]) for C in (M, T)]" '
            f"{folder} {folder.rstrip('/')}-safetensors"
        )
    return f"{folder} holds no weights: expected {SINGLE}, {INDEX} with its shards, or a .gguf file"
