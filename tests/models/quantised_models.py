"""Checkpoints of quantised weights, written by plain code that follows each format's description; and the same model
with the weights that the codes stand for.

Formats: AutoAWQ's gemm packing, AutoGPTQ's and GPTQModel's qweight, qzeros, scales and g_idx, the fp8 files of
DeepSeek-V3 and Qwen3, and compressed-tensors. Sizes are those of a tiny model, so groups are small.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Quantise = Callable[[Tensor], tuple[Tensors, Tensor]]
"""Of a matrix: what is stored under which names in the place of ``weight``, and the weights that it stands for."""

GROUP = 32
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def words(codes: Tensor, bits: int) -> Tensor:
    """[R, C] -> int32 [R, C * bits / 32], the first in the lowest bits; C is filled up."""
    many = 32 // bits
    codes = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % many)).unflatten(1, (-1, many))
    total = sum(codes[..., i] << bits * i for i in range(many))
    return torch.where(total < 2**31, total, total - 2**32).int()


def integers(weight: Tensor, bits: int, group: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes [N, K], scales (of float16) and zeros [N, G], and weights, where column k is of group[k]."""
    top, groups = 2**bits - 1, int(group.max()) + 1
    scales, zeros = torch.empty(2, len(weight), groups)
    for g in range(groups):
        low, high = weight[:, group == g].amin(1), weight[:, group == g].amax(1)
        if symmetric:
            scales[:, g], zeros[:, g] = torch.maximum(-low, high) * 2 / top, 2.0 ** (bits - 1)
        else:
            scales[:, g] = (high - low) / top
            zeros[:, g] = (-low / scales[:, g]).round().clamp(1, top)
    scales = scales.half().float()
    codes = (weight / scales[:, group] + zeros[:, group]).round().clamp(0, top)
    return codes, scales, zeros, (codes - zeros[:, group]) * scales[:, group]


def plain(depth: int, size: int = GROUP) -> Tensor:
    return torch.arange(depth) // size


def awq(weight: Tensor) -> tuple[Tensors, Tensor]:
    codes, scales, zeros, dense = integers(weight, 4, plain(weight.shape[1]), symmetric=False)

    def interleaved(t: Tensor) -> Tensor:
        return words(t.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)

    return {"qweight": interleaved(codes.T), "qzeros": interleaved(zeros.T), "scales": scales.T.half()}, dense


def gptq(bits: int, symmetric: bool = True, desc_act: bool = False, v2: bool = False, size: int = GROUP) -> Quantise:
    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        depth = weight.shape[1]
        group = plain(depth, depth if size == -1 else size)
        if desc_act:  # the same for all matrices with these inputs, as of real calibration
            group = group[torch.randperm(depth, generator=torch.Generator().manual_seed(depth))]
        codes, scales, zeros, dense = integers(weight, bits, group, symmetric)
        return {
            "qweight": words(codes, bits).T,
            "qzeros": words(zeros.T - (0 if v2 else 1), bits),
            "scales": scales.T.half(),
            "g_idx": group.int(),
        }, dense

    return quantise


def packed(bits: int = 4, symmetric: bool = True, size: int = GROUP) -> Quantise:
    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        depth = weight.shape[1]
        codes, scales, zeros, dense = integers(weight, bits, plain(depth, depth if size == -1 else size), symmetric)
        stored = {
            "weight_packed": words(codes, bits),
            "weight_scale": scales.bfloat16() if size == -1 else scales.half(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if size == -1:
            dense = (codes - zeros) * scales.bfloat16().float()
        return stored if symmetric else stored | {"weight_zero_point": words(zeros.T, bits).T}, dense

    return quantise


def int8(weight: Tensor) -> tuple[Tensors, Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round()
    return {"weight": codes.to(torch.int8), "weight_scale": scales}, codes * scales


def float8(rows: int, columns: int, name: str = "weight_scale", shape: tuple[int, ...] | None = None) -> Quantise:
    """A scale for each block of ``rows`` by ``columns``; 0: for all of them. ``shape`` of the stored scales, if it is
    not [blocks, blocks]."""

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        high, wide = rows or len(weight), columns or weight.shape[1]
        scales = torch.stack(
            [torch.stack([part.abs().max() for part in line.split(wide, 1)]) for line in weight.split(high)]
        )
        scales = scales / LARGEST
        each = scales.repeat_interleave(high, 0)[: len(weight)].repeat_interleave(wide, 1)[:, : weight.shape[1]]
        codes = (weight / each).to(torch.float8_e4m3fn)
        stored = scales if shape is None else scales.reshape(shape)
        return {"weight": codes, name: stored, "input_scale": torch.ones(())}, codes.float() * each

    return quantise


def compressed(kind: str, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def gptq_config(bits: int = 4, size: int = GROUP, **others: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, **others}


GROUPS = {"strategy": "group", "group_size": GROUP}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP], "activation_scheme": "dynamic"}
SCHEMES: dict[str, tuple[dict[str, Any], Quantise]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}, awq),
    "gptq": (gptq_config(sym=True, desc_act=False), gptq(4)),
    "gptq-asymmetric": (gptq_config(sym=False), gptq(4, symmetric=False)),
    "gptq-order": (gptq_config(desc_act=True), gptq(4, desc_act=True)),
    "gptq-v2": (gptq_config(checkpoint_format="gptq_v2"), gptq(4, symmetric=False, v2=True)),
    "gptq-8": (gptq_config(8, -1), gptq(8, size=-1)),
    "gptq-8-groups": (gptq_config(8), gptq(8, symmetric=False)),
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, float8(0, 0, shape=())),
    "fp8-channel": ({"quant_method": "fbgemm_fp8"}, float8(1, 0)),
    "fp8-blocks": (BLOCKS, float8(GROUP, GROUP, "weight_scale_inv")),
    "ct-fp8": (compressed("float-quantized", type="float", strategy="tensor"), float8(0, 0, shape=(1,))),
    "ct-int8": (compressed("int-quantized", strategy="channel"), int8),
    "ct-int4": (compressed("pack-quantized", num_bits=4, **GROUPS), packed()),
    "ct-int4-asymmetric": (compressed("pack-quantized", num_bits=4, **GROUPS), packed(symmetric=False)),
    "ct-packed-8": (compressed("pack-quantized", strategy="channel"), packed(8, size=-1)),
}
"""Name: (quantization_config, what is done to a matrix)."""

EXPLAINED = ("embed", "lm_head", "gate.weight", "norm")
"""In the names of what is left as it is: tables, heads, routers."""


def write_quantised(folder: Path, scheme: str, to: Path) -> tuple[Path, Path]:
    """The model of a folder, quantised; and with the weights that this stands for, in float32."""
    config, quantise = SCHEMES[scheme]
    quantised, dense = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.ndim != 2 or any(word in name for word in EXPLAINED):
            quantised[name] = dense[name] = tensor.float().contiguous()
            continue
        stored, dense[name] = quantise(tensor.float())
        base = name.removesuffix("weight")
        quantised |= {base + suffix: one.contiguous() for suffix, one in stored.items()}
    model = json.loads((folder / "config.json").read_text())
    for kind, tensors in (("quantised", quantised), ("dense", dense)):
        (to / kind).mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, to / kind / "model.safetensors")
        given = model | ({"quantization_config": config} if kind == "quantised" else {})
        (to / kind / "config.json").write_text(json.dumps(given))
    return to / "quantised", to / "dense"
