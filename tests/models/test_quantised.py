"""Checkpoints of quantised weights, from their files to the logits: against the same model dequantised, in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.quantised_models import SCHEMES, write_quantised
from models.test_decoder import ops, run_steps  # noqa: F401
from models.test_lora import engine_of, prompts, run, write_adapter
from models.test_weights import load, wide  # noqa: F401
from models.tiny_models import TinyModel, assert_relative, edit_json
from safetensors.torch import load_file, save_file

from batchinfer.models.decoder import Decoder
from batchinfer.models.files import ModelError
from batchinfer.models.packing import Suiting, bytes_of, pack
from batchinfer.models.spec import load_spec
from batchinfer.models.weights import load_weights, with_token_head
from batchinfer.ops import Ops
from batchinfer.ops.grouped import GroupQuantized
from batchinfer.ops.reference import ReferenceOps
from batchinfer.types import PoolSpec, Request, SamplingParams

KEPT_ON_CPUS = {"gptq", "gptq-8", "gptq-8-groups", "gptq-v2", "gptq-asymmetric", "awq"}
KEPT_ON_CPUS |= {"ct-int8", "ct-int4", "ct-int4-asymmetric", "ct-packed-8"}


@pytest.fixture
def written(wide: Callable[[str], Path], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:  # noqa: F811
    def write(scheme: str, name: str = "llama") -> tuple[Path, Path]:
        return write_quantised(wide(name), scheme, tmp_path)

    return write


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.feature(
    "models",
    "quantised checkpoints read: fp8 (tensor, channel, blocks), int8, AWQ, GPTQ (4 and 8 bits, desc_act, v1 and v2), "
    "compressed-tensors",
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_what_the_codes_stand_for(scheme: str, written: Callable[..., tuple[Path, Path]]) -> None:
    quantised, dense = written(scheme)
    want, spec = load(dense), load_spec(str(quantised))
    assert str(spec.scheme).startswith(SCHEMES[scheme][0]["quant_method"])
    got, kept = load(quantised), dict(load_weights(str(quantised), spec, torch.float32, keep=True))
    assert got.keys() == kept.keys() == want.keys()
    for name, tensor in want.items():
        close(got[name], tensor)
        matrix = tensor.ndim == 2 and name not in ("embed", "lm_head")
        assert isinstance(kept[name], GroupQuantized) == matrix
        if matrix:
            close(kept[name].dense(torch.float32), tensor)


@pytest.mark.feature("models", "quantised checkpoints within a bound of the dequantised float32 model, dense and kept")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_near_those_of_the_dequantised_model(
    scheme: str,
    ops: Ops,  # noqa: F811
    written: Callable[..., tuple[Path, Path]],
    tiny: Callable[[str], TinyModel],
) -> None:
    """Dequantised to float32 they are the same; where the CPU's codes are kept, activations are rounded too."""
    quantised, dense = written(scheme)
    logits, sizes = {}, {}
    for kind, folder, keep in (("dense", dense, False), ("auto", quantised, False), ("keep", quantised, True)):
        spec, suiting = load_spec(str(folder)), Suiting(ops, torch.float32)
        packed = pack(spec, suiting(load_weights(str(folder), spec, torch.float32, keep=keep)), ops)
        decoder = Decoder(spec, packed, ops, torch.float32, max_positions=64, max_step_tokens=64, max_samples=4)
        logits[kind], _ = run_steps(decoder, tiny("llama"))
        sizes[kind] = bytes_of(packed)
    native = hasattr(ops, "isa")
    error = {kind: float((logits[kind] - logits["dense"]).norm() / logits["dense"].norm()) for kind in logits}
    assert error["auto"] < 1e-6
    assert (suiting.kept > 0) == (not native or scheme in KEPT_ON_CPUS)
    if native and scheme in KEPT_ON_CPUS:
        assert 0 < error["keep"] < 0.03
        assert sizes["keep"] < 0.5 * sizes["auto"]
    else:
        assert error["keep"] < 1e-6


@pytest.mark.parametrize("name", ["qwen2-moe", "phi3"])
def test_other_skeletons(name: str, written: Callable[..., tuple[Path, Path]]) -> None:
    """Experts, and matrices that are merged in the files."""
    quantised, dense = written("gptq-order", name)
    want, got = load(dense), load(quantised)
    assert got.keys() == want.keys()
    for target, tensor in want.items():
        close(got[target], tensor)


