"""What a user may get wrong about input, model and output: a clear end of the command, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from models.tiny_models import build_model, edit_json, write_safetensors

from batchinfer.__main__ import main
from batchinfer.types import ExitCode


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer of three words."""
    folder = build_model("llama", tmp_path_factory.mktemp("model")).folder
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def here(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with model/ and in.parquet, both free to spoil."""
    (tmp_path / "model").mkdir()
    for file in model.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    pq.write_table(pa.table({"prompt": ["a b", "b"], "id": [0, 1]}), tmp_path / "in.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*overrides: str) -> int:
    settings = ["engine.device=cpu", "engine.threads=1", "engine.num_pages=20", "sampling.max_tokens=3"]
    return main(["run", "model.path=model", "input.path=in.parquet", "output.path=out", *settings, *overrides])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def overlap(folder: Path) -> None:
    entries = {name: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]} for name, at in (("x", 0), ("y", 4))}
    write_safetensors(folder / "model.safetensors", entries, bytes(12))


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text("{}")
    edit_json(folder / "model.safetensors.index.json", weight_map=names)


@pytest.mark.feature("commands", "unfit input or model: a clear error and its exit code, before anything is written")
@pytest.mark.parametrize(
    ("spoil", "override", "code", "message"),
    [
        (None, "input.prompt_column=text", ExitCode.USAGE, "there is no column 'text'"),
        (None, "input.prompt_column=id", ExitCode.USAGE, "is int64; it must be string"),
        (None, "input.template={{ question }}", ExitCode.USAGE, "there is no column 'question'"),
        (None, "output.prefix=${oc.env:NOWHERE_SET}", ExitCode.USAGE, "NOWHERE_SET"),
        (lambda f: (f / "in.parquet").write_bytes(b""), "", ExitCode.INPUT, "in.parquet is empty (0 bytes)"),
        (lambda f: cut(f / "in.parquet"), "", ExitCode.INPUT, "it is truncated, or not Parquet"),
        (None, "input.path=none.parquet", ExitCode.INPUT, "none.parquet does not exist"),
        (None, "model.path=none", ExitCode.USAGE, "model.path=none is neither a folder nor a .gguf file"),
        (None, "model.path=in.parquet", ExitCode.USAGE, "is neither a folder nor a .gguf file"),
        (lambda f: (f / "model/config.json").unlink(), "", ExitCode.USAGE, "must be a Hugging Face model folder"),
        (
            lambda f: edit_json(f / "model/config.json", architectures=["BloomForCausalLM"]),
            "",
            ExitCode.USAGE,
            "the architecture 'BloomForCausalLM' is not supported; supported are Llama",
        ),
        (lambda f: cut(f / "model/model.safetensors"), "", ExitCode.USAGE, "model.safetensors is truncated"),
        (lambda f: overlap(f / "model"), "", ExitCode.USAGE, "'x' and 'y' overlap by 4 bytes"),
        (lambda f: lose_a_shard(f / "model"), "", ExitCode.USAGE, "lacks 1 of the 2 shards"),
        (
            lambda f: (f / "model/model.safetensors").rename(f / "model/pytorch_model.bin"),
            "",
            ExitCode.USAGE,
            "only as pickle (pytorch_model.bin), which can run code",
        ),
    ],
)
def test_what_is_unfit_is_refused_before_anything_is_written(
    spoil: Callable[[Path], object] | None,
    override: str,
    code: ExitCode,
    message: str,
    here: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if spoil is not None:
        spoil(here)
    assert run(*([override] if override else [])) == code
    printed = capfd.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (here / "out").exists()


def test_the_output_of_another_job_and_a_model_that_no_memory_holds(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("engine.num_pages=0", "engine.kv_cache_gb=0.000001") == ExitCode.UNFIT
    assert "not enough memory for one KV page" in capfd.readouterr().err
    assert run() == ExitCode.COMPLETE
    assert run("sampling.max_tokens=4") == ExitCode.MISMATCH
    printed = capfd.readouterr().err
    assert "sampling.max_tokens" in printed
    assert run() == ExitCode.COMPLETE  # nothing to do
