"""Dense layers behind pooling (sentence-transformers): a matrix, a bias and an activation for each text's state."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from batchinfer.models.files import ModelError
from batchinfer.models.safetensors import open_folder
from batchinfer.models.weights import read_tensor
from batchinfer.types import DenseSpec


@dataclass(frozen=True)
class Dense:
    """float32 ``weight`` [outputs, inputs] and ``bias`` [outputs]."""

    weight: np.ndarray
    bias: np.ndarray
    activation: str

    def __call__(self, state: np.ndarray) -> np.ndarray:
        """float64 [outputs] of a state float64 [inputs]; one text at a time, so that no other one matters."""
        values = (self.weight @ state.astype(np.float32) + self.bias).astype(np.float64)
        if self.activation == "Tanh":
            return np.tanh(values)
        return np.maximum(values, 0) if self.activation == "ReLU" else values


def load_dense(model_path: str, specs: tuple[DenseSpec, ...]) -> tuple[Dense, ...]:
    """The layers of a model's folder. Raises ModelError naming the file and the tensor."""
    return tuple(_load(os.path.join(model_path, spec.folder), spec) for spec in specs)


def _load(folder: str, spec: DenseSpec) -> Dense:
    stored = {tensor.name: (file.path, tensor) for file in open_folder(folder) for tensor in file.tensors}
    wanted = {"linear.weight": (spec.outputs, spec.inputs)} | ({"linear.bias": (spec.outputs,)} if spec.bias else {})
    if {name: tensor.shape for name, (_, tensor) in stored.items()} != wanted:
        raise ModelError(f"{folder} must hold the tensors {wanted}, as its config.json has it")
    weight, *bias = (read_tensor(*stored[name]).numpy() for name in wanted)
    return Dense(weight, bias[0] if bias else np.zeros(spec.outputs, np.float32), spec.activation)
