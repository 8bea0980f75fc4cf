"""Weights over real MPI: the same on all ranks, from one rank's reading; and what happens when a rank fails."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from mpi.test_ranks import mpiexec, pytestmark  # noqa: F401
from safetensors.torch import save_file

from batchinfer.models.layout import layout
from batchinfer.models.spec import load_spec

LOAD = Path(__file__).with_name("load.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 MB of random weights in two files."""
    tmp_path = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "vocab_size": 2000,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    parts = layout(load_spec(str(tmp_path))).parts
    torch.manual_seed(0)
    tensors = {name: torch.randn(part.shape).bfloat16() for name, part in parts.items()}
    index = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(index.values()):
        save_file({name: tensor for name, tensor in tensors.items() if index[name] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return tmp_path


@pytest.fixture(scope="module")
def alone(model: Path) -> str:
    """What one rank without a launcher loads."""
    ((digest, files),) = load(0, model, "own")
    assert files == "2"
    return digest


def load(ranks: int, model: Path, source: str = "shared", **fate: str) -> list[list[str]]:
    """(what came, weight files opened) of each rank that has come to an end."""
    result = mpiexec(ranks, LOAD, str(model), source, **fate)
    assert result.returncode == 0, result.stderr
    return [line.split("|") for line in result.stdout.splitlines()]


@pytest.mark.feature("job", "weights are read once and passed on over MPI: the other ranks open no weight file")
@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_have_what_one_has_read(ranks: int, alone: str, model: Path) -> None:
    assert sorted(load(ranks, model)) == sorted([[alone, "0"]] * (ranks - 1) + [[alone, "2"]])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_not_waited_for(rank: int, alone: str, model: Path) -> None:
    found = load(4, model, FAIL_RANK=str(rank), FAIL_WHEN="stopped")
    # 1 and 2 are below 0, and 3 below 1: the children of the lost rank read, as does 0.
    assert [digest for digest, _ in found] == [alone] * 3
    assert Counter(files for _, files in found)["0"] == 1


@pytest.mark.parametrize(("fate", "text"), [("EIO", "Input/output error"), ("cut", "ends at byte 1000000, but was at")])
def test_an_error_of_the_reader_reaches_all(fate: str, text: str, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    found = load(3, folder, FAIL_RANK="0", FAIL_WHEN=fate)
    assert len(found) == 3
    assert len({message for message, _ in found}) == 1
    assert found[0][0].startswith("64 ")
    assert text in found[0][0]


def test_a_rank_that_leaves_is_done_without(alone: str, model: Path) -> None:
    """And MPI can be finalised: nothing is under way."""
    found = load(4, model, FAIL_RANK="1", FAIL_WHEN="leaves")
    assert Counter(digest for digest, _ in found) == {alone: 3, "69 no memory for this rank": 1}
