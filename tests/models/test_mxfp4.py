"""GPT-OSS with experts in MXFP4: the values that its checkpoint stands for, and the same weights as unpacked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models.tiny_models import TinyModel, edit_json
from safetensors.torch import load_file, save_file

from batchinfer.models.files import ModelError
from batchinfer.models.mxfp4 import POSITIVE, dequantised
from batchinfer.models.spec import load_spec
from batchinfer.models.weights import load_weights

QUANTISED = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def draw(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [..., columns / 32, 16] and scales of a random matrix [..., columns]."""
    *rows, columns = shape
    scales = torch.randint(118, 126, (*rows, columns // 32), dtype=torch.uint8)
    return torch.randint(0, 256, (*scales.shape, 16), dtype=torch.uint8), scales


def value(blocks: torch.Tensor, scales: torch.Tensor, place: int) -> float:
    """The value at a place of a row, from blocks [G, 16] and scales [G], by the text of the standard."""
    block, within = divmod(place, 32)
    byte = int(blocks[block, within // 2])
    code = byte >> 4 if within % 2 else byte & 15
    return (-1.0 if code & 8 else 1.0) * POSITIVE[code & 7] * 2.0 ** (int(scales[block]) - 127)


def test_values_are_those_of_the_standard_and_of_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = draw(2, 3, 64)
    scales[1, 2] = torch.tensor([0, 250], dtype=torch.uint8)
    got = dequantised(blocks.flatten(0, 1), scales.flatten(0, 1), torch.float32).view(2, 3, 64)
    assert [value(blocks[1, 2], scales[1, 2], i) for i in range(64)] == got[1, 2].tolist()
    assert torch.equal(got[0], convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].T)
    bf16 = dequantised(blocks[0], scales[0], torch.bfloat16)
    assert torch.equal(bf16.float(), got[0])
    scales[0, 0, 0] = 255
    assert dequantised(blocks[0], scales[0], torch.bfloat16)[0].isnan().tolist() == [True] * 32 + [False] * 32


@pytest.fixture
def packed(tiny: Callable[[str], TinyModel], tmp_path: Path) -> tuple[Path, Path]:
    """Folders of one model: with experts of 64 x 96 in MXFP4, and with their values in the checkpoint of transformers,
    which is [in, out]."""
    folders = tmp_path / "packed", tmp_path / "plain"
    tensors = load_file(tiny("gpt-oss").folder / "model.safetensors")
    torch.manual_seed(0)
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_bytes((tiny("gpt-oss").folder / "config.json").read_bytes())
        edit_json(folder / "config.json", intermediate_size=96)
    plain = dict(tensors)
    for name in [name for name in tensors if ".experts." in name]:
        rows, columns = (192, 64) if "gate_up" in name else (64, 96)
        if name.endswith("_bias"):
            tensors[name] = plain[name] = torch.randn(6, rows)
            continue
        del tensors[name]
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales = draw(6, rows, columns)
        values = dequantised(blocks.flatten(0, 1), scales.flatten(0, 1), torch.float32)
        plain[name] = values.view(6, rows, columns).transpose(1, 2).contiguous()
    save_file(tensors, folders[0] / "model.safetensors")
    save_file(plain, folders[1] / "model.safetensors")
    edit_json(folders[0] / "config.json", quantization_config=QUANTISED)
    return folders


@pytest.mark.feature("models", "GPT-OSS from MXFP4: the weights of the same checkpoint unpacked, bit by bit")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_and_plain_checkpoints_are_the_same_model(packed: tuple[Path, Path], dtype: torch.dtype) -> None:
    ours, theirs = (dict(load_weights(str(folder), load_spec(str(folder)), dtype)) for folder in packed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["layers.1.experts.5.gate_up"].shape == (192, 64)


def test_what_a_packed_checkpoint_may_not_be(packed: tuple[Path, Path]) -> None:
    folder = packed[0]
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"intermediate_size": 80}, "intermediate_size must be a multiple of 32, MXFP4's block"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config has quant_method='hqq'"),
    ):
        edit_json(folder / "config.json", **changes)
        with pytest.raises(ModelError, match=message):
            load_spec(str(folder))
        (folder / "config.json").write_text(json.dumps(config))
    spec = load_spec(str(folder))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    for value, message in (
        (tensors[name][:5].contiguous(), "lacks 1 tensors of the model, the first is '.*down_proj_scales.5.'"),
        (tensors[name].float(), "down_proj_scales.0.' is F32; supported are U8"),
        (tensors[name][:, :, :1].contiguous(), r"down_proj_scales.0.' has the shape \(64, 1\)"),
    ):
        save_file(tensors | {name: value}, folder / "model.safetensors")
        with pytest.raises(ModelError, match=message):
            dict(load_weights(str(folder), spec, torch.float32))
