"""A LoRA adapter as PEFT saves one: adapter_config.json and the header of adapter_model.safetensors. No torch.

What the decoder can't do is refused by the name that the file gives it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchinfer.models.files import Keys, ModelError, StoredTensor, read_json
from batchinfer.models.layout import Part, layout
from batchinfer.models.model_spec import ModelSpec
from batchinfer.models.safetensors import SafetensorsFile, read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

HARMLESS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "corda_config": (None,),
}
"""Keys of variants, with the values that leave them out."""

NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.(?:default\.)?weight")
"""Of a stored matrix: the base model's module, and which of the two factors it is."""

SUPPORTED = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class LowRank:
    """The two factors of one matrix, A [rank, in] and B [out, rank], and where in the decoder's weights it stands."""

    a: StoredTensor
    b: StoredTensor
    part: Part


@dataclass(frozen=True)
class AdapterFile:
    """``scale`` multiplies each product of factors. ``rows`` of each matrix of the decoder that they add to."""

    file: SafetensorsFile
    scale: float
    factors: tuple[LowRank, ...]
    rows: dict[str, int]


def read_adapter(folder: str, spec: ModelSpec) -> AdapterFile:
    """The checked header of an adapter for the decoder of ``spec``. Raises ModelError naming the file and the key or
    the tensor."""
    scale, rank = _scale(read_json(os.path.join(folder, CONFIG)), os.path.join(folder, CONFIG))
    path = os.path.join(folder, WEIGHTS)
    if not os.path.exists(path):
        raise ModelError(f"{path} is missing: save the adapter with safetensors (save_pretrained does)")
    file = read_header(path)
    found: dict[str, dict[str, StoredTensor]] = {}
    for tensor in file.tensors:
        match = NAME.fullmatch(tensor.name)
        if match is None:
            raise ModelError(f"{path}: the tensor {tensor.name!r} is no factor of a matrix, and is not supported")
        if tensor.dtype not in SUPPORTED:
            raise ModelError(f"{path}: tensor {tensor.name!r} is {tensor.dtype}; supported are {', '.join(SUPPORTED)}")
        found.setdefault(match[1], {})[match[2]] = tensor
    plan = layout(spec)
    factors = []
    for module, pair in found.items():
        part = plan.parts.get(plan.name(f"{module}.weight"))
        if part is None or len(part.shape) != 2 or not part.target.startswith("layers.") or ".experts." in part.target:
            raise ModelError(f"{path}: adapting {module!r} of {spec.architecture} is not supported")
        rows, columns = part.shape
        shapes = {"A": (rank, columns), "B": (rows, rank)}
        for kind, shape in shapes.items():
            if kind not in pair:
                raise ModelError(f"{path} lacks lora_{kind} of {module!r}: copy the whole adapter")
            if pair[kind].shape != shape:
                raise ModelError(
                    f"{path}: tensor {pair[kind].name!r} has the shape {pair[kind].shape}; it must be {shape}"
                )
        factors.append(LowRank(pair["A"], pair["B"], part))
    if not factors:
        raise ModelError(f"{path} holds no tensors")
    return AdapterFile(file, scale, tuple(factors), {f.part.target: plan.targets[f.part.target][0] for f in factors})


def _scale(config: Mapping[str, Any], where: str) -> tuple[float, int]:
    """(factor, rank). Hu et al. 2021, arXiv:2106.09685; rank-stabilised: Kalajdzievski 2023, arXiv:2312.03732."""
    for key, allowed in HARMLESS.items():
        if config.get(key) not in allowed:
            raise ModelError(f"{where}: {key}={config.get(key)!r} is not supported")
    keys = Keys(config, where)
    rank = keys.count("r")
    return keys.number("lora_alpha") / (math.sqrt(rank) if keys.flag("use_rslora") else rank), rank
