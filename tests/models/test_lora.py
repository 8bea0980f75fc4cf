"""LoRA adapters beside the base model in one batch: what transformers makes of weights with the adapter merged in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.tiny_engine import LetterTokenizer
from models.tiny_models import TinyModel, edit_json
from safetensors.torch import load_file, save_file

from batchinfer.config import EngineConfig, ModelConfig
from batchinfer.engine.loading import load_engine
from batchinfer.feed import steps
from batchinfer.models.identity import adapter_fingerprints
from batchinfer.models.lora import Factors, Grouped, Stacked, pack_adapters
from batchinfer.ops.reference import ReferenceOps
from batchinfer.types import Completion, ErrorCode, JobError, PoolSpec, Request, SamplingParams

Tiny = Callable[[str], TinyModel]

MODULES = {
    "llama-biased-tied": ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"),
    "qwen3": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "gemma2": ("k_proj", "up_proj", "gate_proj"),
    "phi3": ("qkv_proj", "gate_up_proj"),
    "gpt2": ("c_attn", "c_fc"),
    "gpt-neox": ("query_key_value", "dense_4h_to_h"),
    "opt": ("q_proj", "out_proj", "fc1"),
    "qwen3-moe": ("q_proj", "v_proj"),
    "gpt-oss": ("q_proj", "o_proj"),
    "deepseek-v2": ("q_proj", "kv_b_proj"),
    "deepseek-v3": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"),
}
"""What the adapters of a tiny model adapt."""


def write_adapter(folder: Path, model: Path, modules: tuple[str, ...], seed: int, **settings: Any) -> Path:
    """An adapter of rank 2 + seed for the modules of those names, as PEFT would save it."""
    config = {"peft_type": "LORA", "r": 2 + seed, "lora_alpha": 5.0, "bias": "none", "use_rslora": False} | settings
    config |= {"target_modules": list(modules), "base_model_name_or_path": str(model), "fan_in_fan_out": False}
    generator, factors = torch.Generator().manual_seed(seed), {}
    for name, weight in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if weight.ndim != 2 or module.rpartition(".")[2] not in modules or ".experts." in name:
            continue
        rows, columns = weight.shape[::-1] if module.rpartition(".")[2].startswith("c_") else weight.shape
        for kind, shape in (("A", (config["r"], columns)), ("B", (rows, config["r"]))):
            factors[f"base_model.model.{module}.lora_{kind}.weight"] = torch.randn(shape, generator=generator) * 0.1
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def merged(model: Path, adapter: Path) -> Any:
    """The model of transformers with W + scale B A for each W, in float32."""
    from transformers import AutoModelForCausalLM

    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    factors = load_file(adapter / "adapter_model.safetensors")
    weights = dict(theirs.named_parameters())
    for name in [name for name in factors if ".lora_A." in name]:
        product = scale * factors[name.replace("lora_A", "lora_B")] @ factors[name]
        weight = weights[name.removeprefix("base_model.model.").replace(".lora_A", "")]
        weight.data += product if weight.shape == product.shape and "c_" not in name else product.T
    return theirs


def engine_of(model: Path, adapters: dict[str, Path], pool: PoolSpec | None = None, **options: Any) -> Any:
    sizes = {"dtype": "fp32", "threads": 1, "page_size": 4, "num_pages": 120, "max_slots": 4, "max_step_tokens": 20}
    return load_engine(
        ModelConfig(path=str(model), adapters={name: str(folder) for name, folder in adapters.items()}),
        EngineConfig(**({"device": "cpu"} | sizes | options)),
        tokenizer=LetterTokenizer(),  # type: ignore[arg-type]
        pool=pool,
    )


def run(engine: Any, requests: list[Request]) -> list[Completion]:
    done = {completion.id: completion for step in steps(engine, requests) for completion in step}
    engine.close()
    return [done[request.id] for request in requests]


def prompts() -> list[np.ndarray]:
    """Few, so that different adapters get the same ones, and all begin alike."""
    rng = np.random.default_rng(3)
    shared = rng.integers(3, 60, 21)
    return [np.concatenate([shared, rng.integers(3, 60, n)]).astype(np.int32) for n in (3, 9, 14)]


@pytest.mark.feature("LoRA", "several adapters and the base model in one batch: the states of merged weights")
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.hardware("LoRA adapters")
def test_states_are_those_of_merged_weights(tiny: Tiny, tmp_path: Path, name: str) -> None:
    model = tiny(name).folder
    adapters = {
        "one": write_adapter(tmp_path / "one", model, MODULES[name], 1),
        "two": write_adapter(tmp_path / "two", model, MODULES[name][:1], 2, use_rslora=True),
    }
    asked = [(prompt, number) for prompt in prompts() for number in (None, 0, 1)]
    requests = [Request(i, prompt, SamplingParams(), adapter=number) for i, (prompt, number) in enumerate(asked)]
    pool = PoolSpec("mean", 64)
    got = run(engine_of(model, adapters, pool), requests)
    alone = run(engine_of(model, {}, pool), [request for request in requests if request.adapter is None])
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    theirs = {None: base, 0: merged(model, adapters["one"]), 1: merged(model, adapters["two"])}
    for (prompt, number), completion in zip(asked, got, strict=True):
        decoder = getattr(theirs[number], theirs[number].base_model_prefix)
        with torch.inference_mode():
            states = decoder(torch.from_numpy(prompt).long()[None]).last_hidden_state[0].double().mean(0)
        np.testing.assert_allclose(completion.samples[0].vector, states.numpy(), atol=3e-4, rtol=3e-4)
    base_rows = [completion.samples[0].vector for completion in got if asked[completion.id][1] is None]
    assert all((a == b.samples[0].vector).all() for a, b in zip(base_rows, alone, strict=True))


@pytest.mark.feature(
    "LoRA", "greedy texts of merged weights, with prefix cache and chunked prefill; base rows bit-identical"
)
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_texts_are_those_of_merged_weights(tiny: Tiny, tmp_path: Path, device: str) -> None:
    """The same prompts for all: the cache keeps the adapters apart. A row of an adapter does not depend on the
    others."""
    model, modules = tiny("llama").folder, ("q_proj", "k_proj", "up_proj", "down_proj")
    adapters = {str(i): write_adapter(tmp_path / str(i), model, modules, i, lora_alpha=20.0) for i in range(3)}
    asked = [(prompt, number) for prompt in prompts() for number in (None, 0, 1, 2)]
    greedy = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0)
    requests = [Request(i, prompt, greedy, adapter=number) for i, (prompt, number) in enumerate(asked)]
    engine = engine_of(model, adapters, device=device)
    got = run(engine, requests)
    assert engine.stats().cached_prompt_tokens > 0
    theirs = [merged(model, folder) for folder in adapters.values()]
    for (prompt, number), completion in zip(asked, got, strict=True):
        (sample,) = completion.samples
        if number is not None:
            text = torch.from_numpy(np.concatenate([prompt, sample.token_ids])).long()
            with torch.inference_mode():
                likely = theirs[number](text[None]).logits[0, len(prompt) - 1 : -1].argmax(1)
            assert sample.token_ids.tolist() == likely.tolist()
    assert len({tuple(completion.samples[0].token_ids) for completion in got}) > 4
    if device == "reference":  # torch's products promise no order
        return
    for number in (None, 1):
        mine = [request for request in requests if request.adapter == number]
        alone = run(engine_of(model, {} if number is None else adapters, device=device), mine)
        for request, completion in zip(mine, alone, strict=True):
            (one,), (other,) = got[request.id].samples, completion.samples
            assert one.token_ids.tolist() == other.token_ids.tolist()
            assert (one.logprobs.chosen == other.logprobs.chosen).all()


def test_beams_go_through_their_adapter(tiny: Tiny, tmp_path: Path) -> None:
    """A search with one beam finds the greedy text."""
    model, modules = tiny("llama").folder, MODULES["llama-biased-tied"]
    adapters = {str(i): write_adapter(tmp_path / str(i), model, modules, i, lora_alpha=20.0) for i in range(2)}
    greedy = SamplingParams(max_tokens=6, ignore_eos=True)
    asked = [(number, params) for number in (None, 0, 1) for params in (greedy, replace(greedy, beam_width=1))]
    requests = [Request(i, prompts()[0], params, adapter=number) for i, (number, params) in enumerate(asked)]
    texts = [c.samples[0].token_ids.tolist() for c in run(engine_of(model, adapters), requests)]
    assert texts[::2] == texts[1::2]
    assert len(set(map(tuple, texts))) == 3


def test_base_weights_may_be_int8(tiny: Tiny, tmp_path: Path) -> None:
    """What the adapter adds is the same; gates and values are packed apart in both."""
    model = tiny("llama").folder
    adapters = {"0": write_adapter(tmp_path / "0", model, ("gate_proj", "q_proj"), 0, lora_alpha=20.0)}
    requests = [Request(i, prompts()[0], SamplingParams(), adapter=number) for i, number in enumerate((None, 0))]
    vectors = {}
    for form in ("auto", "int8"):
        done = run(engine_of(model, adapters, PoolSpec("last", 64), weights=form), requests)
        vectors[form] = np.stack([completion.samples[0].vector for completion in done])
    error = np.abs(vectors["int8"] - vectors["auto"]).max()
    assert 0 < error < 0.1 * np.abs(vectors["auto"][1] - vectors["auto"][0]).max()


@pytest.mark.feature("LoRA", "all rows through all adapters side by side: the sums of each through its own")
@pytest.mark.parametrize("seed", range(4))
def test_both_ways_add_the_same(seed: int) -> None:
    """What other rows hold does not count, not even infinities."""
    generator, ops = torch.Generator().manual_seed(seed), ReferenceOps()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).float()

    adapters = [{"o": Factors(random(r, 24), random(16, r))} for r in (1, 3, 8)]
    adapters[1] = {"another": adapters[1]["o"]}
    x, rows = random(40, 24), torch.randint(-1, 3, (40,), generator=generator, dtype=torch.int32)
    want = random(40, 16)
    got = want.clone()
    groups = tuple((i, (rows == i).nonzero()[:, 0]) for i in range(3))
    pack_adapters(adapters, ops, torch.float32, Grouped)["o"].add(ops, x, groups, want)
    stacked = pack_adapters(adapters, ops, torch.float32, Stacked)
    assert stacked.keys() == {"o", "another"}
    stacked["o"].add(ops, x, rows, got)
    torch.testing.assert_close(got, want)
    x[rows == 0] = torch.inf
    others, again = rows != 0, want.clone()
    stacked["o"].add(ops, x, rows, again)
    assert again[others].isfinite().all()


def test_an_adapter_that_there_is_not(tiny: Tiny) -> None:
    request = Request(0, prompts()[0], SamplingParams(max_tokens=2), adapter=0)
    (completion,) = run(engine_of(tiny("llama").folder, {}), [request])
    assert completion.error is not None
    assert completion.error.code is ErrorCode.BAD_ADAPTER


@pytest.mark.feature("LoRA", "what is not supported is refused by its name")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern=.* is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ({"r": 0}, "r=0 must be a whole number above 0"),
        ({"lora_alpha": None}, "has no 'lora_alpha'"),
        ({"r": 5}, r"has the shape \(3, 64\); it must be \(5, 64\)"),
    ],
)
def test_settings_that_are_not_supported(tiny: Tiny, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    model = tiny("llama").folder
    folder = write_adapter(tmp_path / "adapter", model, ("q_proj",), 1)
    edit_json(folder / "adapter_config.json", **settings)
    with pytest.raises(JobError, match=message):
        engine_of(model, {"bad": folder})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"base_model.model.lm_head.lora_A.weight": (3, 64)},
            "adapting 'lm_head' of LlamaForCausalLM is not supported",
        ),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": (3, 97)}, "is no factor of a matrix"),
        ({"base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight": (3, 64)}, "lacks lora_B of"),
        ({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": (3, 64)}, "adapting 'model.layers.9"),
        ({"base_model.model.model.layers.0.input_layernorm.lora_A.weight": (3, 64)}, "adapting 'model.layers.0.input"),
    ],
)
def test_tensors_that_are_not_supported(tiny: Tiny, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model = tiny("llama").folder
    folder = write_adapter(tmp_path / "adapter", model, ("q_proj",), 1)
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {name: torch.zeros(shape) for name, shape in changes.items()}, file)
    with pytest.raises(JobError, match=message):
        engine_of(model, {"bad": folder})
    file.unlink()
    with pytest.raises(JobError, match="save the adapter with safetensors"):
        engine_of(model, {"bad": folder})


def test_the_plan_knows_an_adapter_by_its_weights_and_its_scale(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama").folder
    folder = write_adapter(tmp_path / "a", model, ("q_proj",), 1)
    copy = write_adapter(tmp_path / "b", model, ("q_proj",), 1)
    before = adapter_fingerprints({"x": str(folder)})
    assert before == adapter_fingerprints({"x": str(copy)})
    edit_json(folder / "adapter_config.json", lora_alpha=6.0)
    other = write_adapter(tmp_path / "c", model, ("v_proj",), 1)
    assert len({str(adapter_fingerprints({"x": str(f)})) for f in (folder, copy, other)}) == 3


@pytest.mark.feature("LoRA", "adapters by their names in a notebook")
def test_the_notebook_names_its_adapters(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchinfer import llm as door

    model, modules = tiny("llama").folder, MODULES["llama-biased-tied"]
    adapters = {str(i): str(write_adapter(tmp_path / str(i), model, modules, i, lora_alpha=20.0)) for i in range(2)}
    load = door.load_engine
    monkeypatch.setattr(door, "load_engine", lambda *a, **k: load(*a, **k, tokenizer=LetterTokenizer()))  # type: ignore[arg-type]
    options = {"device": "cpu", "dtype": "fp32", "threads": 1, "num_pages": 20}
    llm = door.LLM(str(model), adapters=adapters, **options)
    greedy = SamplingParams(max_tokens=8, ignore_eos=True)
    texts = {
        name: llm.generate([prompts()[0]], greedy, adapter=name)[0].samples[0].token_ids for name in (None, "0", "1")
    }
    with pytest.raises(ValueError, match="there is no adapter '2'; there are 0, 1"):
        llm.generate([prompts()[0]], greedy, adapter="2")
    llm.close()
    assert len({tuple(tokens) for tokens in texts.values()}) == 3
    vectors = door.LLM(str(model), task="embed", **options)
    (completion,) = vectors.vectors([prompts()[0]])
    vectors.close()
    assert np.linalg.norm(completion.samples[0].vector) == pytest.approx(1, abs=1e-6)
