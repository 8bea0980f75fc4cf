"""Kernels compiled ahead: what a bundle holds is all that an engine needs, and a bad one is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import recorder

from batchinfer.ops.triton.bundle import made_with, use_bundle

TESTS = Path(__file__).parent.parent
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def batchinfer(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-P", "-m", "batchinfer", *arguments], capture_output=True, text=True)


@pytest.mark.feature("Triton kernels", "compiled ahead by batchinfer bundle: no compiler is called where they are used")
@pytest.mark.hardware("kernels compiled ahead")
def test_an_engine_finds_every_kernel_and_calls_no_compiler(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    bundle = tmp_path / "kernels.zip"
    made = batchinfer("bundle", f"model.path={tmp_path}", f"bundle.path={bundle}", "bundle.targets=[sm_80]")
    assert made.returncode == 0, made.stderr
    count = int(re.search(r"sm_80: (\d+) kernels", made.stdout)[1])
    assert count >= 13
    assert "needs a C compiler" not in made.stdout

    program = [sys.executable, TESTS / "engine/bundled_engine.py", tmp_path, bundle, "sm_80"]
    environment = {"PATH": "", "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    used = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert used.returncode == 0, used.stderr
    found = re.fullmatch(r"(\d+) kernels, [0-9a-f]{64}\.cpython.*\.so\n", used.stdout)
    recorder.note("triton on cuda", "compiled")
    assert count - 1 <= int(found[1]) <= count  # but for copies of shared beginnings, which no prompt here has


def test_targets_that_are_not_known_are_refused(tmp_path: Path) -> None:
    done = batchinfer("bundle", f"model.path={tmp_path}", f"bundle.path={tmp_path}/k.zip", "bundle.targets=[sm_35]")
    assert done.returncode == 64
    assert "bundle.targets=sm_35: give some of sm_75, sm_80" in done.stderr


def bundle_of(path: Path, **entries: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in entries.items():
            archive.writestr(name, text)
    return path


def test_a_bundle_of_another_triton_is_refused(tmp_path: Path) -> None:
    other = json.dumps(made_with() | {"triton": "3.4.0"})
    bundle = bundle_of(tmp_path / "k.zip", **{"bundle.json": other})
    with pytest.raises(
        RuntimeError, match=r"k\.zip was made with Triton 3\.4\.0 for .*, and this is Triton .*: make it"
    ):
        use_bundle(bundle, tmp_path / "cache")


@pytest.mark.parametrize("content", [None, b"", b"PK not a zip", "no manifest"])
def test_what_is_no_bundle_is_refused(tmp_path: Path, content: bytes | str | None) -> None:
    bundle = tmp_path / "k.zip"
    if isinstance(content, str):
        bundle_of(bundle, other="file")
    elif content is not None:
        bundle.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"k\.zip is no bundle of kernels .*: make one with batchinfer bundle"):
        use_bundle(bundle, tmp_path / "cache")


def test_nothing_is_unpacked_outside_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.knobs.build.impl", None)
    names = ("kernels/ABC/good.json", "kernels/../../out.json", "kernels/ABC/../out.json", "/out.json", "out.json")
    cache = tmp_path / "a" / "cache"
    entries = {"bundle.json": json.dumps(made_with())} | dict.fromkeys(names, "{}")
    use_bundle(bundle_of(tmp_path / "k.zip", **entries), cache)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(map(os.fspath, files)) == ["a/cache/ABC/good.json", "k.zip"]