def test_parts_with_different_orders_become_dense_together(written: Callable[..., tuple[Path, Path]]) -> None:
    quantised, dense = written("gptq-order")
    file = quantised / "model.safetensors"
    stored = load_file(file)
    name = "model.layers.0.self_attn.q_proj."
    order = torch.arange(64, dtype=torch.int32) // 32
    save_file(stored | {f"{name}g_idx": order}, file)
    kept = dict(load_weights(str(quantised), load_spec(str(quantised)), torch.float32, keep=True))
    assert isinstance(kept["layers.1.qkv"], GroupQuantized)
    got = kept["layers.0.qkv"]
    assert isinstance(got, torch.Tensor)
    close(got[64:], load(dense)["layers.0.qkv"][64:])
    assert not torch.allclose(got[:64], load(dense)["layers.0.qkv"][:64])  # other groups are other weights


def test_rows_for_a_head_of_few_tokens(written: Callable[..., tuple[Path, Path]]) -> None:
    quantised, _ = written("awq")
    spec = load_spec(str(quantised))
    weights = load_weights(str(quantised), spec, torch.float32, keep=True)
    assert dict(with_token_head(weights, spec, (5, 3)))["classes"].shape == (2, 64)


@pytest.mark.parametrize(
    ("scheme", "change", "message"),
    [
        (
            "gptq",
            {"bits": 3},
            r"bits=3, which is not supported; it must be one of 4, 8\. Otherwise use the unquantised",
        ),
        ("gptq", {"group_size": 100}, r"group_size=100, .* -1 or a multiple of 16"),
        ("gptq", {"group_size": None}, "group_size=None"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin', .* one of 'gptq', 'gptq_v2'"),
        ("awq", {"version": "gemv"}, "version='gemv', .* one of 'gemm'"),
        ("awq", {"zero_point": False}, "zero_point=False, .* one of True"),
        ("fp8-blocks", {"weight_block_size": [128]}, r"weight_block_size=\[128\], .* a list of two multiples of 16"),
        ("fp8-blocks", {"fmt": "e5m2"}, "fmt='e5m2', .* one of 'e4m3'"),
        ("ct-int4", {"format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized', .* one of 'pack-quantized'"),
        ("ct-int4", {"config_groups": {}}, r"config_groups=\{\}, .* groups with the same weights, one at least"),
        ("ct-int4", {"config_groups": {"a": 3}}, r"config_groups has a=3, .* an object"),
        ("ct-int4", {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config=.* absent, or the format 'dense'"),
    ],
)
def test_what_is_not_known_is_named(
    scheme: str, change: dict[str, Any], message: str, tiny: Callable[[str], TinyModel], copy_of: Callable[..., Path]
) -> None:
    path = copy_of() / "config.json"
    edit_json(path, quantization_config=SCHEMES[scheme][0] | change)
    with pytest.raises(ModelError, match=message) as caught:
        load_spec(str(path.parent))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "change", "message"),
    [
        (
            "gptq",
            {"qzeros": None},
            r"lacks 1 tensors of the model, the first is 'model\.layers\.1\.mlp\.down_proj\.qzeros'",
        ),
        (
            "gptq",
            {"scales": torch.ones(3, 65)},
            r"down_proj\.scales' has the shape \(3, 65\); the config makes it \(3, 64\)",
        ),
        ("gptq", {"qweight": torch.ones(12, 64)}, r"down_proj\.qweight' is F32; supported are I32"),
        (
            "gptq",
            {"scales": torch.full((3, 64), torch.nan)},
            r"down_proj\.scales' or its codes hold a number that is not",
        ),
        ("gptq", {"g_idx": torch.zeros(96, dtype=torch.int32)}, r"g_idx' makes groups of another size than 32"),
        (
            "fp8-channel",
            {"weight_scale": torch.ones(7)},
            r"shape \(7,\); the config makes it \(\) or \(1,\) or .*\(64, 1\)",
        ),
        (
            "awq",
            {"qweight": None, "qzeros": None, "scales": None},
            r"the first is 'model\.layers\.1\.mlp\.down_proj\.weight'",
        ),
    ],
)
def test_files_that_do_not_fit(
    scheme: str, change: dict[str, Any], message: str, written: Callable[..., tuple[Path, Path]]
) -> None:
    folder, _ = written(scheme)
    stored = load_file(folder / "model.safetensors")
    for suffix, tensor in change.items():
        name = f"model.layers.1.mlp.down_proj.{suffix}"
        if tensor is None:
            del stored[name]
        else:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_what_was_left_out_of_the_quantisation_is_seen_in_the_files(written: Callable[..., tuple[Path, Path]]) -> None:
    folder, dense = written("ct-fp8")
    stored, values = load_file(folder / "model.safetensors"), load_file(dense / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj."
    mixed = {key: tensor for key, tensor in stored.items() if not key.startswith(name)}
    save_file(mixed | {f"{name}weight": values[f"{name}weight"]}, folder / "model.safetensors")
    got, want = load(folder), load(dense)
    for target, tensor in want.items():
        close(got[target], tensor)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]


def engine_bytes(folder: Path, capfd: pytest.CaptureFixture[str], **options: Any) -> tuple[list[list[int]], int, str]:
    """Greedy tokens, memory of the weights, and what is said of them."""
    requests = [Request(i, text, SamplingParams(max_tokens=8)) for i, text in enumerate(prompts())]
    engine = engine_of(folder, {}, **options)
    size = engine.stats().weight_bytes
    done = [completion.samples[0].token_ids.tolist() for completion in run(engine, requests)]
    return done, size, capfd.readouterr().err


@pytest.mark.parametrize(("scheme", "kept"), [("ct-int4", True), ("fp8-blocks", False), ("gptq-order", False)])
def test_the_engine_says_what_became_of_the_weights(
    scheme: str, kept: bool, written: Callable[..., tuple[Path, Path]], capfd: pytest.CaptureFixture[str]
) -> None:
    quantised, dense = written(scheme)
    want, size, said = engine_bytes(dense, capfd)
    assert "weights" not in said
    got, dequantised, said = engine_bytes(quantised, capfd)
    assert (got, dequantised) == (want, size)
    assert f"weights, {load_spec(str(quantised)).scheme}, are dequantised to float32: 0.00 GiB" in said
    _, small, said = engine_bytes(quantised, capfd, weights="keep")
    assert ("stay codes: " in said) == kept
    assert ("stay codes in 0 of 8 matrices, the others are dequantised to float32" in said) != kept
    assert (small < 0.6 * size) == kept


def test_adapters_beside_codes(written: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    quantised, dense = written("ct-packed-8")
    adapters = {"one": write_adapter(tmp_path / "one", dense, ("q_proj", "gate_proj", "down_proj"), 1)}
    requests = [
        Request(2 * i + number, text, SamplingParams(), adapter=None if number else 0)
        for i, text in enumerate(prompts())
        for number in range(2)
    ]
    states = []
    for folder, form in ((dense, "auto"), (quantised, "keep")):
        done = run(engine_of(folder, adapters, PoolSpec("mean", 64), weights=form), requests)
        states.append(np.stack([one.samples[0].vector for one in done]))
    assert_relative(states[1], states[0], 0.03)
    # What the adapter adds is far above that.
    assert np.abs(states[0][::2] - states[0][1::2]).max() > 4 * np.abs(states[0] - states[1]).max()


def test_a_device_with_kernels_for_codes_keeps_all_but_experts(written: Callable[..., tuple[Path, Path]]) -> None:
    quantised, _ = written("gptq-order", "qwen2-moe")
    spec, suiting = load_spec(str(quantised)), Suiting(ReferenceOps(), torch.float32)
    kept = dict(suiting(load_weights(str(quantised), spec, torch.float32, keep=True)))
    codes = {name for name, tensor in kept.items() if isinstance(tensor, GroupQuantized)}
    assert codes == {f"layers.{i}.{name}" for i in range(2) for name in ("qkv", "o")}
    assert (suiting.kept, suiting.dense) == (4, 2 * 2 * 7)  # the shared expert is one


def test_experts_of_codes_on_a_cpu(
    written: Callable[..., tuple[Path, Path]], capfd: pytest.CaptureFixture[str]
) -> None:
    """Rounded activations may choose another expert, so most states are compared and not all."""
    quantised, dense = written("ct-packed-8", "qwen2-moe")
    requests = [Request(i, text, SamplingParams()) for i, text in enumerate(prompts())]
    pool = PoolSpec("last", 64)
    states = [
        np.stack([one.samples[0].vector for one in run(engine_of(folder, {}, pool, weights=form), requests)])
        for folder, form in ((dense, "auto"), (quantised, "auto"), (quantised, "keep"))
    ]
    assert "stay codes: 0.00 GiB" in capfd.readouterr().err
    assert_relative(states[1], states[0], 1e-5)
    error = np.linalg.norm(states[2] - states[0], axis=1) / np.linalg.norm(states[0], axis=1)
    assert 0 < np.median(error) < 0.05
