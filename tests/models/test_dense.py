"""Dense layers of sentence-transformers: vectors of decoders and encoders through them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.test_encoder import build, configure, texts, vectors
from models.test_heads import MODULES, save, write_json
from models.test_parity import prompts
from safetensors.torch import save_file

from batchinfer.fingerprint import fingerprint
from batchinfer.models.pool_spec import pool_spec
from batchinfer.types import JobError, PoolSpec

TANH, PLAIN, RELU = (f"torch.nn.modules.{kind}" for kind in ("activation.Tanh", "linear.Identity", "activation.ReLU"))
Layer = tuple[torch.nn.Linear, str]


def add_layers(folder: Path, sizes: list[int], activations: list[str], bias: bool, dtype: torch.dtype) -> list[Layer]:
    """Random layers from each size to the next, and how the folder says so."""
    torch.manual_seed(len(sizes))
    modules, layers = list(MODULES), []
    for number, (inputs, outputs, kind) in enumerate(zip(sizes, sizes[1:], activations, strict=False), 2):
        layer, name = torch.nn.Linear(inputs, outputs, bias).to(dtype), f"{number}_Dense"
        modules.append({"path": name, "type": "sentence_transformers.models.Dense"})
        shape = {"in_features": inputs, "out_features": outputs, "bias": bias, "activation_function": kind}
        write_json(folder / name / "config.json", shape)
        save_file(
            {f"linear.{key}": value for key, value in layer.state_dict().items()}, folder / name / "model.safetensors"
        )
        layers.append((layer.float(), kind))
    write_json(folder / "modules.json", [*modules, {"path": "9_Normalize", "type": "x.Normalize"}])
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode": "mean"})
    return layers


def through(layers: list[Layer], state: torch.Tensor) -> torch.Tensor:
    functions = {TANH: torch.tanh, PLAIN: lambda x: x, RELU: torch.relu}
    for layer, kind in layers:
        state = functions[kind](layer.double()(state))
    return state


@pytest.mark.feature("tasks", "embed: dense layers of sentence-transformers, of encoders and decoders")
@pytest.mark.parametrize(
    ("sizes", "activations", "bias", "dtype"),
    [
        ([48, 20], [TANH], True, torch.float32),
        ([48, 96, 48], [PLAIN, PLAIN], False, torch.bfloat16),
        ([48, 30, 7], [RELU, TANH], True, torch.float32),
    ],
)
def test_vectors_of_an_encoder(
    sizes: list[int], activations: list[str], bias: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, asked = build("Bert", "Model", tmp_path), texts()
    layers = add_layers(tmp_path, sizes, activations, bias, dtype)
    for dimensions in (0, 5):
        pool = pool_spec(configure(tmp_path, "embed", dimensions=dimensions))
        for text, vector in zip(asked, vectors(tmp_path, pool, asked), strict=True):
            with torch.inference_mode():
                state = model(torch.from_numpy(text).long()[None]).last_hidden_state[0].double().mean(0)
                expected = torch.nn.functional.normalize(through(layers, state)[: dimensions or None], dim=0)
            np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5)


def test_vectors_of_a_decoder(tmp_path: Path) -> None:
    from models.drawn_models import draw_config
    from models.test_heads import vectors as of_decoder
    from transformers import AutoModel

    torch.manual_seed(3)
    config = draw_config("Qwen3ForCausalLM", 2)
    model, asked = save(AutoModel.from_config(config, attn_implementation="eager"), tmp_path), prompts(1)
    layers = add_layers(tmp_path, [config.hidden_size, 24, 8], [TANH, PLAIN], True, torch.float32)
    for text, vector in zip(asked, of_decoder(tmp_path, pool_spec(configure(tmp_path, "embed")), asked), strict=True):
        with torch.inference_mode():
            state = model(torch.from_numpy(text).long()[None]).last_hidden_state[0].double().mean(0)
            expected = torch.nn.functional.normalize(through(layers, state), dim=0)
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5)


def test_other_layers_are_another_job(tmp_path: Path) -> None:
    build("Bert", "Model", tmp_path)

    def pool_of() -> Any:
        config = configure(tmp_path, "embed")
        return json.dumps(fingerprint(config, {}, pool=pool_spec(config))["pool"])

    plain = pool_of()
    assert plain == json.dumps(
        fingerprint(configure(tmp_path, "embed"), {}, pool=PoolSpec("mean", 48, activation="normalise"))["pool"]
    )
    assert "dense" not in plain
    add_layers(tmp_path, [48, 20], [TANH], True, torch.float32)
    first = pool_of()
    add_layers(tmp_path, [48, 20], [TANH], True, torch.bfloat16)
    assert len({plain, first, pool_of()}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "torch.nn.modules.activation.GELU"}, "activation_function='GELU' is not supported"),
        ({"in_features": 47}, "2_Dense must take the model's 48 values"),
        ({"out_features": None}, "no 'out_features'"),
        ({"out_features": 21}, "3_Dense takes 20 values, and gets 21"),
        ({"module_input_name": "token_embeddings"}, "module_input_name must be 'sentence_embedding'"),
        ({"bias": False}, r"2_Dense must hold the tensors {'linear.weight': \(20, 48\)}, as its config.json has it"),
    ],
)
def test_layers_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    build("Bert", "Model", tmp_path)
    add_layers(tmp_path, [48, 20, 10], [TANH, TANH], True, torch.float32)
    where = tmp_path / "2_Dense" / "config.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | change))
    with pytest.raises(JobError, match=message):
        vectors(tmp_path, pool_spec(configure(tmp_path, "embed")), texts())


def test_steps_in_another_order_are_refused(tmp_path: Path) -> None:
    build("Bert", "Model", tmp_path)
    add_layers(tmp_path, [48, 20], [TANH], True, torch.float32)
    modules = json.loads((tmp_path / "modules.json").read_text())
    write_json(tmp_path / "modules.json", [modules[0], modules[2], modules[1]])
    with pytest.raises(JobError, match="the step 'Pooling' behind 'Dense' is not supported"):
        pool_spec(configure(tmp_path, "embed"))
