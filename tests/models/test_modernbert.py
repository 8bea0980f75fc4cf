"""ModernBERT: vectors and classes of transformers in float32, texts longer than what a local layer sees."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from models.drawn_models import BOOLEANS, vary
from models.test_encoder import configure, run, vectors
from models.tiny_models import edit_json

from batchinfer.models.encoder_spec import encoder_layout, encoder_spec
from batchinfer.models.pool_spec import pool_spec
from batchinfer.types import JobError, PoolSpec, Request, SamplingParams

VOCAB, POSITIONS = 80, 70
CHOICES = {
    "num_attention_heads": (1, 3),
    "num_hidden_layers": (1, 4),
    "local_attention": (2, 16, 200),
    "attention_bias": BOOLEANS,
    "mlp_bias": BOOLEANS,
    "norm_bias": BOOLEANS,
    "classifier_bias": BOOLEANS,
    "classifier_pooling": ("cls", "mean"),
    "hidden_activation": ("gelu", "gelu_pytorch_tanh"),
    "global_attn_every_n_layers": (2, 3),
}
"""What a config may say."""


def build(kind: str, seed: int, folder: Path, **settings: Any) -> Any:
    import transformers

    rng = Random(seed)
    torch.manual_seed(seed)
    drawn = {key: rng.choice(values) for key, values in CHOICES.items()} | settings
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 40, "max_position_embeddings": POSITIONS}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    config = transformers.ModernBertConfig(**sizes, **ids, **drawn, attn_implementation="eager")
    model = getattr(transformers, f"ModernBert{kind}")(config).eval()
    vary(model, large=("embeddings",))
    model.save_pretrained(folder)
    return model


def texts() -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    return [rng.integers(3, VOCAB, n).astype(np.int32) for n in (1, POSITIONS, *rng.integers(2, POSITIONS, 6))]


@pytest.mark.feature("tasks", "embed: the vectors of transformers, ModernBERT (random configs)")
@pytest.mark.parametrize("seed", range(12))
def test_embeddings_are_those_of_transformers(seed: int, tmp_path: Path) -> None:
    kind = ("Model", "ForMaskedLM", "ForSequenceClassification")[seed % 3]
    model, asked = build(kind, seed, tmp_path), texts()
    base = getattr(model, model.base_model_prefix, model)
    pooling = ("mean", "cls", "last")[seed % 3]
    pool = pool_spec(configure(tmp_path, "embed", pooling=pooling))
    got = vectors(tmp_path, pool, asked, device=("cpu", "reference")[seed % 2])
    for text, vector in zip(asked, got, strict=True):
        with torch.inference_mode():
            state = base(torch.from_numpy(text).long()[None]).last_hidden_state[0].double()
        pooled = {"mean": state.mean(0), "cls": state[0], "last": state[-1]}[pooling]
        np.testing.assert_allclose(vector, torch.nn.functional.normalize(pooled, dim=0).numpy(), atol=1e-5)


@pytest.mark.feature("tasks", "classify and rerank with ModernBERT, pooled as its config says")
@pytest.mark.parametrize("seed", range(6))
def test_classes_are_those_of_transformers(seed: int, tmp_path: Path) -> None:
    count = 1 + seed % 3
    model = build("ForSequenceClassification", seed, tmp_path, num_labels=count)
    pool, asked = pool_spec(configure(tmp_path, "rerank" if count == 1 else "classify")), texts()
    requests = [Request(i, text, SamplingParams(), second_from=1) for i, text in enumerate(asked)]
    for text, completion in zip(asked, run(tmp_path, pool, requests), strict=True):
        with torch.inference_mode():
            logits = model(torch.from_numpy(text).long()[None]).logits[0].double()
        expected = torch.sigmoid(logits) if count == 1 else logits.softmax(0)
        np.testing.assert_allclose(completion.samples[0].vector, expected.numpy(), atol=1e-5)


def test_a_text_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    build("Model", 1, tmp_path, local_attention=8)
    pool, asked = PoolSpec("mean", 48), texts()
    whole = vectors(tmp_path, pool, asked, max_slots=32, max_step_tokens=2000)
    for options in ({"max_slots": 1}, {"max_slots": 3, "max_step_tokens": 64}):
        assert all((a == b).all() for a, b in zip(whole, vectors(tmp_path, pool, asked, **options), strict=True))


def test_the_published_spelling_of_older_configs(tmp_path: Path) -> None:
    build("Model", 3, tmp_path, num_hidden_layers=4)
    keys = {"layer_types": None, "rope_parameters": None, "norm_eps": 1e-5, "global_attn_every_n_layers": 3}
    edit_json(tmp_path / "config.json", **keys, global_rope_theta=1e5, local_rope_theta=2e4, local_attention=9)
    spec = encoder_spec(str(tmp_path))
    modern = spec.modern
    assert (modern.rope.theta, modern.local_rope.theta, modern.reach) == (1e5, 2e4, 4)
    assert (modern.local, spec.max_positions) == ((False, True, True, False), POSITIONS)
    plan = encoder_layout(spec)
    assert "layers.0.attn_norm" not in plan.targets
    assert "layers.1.attn_norm" in plan.targets


def test_configs_that_are_refused(tmp_path: Path) -> None:
    build("Model", 3, tmp_path)
    config = (tmp_path / "config.json").read_text()
    for changes, message in (
        ({"hidden_activation": "silu"}, "hidden_activation='silu' is not supported; it must be one of gelu"),
        ({"classifier_pooling": "max"}, "classifier_pooling='max' is not supported; it must be cls or mean"),
        ({"layer_types": ["full_attention"] * 9}, "layer_types must be a list of"),
        ({"hidden_size": 45, "num_attention_heads": 3}, "heads of 15 values cannot rotate"),
    ):
        edit_json(tmp_path / "config.json", **changes)
        with pytest.raises(JobError, match=message):
            encoder_spec(str(tmp_path))
        (tmp_path / "config.json").write_text(config)
