"""A folder in the layout of sentence-transformers: how its states are pooled, and the dense layers behind. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from batchinfer.models.files import Keys, ModelError, read_json, read_json_objects
from batchinfer.models.gguf import is_gguf
from batchinfer.models.identity import weights_digest
from batchinfer.types import DenseSpec, Pooling

MODES: dict[str, Pooling] = {
    "lasttoken": "last",
    "mean_tokens": "mean",
    "mean": "mean",
    "cls_token": "cls",
    "cls": "cls",
}
"""What 1_Pooling/config.json may say: "pooling_mode_" and this is true, or this is the "pooling_mode"."""

STEPS = ("Transformer", "Pooling", "Dense", "Normalize")
"""Steps of a model that are known here, in the order that they must have."""

ACTIVATIONS = ("Identity", "Tanh", "ReLU")
"""Of a dense layer, by the last part of torch's name."""


@dataclass(frozen=True)
class Modules:
    """``pooling``: the folder that says how, None where there is no such step. ``dense`` in their order."""

    pooling: str | None = None
    dense: tuple[DenseSpec, ...] = ()

    def mode(self) -> Pooling | None:
        """How states are pooled, None if there is no word of it. Raises ModelError."""
        return None if self.pooling is None else _mode(os.path.join(self.pooling, "config.json"))


def read_modules(path: str) -> Modules:
    """What modules.json of a model folder says; nothing if there is none. Raises ModelError for steps that are not
    known."""
    where = os.path.join(path, "modules.json")
    if is_gguf(path) or not os.path.exists(where):
        return Modules()
    pooling, dense, last = None, [], 0
    for module in read_json_objects(where):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in STEPS:
            raise ModelError(f"{where}: the step {kind!r} is not supported; supported are {', '.join(STEPS)}")
        if STEPS.index(kind) < last:
            raise ModelError(f"{where}: the step {kind!r} behind {STEPS[last]!r} is not supported")
        last = STEPS.index(kind)
        if kind == "Pooling":
            pooling = os.path.join(path, _folder(module, where))
        elif kind == "Dense":
            dense.append(_dense(path, _folder(module, where)))
    for before, after in pairwise(dense):
        if before.outputs != after.inputs:
            raise ModelError(f"{where}: {after.folder} takes {after.inputs} values, and gets {before.outputs}")
    return Modules(pooling, tuple(dense))


def _folder(module: dict[str, Any], where: str) -> str:
    folder = str(module.get("path", ""))
    if os.path.isabs(folder) or os.pardir in folder.split("/"):
        raise ModelError(f"{where}: the path {folder!r} must lie in the model's folder")
    return folder


def _dense(path: str, folder: str) -> DenseSpec:
    where = os.path.join(path, folder, "config.json")
    keys = Keys(read_json(where), where)
    activation = str(keys.config.get("activation_function", "Tanh")).rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise ModelError(
            f"{where}: activation_function={activation!r} is not supported; it must be one of {', '.join(ACTIVATIONS)}"
        )
    if keys.config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise ModelError(f"{where}: module_input_name must be 'sentence_embedding', the pooled state")
    bias = keys.config.get("bias") is not False
    digest = weights_digest(os.path.join(path, folder))
    return DenseSpec(folder, keys.count("in_features"), keys.count("out_features"), bias, activation, digest)


def _mode(where: str) -> Pooling:
    config = read_json(where)
    if "pooling_mode" in config:  # the newer form
        modes = [str(config["pooling_mode"])]
    else:
        modes = [
            key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on
        ]
    if len(modes) != 1 or modes[0] not in MODES:
        raise ModelError(
            f"{where}: pooling by {', '.join(modes) or 'nothing'} is not supported; supported is one of "
            f"{', '.join(MODES)} (embed.pooling overrides it)"
        )
    return MODES[modes[0]]
