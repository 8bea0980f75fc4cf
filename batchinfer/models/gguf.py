"""The GGUF container: metadata and tensor table, bounded and checked. No torch.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian. The ``gguf``
package's reader maps the file and makes an array per string (6 s for 49,000 tokens, against 0.1 s here); its block
formats (sizes, dequantisation) are used as they are.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from batchinfer.models.files import ModelError, StoredTensor, open_for_reading, read_at

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_DIMS = 4
MAX_HEADER_BYTES = 256 << 20
"""The largest vocabularies (260,000 tokens with 500,000 merges) take 20 MB."""


@dataclass(frozen=True)
class GgufFile:
    """Metadata as Python values; ``tensors`` in file order, shapes outermost first
    (as in torch), dtype the name of the ggml type."""

    path: str
    size: int
    metadata: dict[str, Any]
    tensors: tuple[StoredTensor, ...]
    header_bytes: int

    def get(self, key: str, kind: type, default: Any = None, required: bool = False) -> Any:
        """metadata[key], which must be a ``kind`` (float also takes int). Raises ModelError naming file and key."""
        value = self.metadata.get(key)
        if value is None:
            if required:
                raise ModelError(f"{self.path} has no metadata key {key!r}, which it needs: convert the model again")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ModelError(f"{self.path}: metadata key {key!r} must be {kind.__name__}, not {type(value).__name__}")
        return value

    def floats(self, tensor: StoredTensor) -> tuple[float, ...]:
        """The values of a small F32 tensor."""
        raw = bytearray(tensor.nbytes)
        with open_for_reading(self.path) as (fd, _):
            read_at(fd, tensor.offset, memoryview(raw), self.path)
        return struct.unpack(f"<{tensor.nbytes // 4}f", raw)


def is_gguf(model_path: str) -> bool:
    """Whether ``model_path`` names a GGUF file rather than a model folder."""
    return model_path.endswith(".gguf") and not os.path.isdir(model_path)


def read_gguf(path: str) -> GgufFile:
    """Read and check everything before the tensor data. Raises ModelError naming file, key or tensor."""
    try:
        with open_for_reading(path) as (fd, size), open(fd, "rb", buffering=1 << 20, closefd=False) as file:
            return _Header(file, path, size).read()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None


class _Header:
    """A cursor over the header that never reads past the file's end or the limit."""

    def __init__(self, file: BinaryIO, path: str, size: int):
        self.file, self.path, self.size = file, path, size
        self.at = 0

    def read(self) -> GgufFile:
        if self.take(4) != b"GGUF":
            raise ModelError(f"{self.path} is not a GGUF file: its first four bytes are not 'GGUF'")
        version = self.scalar("I")
        if version not in (2, 3):
            raise ModelError(f"{self.path} is GGUF version {version}; versions 2 and 3 (little endian) are supported")
        num_tensors, num_keys = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            if key in metadata:
                raise ModelError(f"{self.path} holds the metadata key {key!r} twice")
            metadata[key] = self.value(self.scalar("I"))
        parts = metadata.get("split.count", 1)
        if parts != 1:
            raise ModelError(f"{self.path} is one of {parts} parts: join them first (gguf-split --merge)")
        table = [self.tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise ModelError(f"{self.path}: general.alignment={alignment!r} must be a multiple of 8")
        data_start = -(-self.at // alignment) * alignment
        tensors = sorted((self.place(info, data_start) for info in table), key=lambda tensor: tensor.offset)
        self.check_places(tensors)
        return GgufFile(self.path, self.size, metadata, tuple(tensors), self.at)

    def take(self, count: int) -> bytes:
        if count > min(self.size, MAX_HEADER_BYTES) - self.at:
            why = "is truncated or damaged" if self.at + count > self.size else "has too large a header"
            raise ModelError(f"{self.path} {why}: byte {self.at} asks for {count} more of {self.size}")
        self.at += count
        return self.file.read(count)

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        raw = self.take(self.scalar("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ModelError(f"{self.path}: the string {raw[:40]!r} before byte {self.at} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind != ARRAY:
            raise ModelError(f"{self.path}: unknown metadata type {kind} before byte {self.at}")
        item, count = self.scalar("I"), self.scalar("Q")
        if item in SCALARS:
            code = f"<{count}{SCALARS[item]}" if count < 1 << 32 else "<0B"
            return list(struct.unpack(code, self.take(count * struct.calcsize("<" + SCALARS[item]))))
        if item != STRING:
            raise ModelError(f"{self.path}: arrays of metadata type {item} (before byte {self.at}) are not supported")
        return [self.string() for _ in range(count)]

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dims = self.string(), self.scalar("I")
        if not 1 <= dims <= MAX_DIMS:
            raise ModelError(f"{self.path}: tensor {name!r} has {dims} dimensions; 1 to {MAX_DIMS} are allowed")
        shape = tuple(self.scalar("Q") for _ in range(dims))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")

    def place(self, info: tuple[str, tuple[int, ...], int, int], data_start: int) -> StoredTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name, shape, kind, offset = info
        try:
            ggml_type = GGMLQuantizationType(kind)
        except ValueError:
            raise ModelError(f"{self.path}: tensor {name!r} has the unknown ggml type {kind}") from None
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        if shape[-1] % block:
            raise ModelError(
                f"{self.path}: rows of {name!r} {shape} are not whole blocks of {ggml_type.name} ({block})"
            )
        return StoredTensor(name, ggml_type.name, shape, data_start + offset, math.prod(shape) // block * block_bytes)

    def check_places(self, tensors: list[StoredTensor]) -> None:
        """No tensor twice, none over another, none past the file's end (padding between them is part of the format)."""
        names: set[str] = set()
        end, before = self.at, "the header"
        for tensor in tensors:
            if tensor.name in names:
                raise ModelError(f"{self.path} holds the tensor {tensor.name!r} twice")
            if tensor.offset < end:
                raise ModelError(f"{self.path}: {before!r} and {tensor.name!r} overlap by {end - tensor.offset} bytes")
            names.add(tensor.name)
            end, before = tensor.offset + tensor.nbytes, tensor.name
            if end > self.size:
                raise ModelError(
                    f"{self.path} is truncated: tensor {tensor.name!r} ends at byte {end}, the file has {self.size}: "
                    "copy or download it again"
                )
