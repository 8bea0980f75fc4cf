"""Weights kept as codes, from the file to the logits: against the same model dequantised, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from models.test_decoder import ops, run_steps  # noqa: F401
from models.test_weights import load, wide, write_gguf  # noqa: F401
from models.tiny_models import GGUF, TinyModel

from batchinfer.arguments import token_ids
from batchinfer.config import EngineConfig, ModelConfig
from batchinfer.engine.loading import load_engine
from batchinfer.llm import LLM
from batchinfer.models.decoder import Decoder
from batchinfer.models.files import ModelError, StoredTensor
from batchinfer.models.gguf import read_gguf
from batchinfer.models.gguf_blocks import Form
from batchinfer.models.layout import layout
from batchinfer.models.packing import bytes_of, pack
from batchinfer.models.spec import load_spec
from batchinfer.models.weights import kept_forms, load_weights
from batchinfer.ops import Ops
from batchinfer.ops.quantized import Quantized
from batchinfer.types import JobError, SamplingParams


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("name", GGUF)
def test_what_is_kept_is_what_would_be_dequantised(
    name: str,
    kind: str,
    wide: Callable[[str], Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    path = write_gguf(wide(name), tmp_path / "x.gguf", kind)
    spec, dense = load_spec(str(path)), load(path)
    kept = dict(load_weights(str(path), spec, torch.float32, keep=True))
    if spec.tied_embeddings:
        dense["lm_head"] = dense["embed"]
    assert kept.keys() == dense.keys()
    for target, tensor in kept.items():
        matrix = dense[target].ndim == 2 and target != "embed"
        assert isinstance(tensor, Quantized) == matrix
        if matrix:
            torch.testing.assert_close(tensor.dense(torch.float32), dense[target], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(tensor, dense[target])


def test_forms_of_merged_matrices(tiny: Callable[[str], TinyModel]) -> None:
    plan = layout(load_spec(str(tiny("llama").folder)), gguf=True)

    def forms(**kinds: str) -> dict[str, Form]:
        names = {name: kinds.get(name.split(".")[-2], "F16") for name in plan.parts}
        return kept_forms([StoredTensor(name, kind, (), 0, 0) for name, kind in names.items()], plan)

    assert forms() == {}
    assert forms(attn_q="Q4_K", attn_k="Q4_K") == {}
    found = forms(attn_q="Q4_K", attn_k="Q4_K", attn_v="Q6_K", ffn_down="Q4_1", token_embd="Q8_0")
    assert (found["layers.0.qkv"], found["layers.0.down"], found["embed"]) == (Form(8, 16), Form(4), Form(8))
    assert "layers.0.o" not in found


@pytest.mark.feature(
    "models", "engine.weights=keep and int8 within a bound of the float32 model, tokens in any batch alike"
)
@pytest.mark.parametrize(("form", "bound"), [("keep", 0.02), ("int8", 0.04)])
@pytest.mark.hardware("weights kept as codes")
def test_logits_are_near_those_of_the_dequantised_model(
    form: str,
    bound: float,
    ops: Ops,  # noqa: F811
    wide: Callable[[str], Path],  # noqa: F811
    tiny: Callable[[str], TinyModel],
    tmp_path: Path,
) -> None:
    path = str(write_gguf(wide("llama"), tmp_path / "x.gguf", "Q8_0"))
    spec, logits = load_spec(path), {}
    for now in ("auto", form):
        weights = load_weights(path, spec, torch.float32, keep=now == "keep")
        packed = pack(spec, weights, ops, to_int8=now == "int8")
        decoder = Decoder(spec, packed, ops, torch.float32, max_positions=64, max_step_tokens=64, max_samples=4)
        logits[now], _ = run_steps(decoder, tiny("llama"))
        if ops.device.type == "cpu" and hasattr(ops, "isa"):
            logits[f"{now} bytes"] = bytes_of(packed)
    error = (logits[form] - logits["auto"]).norm() / logits["auto"].norm()
    assert 0 < error < bound, error
    if f"{form} bytes" in logits:
        assert logits[f"{form} bytes"] < 0.5 * logits["auto bytes"]


@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_a_file_with_nothing_to_keep(kind: str, wide: Callable[[str], Path], tmp_path: Path) -> None:  # noqa: F811
    path = str(write_gguf(wide("llama"), tmp_path / "x.gguf", kind))
    with pytest.raises(ModelError, match=r"holds no matrix that engine\.weights=keep could keep: .*Q4_0, Q4_1"):
        next(load_weights(path, load_spec(path), torch.float32, keep=True))


def test_damaged_scales_are_named(wide: Callable[[str], Path], tmp_path: Path) -> None:  # noqa: F811
    path = write_gguf(wide("llama"), tmp_path / "x.gguf", "Q8_0")
    data = bytearray(path.read_bytes())
    at = next(tensor.offset for tensor in read_gguf(str(path)).tensors if tensor.name == "blk.0.ffn_down.weight")
    data[at : at + 2] = np.array([np.nan], np.float16).tobytes()
    path.write_bytes(data)
    with pytest.raises(
        ModelError, match=r"'blk\.0\.ffn_down\.weight' \(Q8_0\) is damaged: a block's scale is not a finite number"
    ):
        dict(load_weights(str(path), load_spec(str(path)), torch.float32, keep=True))


def test_other_devices_say_that_they_have_not_got_it(monkeypatch: pytest.MonkeyPatch, smollm_gguf: Path) -> None:
    from batchinfer.ops.native import NativeOps

    monkeypatch.setattr(NativeOps, "lacks", frozenset({"quantised weights"}))
    with pytest.raises(JobError, match=r"engine\.weights=int8 is for the CPU, and NativeOps has not got it yet"):
        load_engine(ModelConfig(str(smollm_gguf)), EngineConfig(device="cpu", weights="int8", num_pages=16))


@pytest.mark.model
def test_the_real_model(smollm_gguf: Path, prompts_path: Path) -> None:
    """Log-likelihoods of what float32 generates."""
    chats = pq.read_table(prompts_path).column("messages").to_pylist()[:3]
    found = {}
    for form in ("auto", "keep", "int8"):
        llm = LLM(str(smollm_gguf), device="cpu", dtype="fp32", weights=form, max_slots=8, num_pages=200)
        prompts = token_ids(chats, llm._engine.tokenizer)
        if form == "auto":
            texts = [one.samples[0].token_ids for one in llm.generate(prompts, SamplingParams(max_tokens=16))]
        scored = llm.score(prompts, texts)
        found[form] = np.concatenate([one.samples[0].logprobs.chosen for one in scored])
        found[f"{form} bytes"] = llm.stats().weight_bytes
        llm.close()
    assert np.abs(found["keep"] - found["auto"]).mean() < 0.06
    assert np.abs(found["int8"] - found["auto"]).mean() < 0.25
    assert found["keep bytes"] < 0.4 * found["auto bytes"]
