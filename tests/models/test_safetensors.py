"""The safetensors header reader: what it accepts is what the format says, all else is an error that says why."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models.tiny_models import edit_json, write_safetensors
from safetensors.numpy import save, save_file

from batchinfer.models.files import ModelError
from batchinfer.models.safetensors import open_folder, read_header


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.feature("models", "safetensors, one file or shards, streamed")
def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros((0, 4), np.int8), "c": np.float16([1.5])}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = read_header(str(tmp_path / "x.safetensors"))
    data = (tmp_path / "x.safetensors").read_bytes()
    assert file.size == len(data)
    assert {t.name for t in file.tensors} == set(arrays)
    for tensor in file.tensors:
        want = arrays[tensor.name]
        assert tensor.shape == want.shape
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == want.tobytes()


@pytest.mark.feature("models", "truncated, overlapping, missing shards and pickled weights are refused with what to do")
@pytest.mark.parametrize(
    ("entries", "size", "message"),
    [
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "'a' and 'b' overlap by 4 bytes"),
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8, "'a' and 'b' overlap by 8 bytes"),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20, "4 bytes between 'a' and 'b' belong to no tensor"),
        ({"a": entry([2], 4, 12)}, 12, "4 bytes between 'the header' and 'a' belong to no tensor"),
        ({"a": entry([2], 0, 8)}, 12, r"4 bytes after the last tensor \('a'\)"),
        ({"a": entry([2], 0, 8)}, 7, "truncated: tensor 'a' ends at byte .* copy or download it again"),
        ({"a": entry([3], 0, 8)}, 8, r"'a' \(F32 \[3\]\) needs 12 bytes, the header gives it 8"),
        ({"a": entry([2**62, 8], 0, 8)}, 8, "needs .* bytes, the header gives it 8"),
        ({"a": entry([-2, -1], 0, 8)}, 8, r"shape \[-2, -1\]; it must be a list of numbers >= 0"),
        ({"a": entry([2.0], 0, 8)}, 8, r"shape \[2.0\]"),
        ({"a": entry([2], 8, 0)}, 8, r"data_offsets \[8, 0\]; they must be"),
        ({"a": entry([2], 0, 8, "F33")}, 8, "unknown dtype 'F33'; known are"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "needs dtype, shape and data_offsets"),
        ({"a": [1, 2]}, 8, "needs dtype, shape and data_offsets"),
    ],
)
def test_broken_tables_name_the_tensor(tmp_path: Path, entries: dict[str, Any], size: int, message: str) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", entries, bytes(size))
    with pytest.raises(ModelError, match=message) as caught:
        read_header(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has 0 bytes and is no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (struct.pack("<Q", 100_000_001), "the format allows 100000000"),
        (struct.pack("<Q", 50) + b"{}", "truncated: its header needs 58 bytes, the file has 10"),
        (struct.pack("<Q", 2) + b"[]", "does not begin with '{'"),
        (struct.pack("<Q", 2) + b"{]", "is not valid JSON"),
        (struct.pack("<Q", 18) + b'{"a": {}, "a": {}}', r"\(header\) holds the key 'a' twice"),
    ],
)
def test_broken_headers(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        read_header(str(path))


WHOLE = save({"a": np.arange(3, dtype=np.float32), "b": np.zeros((2, 2), np.float16)})


@settings(max_examples=300)
@given(at=st.integers(0, len(WHOLE) - 1), value=st.integers(0, 255), cut=st.integers(0, len(WHOLE)))
def test_damage_is_an_error_or_harmless(tmp_path_factory: Any, at: int, value: int, cut: int) -> None:
    """Never another exception, and never a tensor outside the file."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    damaged = bytearray(WHOLE)
    damaged[at] = value
    for data in (damaged, WHOLE[:cut]):
        path.write_bytes(data)
        try:
            file = read_header(str(path))
        except ModelError:
            continue
        assert len(data) == len(WHOLE)
        assert sum(t.nbytes for t in file.tensors) == len(data) - 8 - len(file.header)


def sharded(folder: Path, shards: dict[str, list[str]], weight_map: dict[str, str] | None = None) -> Path:
    """A folder with shards of small tensors and an index."""
    for shard, names in shards.items():
        write_safetensors(
            folder / shard, {n: entry([1], 4 * i, 4 * i + 4) for i, n in enumerate(names)}, bytes(4 * len(names))
        )
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    edit_json(index, weight_map=weight_map or {name: shard for shard, names in shards.items() for name in names})
    return folder


def test_shards_are_opened_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"b.safetensors": ["x"], "a.safetensors": ["y", "z"]})
    assert [[t.name for t in file.tensors] for file in open_folder(str(folder))] == [["y", "z"], ["x"]]


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    sharded(tmp_path, {f"{i}.safetensors": [f"t{i}"] for i in range(3)})
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of the 3 shards .*: 1\.safetensors: copy or download"):
        open_folder(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/passwd", "a/b.safetensors", "a.bin", "", ".safetensors\n", 7]
)
def test_index_may_only_name_files_of_the_folder(tmp_path: Path, name: Any) -> None:
    (tmp_path.parent / "a.safetensors").write_bytes(WHOLE)
    sharded(tmp_path, {"x.safetensors": ["x"]}, {"x": name})
    with pytest.raises(ModelError, match=r"tensor 'x' is in .* allowed are plain file names like"):
        open_folder(str(tmp_path))


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    shards = {"a.safetensors": ["x"], "b.safetensors": ["y"]}
    sharded(tmp_path, shards, {"x": "b.safetensors", "y": "a.safetensors"})
    with pytest.raises(ModelError, match=r"'x' is in b\.safetensors, but is in a\.safetensors"):
        open_folder(str(tmp_path))
    sharded(tmp_path, shards, {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"})
    with pytest.raises(ModelError, match=r"'z' is in b\.safetensors, which does not hold it"):
        open_folder(str(tmp_path))
    sharded(tmp_path, {"a.safetensors": ["x", "y"], "b.safetensors": ["y"]})
    with pytest.raises(ModelError, match=r"'y' is in both a\.safetensors and b\.safetensors"):
        open_folder(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ModelError, match="has no weight_map"):
        open_folder(str(tmp_path))


@pytest.mark.feature("models", "truncated, overlapping, missing shards and pickled weights are refused with what to do")
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], r"only as pickle \(pytorch_model\.bin\), which can run code .* convert it once"),
        (["a.pth", "b.pt"], r"only as pickle \(a\.pth, b\.pt\)"),
        (["model-00001-of-00002.safetensors"], r"holds model-00001-of-00002\.safetensors but neither"),
        (["x.Q4_0.gguf"], r"holds GGUF files: name one, as in model\.path=.*x\.Q4_0\.gguf"),
        (["README.md"], "holds no weights: expected model.safetensors"),
    ],
)
def test_folders_without_weights_say_what_to_do(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=message):
        open_folder(str(tmp_path))
