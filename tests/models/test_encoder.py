"""Encoders (BERT, RoBERTa, XLM-R): vectors, classes and relevance of transformers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.tiny_engine import LetterTokenizer
from models.tiny_models import edit_json

from batchinfer.config import Config, EmbedConfig, EngineConfig, ModelConfig, TaskConfig
from batchinfer.engine.loading import load_engine
from batchinfer.feed import steps
from batchinfer.models.encoder_spec import ENCODERS, encoder_layout, encoder_spec
from batchinfer.models.pool_spec import pool_spec
from batchinfer.types import Completion, ErrorCode, JobError, PoolSpec, Request, SamplingParams

VOCAB, POSITIONS = 80, 50
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 72,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 1,
    "attn_implementation": "eager",
}


def build(family: str, kind: str, folder: Path, **settings: Any) -> Any:
    """A random model of transformers, saved: ``kind`` is the part of its class's name behind the family's."""
    import transformers

    torch.manual_seed(len(kind))
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **settings})
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    for name, weight in model.named_parameters():
        weight.data.normal_(float(name.endswith("LayerNorm.weight")), 1.0 if "embeddings" in name else 0.2)
    model.save_pretrained(folder)
    return model


def texts(count: int = 9) -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    lengths = [1, POSITIONS - 2, *rng.integers(1, POSITIONS - 2, count - 2)]
    return [rng.integers(2, VOCAB, n).astype(np.int32) for n in lengths]


def run(folder: Path, pool: PoolSpec | None, requests: list[Request], **options: Any) -> list[Completion]:
    sizes = {"device": "cpu", "dtype": "fp32", "threads": 1, "max_slots": 4, "max_step_tokens": 40} | options
    engine = load_engine(
        ModelConfig(path=str(folder)),
        EngineConfig(**sizes),
        tokenizer=LetterTokenizer(),
        pool=pool,  # type: ignore[arg-type]
    )
    done = {completion.id: completion for step in steps(engine, requests) for completion in step}
    assert engine.num_open == 0
    assert engine.stats().prefill.tokens == engine.stats().prompt_tokens
    engine.close()
    return [done[request.id] for request in requests]


def vectors(folder: Path, pool: PoolSpec, asked: list[np.ndarray], **options: Any) -> list[np.ndarray]:
    done = run(folder, pool, [Request(i, text, SamplingParams()) for i, text in enumerate(asked)], **options)
    return [completion.samples[0].vector for completion in done]


def configure(folder: Path, task: str, **embed: Any) -> Config:
    return Config(TaskConfig(task), ModelConfig(path=str(folder)), embed=EmbedConfig(**embed))


@pytest.mark.feature("tasks", "embed: the vectors of transformers, encoders (BERT, RoBERTa, XLM-R)")
@pytest.mark.parametrize(
    ("kind", "device"),
    [("Model", "cpu"), ("Model", "reference"), ("ForMaskedLM", "cpu"), ("ForSequenceClassification", "cpu")],
)
@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.hardware("encoders")
def test_embeddings_are_those_of_transformers(family: str, kind: str, device: str, tmp_path: Path) -> None:
    model = build(family, kind, tmp_path)
    base, asked = getattr(model, model.base_model_prefix, model), texts()
    with torch.inference_mode():
        states = [base(torch.from_numpy(text).long()[None]).last_hidden_state[0].double() for text in asked]
    for pooling in ("auto", "cls", "last"):
        pool = pool_spec(configure(tmp_path, "embed", pooling=pooling))
        for state, vector in zip(states, vectors(tmp_path, pool, asked, device=device), strict=True):
            pooled = {"auto": state.mean(0), "cls": state[0], "last": state[-1]}[pooling]
            np.testing.assert_allclose(vector, torch.nn.functional.normalize(pooled, dim=0).numpy(), atol=1e-5)


@pytest.mark.feature("tasks", "classify and rerank with encoders: one text or a pair, as transformers has it")
@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("count", [1, 3])
def test_classes_are_those_of_transformers(family: str, count: int, tmp_path: Path) -> None:
    kinds = 1 if family == "XLMRoberta" else 2
    settings = {"num_labels": count, "hidden_act": "gelu_new", "type_vocab_size": kinds}
    model = build(family, "ForSequenceClassification", tmp_path, **settings)
    pool, asked = pool_spec(configure(tmp_path, "rerank" if count == 1 else "classify")), texts()
    seconds = [None if i % 2 else len(text) // 2 for i, text in enumerate(asked)]
    requests = [
        Request(i, text, SamplingParams(), second_from=second)
        for i, (text, second) in enumerate(zip(asked, seconds, strict=True))
    ]
    for text, second, completion in zip(asked, seconds, run(tmp_path, pool, requests), strict=True):
        types = torch.zeros(1, len(text), dtype=torch.long)
        if second is not None:
            types[0, second:] = kinds - 1
        with torch.inference_mode():
            logits = model(torch.from_numpy(text).long()[None], token_type_ids=types).logits[0].double()
        expected = torch.sigmoid(logits) if count == 1 else logits.softmax(0)
        np.testing.assert_allclose(completion.samples[0].vector, expected.numpy(), atol=1e-5)


def test_a_text_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    build("Bert", "Model", tmp_path)
    pool, asked = PoolSpec("mean", 48), texts(20)
    whole = vectors(tmp_path, pool, asked, max_slots=32, max_step_tokens=2000)
    for options in ({"max_slots": 1}, {"max_slots": 5, "max_step_tokens": 64}):
        assert all((a == b).all() for a, b in zip(whole, vectors(tmp_path, pool, asked, **options), strict=True))


def test_bfloat16_is_near(tmp_path: Path) -> None:
    build("Roberta", "Model", tmp_path)
    pool, asked = PoolSpec("mean", 48, activation="normalise"), texts()
    for exact, near in zip(vectors(tmp_path, pool, asked), vectors(tmp_path, pool, asked, dtype="bf16"), strict=True):
        assert float(exact @ near) > 0.999


def test_texts_that_cannot_run_are_errors(tmp_path: Path) -> None:
    build("Bert", "Model", tmp_path)
    bad = [np.arange(0), np.arange(POSITIONS + 1) % VOCAB, np.array([VOCAB]), np.array([-1])]
    requests = [Request(i, text.astype(np.int32), SamplingParams()) for i, text in enumerate([*bad, np.arange(2, 9)])]
    *failed, good = run(tmp_path, PoolSpec("mean", 48), requests)
    codes = [completion.error.code for completion in failed]
    assert codes == [
        ErrorCode.EMPTY_PROMPT,
        ErrorCode.PROMPT_TOO_LONG,
        ErrorCode.BAD_TOKEN_IDS,
        ErrorCode.BAD_TOKEN_IDS,
    ]
    assert good.error is None


def test_what_an_encoder_cannot_do(tmp_path: Path) -> None:
    build("Bert", "Model", tmp_path)
    with pytest.raises(JobError, match=r"is an encoder \(BertModel\), which generates nothing"):
        run(tmp_path, None, [])
    for task, message in (("classify", "needs a model with a classification head"), ("rerank", "it has neither")):
        with pytest.raises(JobError, match=message):
            pool_spec(configure(tmp_path, task))
    with pytest.raises(JobError, match="max_model_len=51 is above the model's 50 positions"):
        run(tmp_path, PoolSpec("mean", 48), [], max_model_len=51)
    for changes, message in (
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder=True is not supported"),
        ({"hidden_act": "silu"}, "hidden_act='silu' is not supported"),
        ({"num_attention_heads": 5}, "make no sense"),
        ({"type_vocab_size": None}, "has no 'type_vocab_size'"),
    ):
        config = (tmp_path / "config.json").read_text()
        edit_json(tmp_path / "config.json", **changes)
        with pytest.raises(JobError, match=message):
            encoder_spec(str(tmp_path))
        (tmp_path / "config.json").write_text(config)


def test_the_layout_names_every_tensor_once(tmp_path: Path) -> None:
    build("XLMRoberta", "ForSequenceClassification", tmp_path)
    spec = encoder_spec(str(tmp_path))
    plan = encoder_layout(spec)
    assert len(plan.parts) == len({(part.target, part.row) for part in plan.parts.values()})
    assert spec.max_positions == POSITIONS - 2
