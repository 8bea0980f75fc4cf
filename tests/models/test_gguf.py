"""The GGUF header reader against files that the ``gguf`` package writes, and against damage."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.models.files import ModelError
from batchinfer.models.gguf import is_gguf, read_gguf


def write_small(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.number", 7)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", "grün")
    writer.add_array("a.words", ["x", "", "yz"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_tensor("plain", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("half", np.arange(5, dtype=np.float16))
    blocks = gguf.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("gguf") / "small.gguf")


def test_reads_what_the_package_writes(small: Path) -> None:
    file = read_gguf(str(small))
    assert {key: value for key, value in file.metadata.items() if key.startswith("a.")} == {
        "a.number": 7,
        "a.float": 0.5,
        "a.flag": True,
        "a.text": "grün",
        "a.words": ["x", "", "yz"],
        "a.numbers": [1, 2, 3],
    }
    reader = gguf.GGUFReader(small)
    assert [t.name for t in file.tensors] == ["plain", "half", "blocks"]
    for ours, theirs in zip(file.tensors, reader.tensors, strict=True):
        assert ours.shape == tuple(int(n) for n in theirs.shape[::-1])
        assert (ours.dtype, ours.offset, ours.nbytes) == (theirs.tensor_type.name, theirs.data_offset, theirs.n_bytes)
    assert [t.shape for t in file.tensors] == [(3, 4), (5,), (2, 64)]


def test_typed_access(small: Path) -> None:
    file = read_gguf(str(small))
    assert file.get("a.number", int) == 7
    assert file.get("a.number", float) == 7.0
    assert file.get("a.absent", int, 3) == 3
    with pytest.raises(ModelError, match=r"no metadata key 'a\.absent'"):
        file.get("a.absent", int, required=True)
    with pytest.raises(ModelError, match=r"'a\.text' must be int, not str"):
        file.get("a.text", int)


def test_what_is_a_gguf_path(small: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    assert is_gguf(str(small))
    assert not is_gguf(str(tmp_path))
    assert not is_gguf(str(tmp_path / "folder.gguf"))


def test_every_cut_is_an_error(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    end = max(t.offset + t.nbytes for t in read_gguf(str(small)).tensors)
    path = tmp_path / "cut.gguf"
    for length in range(end):
        path.write_bytes(data[:length])
        with pytest.raises(ModelError, match=str(path)):
            read_gguf(str(path))


@settings(max_examples=300)
@given(at=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_damage_is_an_error_or_harmless(small: Path, at: float, value: int) -> None:
    """Never another exception, and never a tensor outside the file."""
    data = bytearray(small.read_bytes())
    data[int(at * read_gguf(str(small)).header_bytes)] = value
    path = small.with_name("damaged.gguf")
    path.write_bytes(data)
    try:
        file = read_gguf(str(path))
    except ModelError:
        return
    assert all(file.header_bytes <= t.offset <= t.offset + t.nbytes <= len(data) for t in file.tensors)


def header(*parts: bytes, version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(name: bytes, shape: list[int], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + bytes(20), "its first four bytes are not 'GGUF'"),
        (header(version=1), "GGUF version 1; versions 2 and 3"),
        (header(version=0x03000000), r"versions 2 and 3 \(little endian\)"),
        (header(keys=2**60), "truncated or damaged"),
        (header(struct.pack("<Q", 2**63), keys=1), "truncated or damaged"),
        (header(*[string(b"k") + struct.pack("<IB", 0, 1)] * 2, keys=2), "the metadata key 'k' twice"),
        (header(string(b"\xff\xfe") + bytes(8), keys=1), "is not UTF-8"),
        (header(string(b"k") + struct.pack("<I", 99), keys=1), "unknown metadata type 99"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 9, 1), keys=1), "arrays of metadata type 9"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 0, 2**62), keys=1), "truncated or damaged"),
        (header(string(b"split.count") + struct.pack("<IH", 2, 3), keys=1), "one of 3 parts: join them first"),
        (header(string(b"general.alignment") + struct.pack("<II", 4, 0), keys=1), "general.alignment=0 must be"),
        (header(tensor(b"t", [4] * 5, 0, 0), tensors=1), "'t' has 5 dimensions"),
        (header(tensor(b"t", [4], 255, 0), tensors=1), "unknown ggml type 255"),
        (header(tensor(b"t", [33], 8, 0), tensors=1), r"rows of 't' \(33,\) are not whole blocks of Q8_0 \(32\)"),
        (header(*[tensor(b"t", [1], 0, 32 * i) for i in range(2)], bytes(96), tensors=2), "the tensor 't' twice"),
        (
            header(*[tensor(name, [2], 0, 4) for name in (b"s", b"t")], bytes(96), tensors=2),
            "'s' and 't' overlap by 8 bytes",
        ),
        (header(tensor(b"t", [2**40], 0, 0), bytes(96), tensors=1), "truncated: tensor 't' ends at byte"),
    ],
)
def test_broken_headers(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        read_gguf(str(path))


def test_missing_file(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match="is missing"):
        read_gguf(str(tmp_path / "x.gguf"))
