"""Fingerprints change when a model does, and only then."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from models.tiny_models import edit_json
from models.tiny_tokenizers import write_byte_level
from tokenizers import Tokenizer, models

from batchinfer.models.files import ModelError
from batchinfer.models.identity import model_fingerprint


@pytest.fixture
def folder(copy_of: Callable[..., Path]) -> Path:
    folder = copy_of("llama")
    Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).save(str(folder / "tokenizer.json"))
    return folder


def changed(folder: Path, before: dict[str, str]) -> set[str]:
    after = model_fingerprint(str(folder))
    assert after.keys() == before.keys() == {"config", "weights", "tokenizer"}
    return {name for name in after if after[name] != before[name]}


def test_each_part_answers_for_its_files(folder: Path) -> None:
    before = model_fingerprint(str(folder))
    assert changed(folder, before) == set()
    edit_json(folder / "config.json", rms_norm_eps=1e-4)
    assert changed(folder, before) == {"config"}
    Tokenizer(models.BPE(vocab={"a": 0, "c": 1}, merges=[])).save(str(folder / "tokenizer.json"))
    assert changed(folder, before) == {"config", "tokenizer"}


def test_the_order_of_config_keys_and_other_files_do_not_matter(folder: Path) -> None:
    before = model_fingerprint(str(folder))
    config = folder / "config.json"
    turned = dict(reversed(json.loads(config.read_text()).items()))
    config.write_text(json.dumps(turned))
    (folder / "README.md").write_text("new")
    moved = folder.rename(folder.with_name("elsewhere"))
    assert changed(moved, before) == set()


def test_a_fine_tune_of_the_same_shape_is_another_model(folder: Path) -> None:
    before = model_fingerprint(str(folder))
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    for at in range(len(data) - 50_000, len(data), 8):
        data[at] ^= 1
    file.write_bytes(data)
    assert changed(folder, before) == {"weights"}


def test_gguf(tmp_path: Path) -> None:
    path = write_byte_level(tmp_path / "x.gguf", "gpt-2")
    before = model_fingerprint(str(path))
    moved = path.rename(tmp_path / "y.gguf")
    assert changed(moved, before) == set()
    write_byte_level(path, "smollm")
    assert "tokenizer" in changed(path, before)
    assert "config" not in changed(path, before)


def test_a_broken_model_has_none(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is no safetensors file"):
        model_fingerprint(str(folder))


def test_needs_neither_torch_nor_transformers(folder: Path) -> None:
    """Plans are made on login nodes."""
    program = (
        "import sys; from batchinfer.models.identity import model_fingerprint; model_fingerprint(sys.argv[1]); "
        "print({'torch', 'transformers', 'pyarrow', 'mpi4py'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
