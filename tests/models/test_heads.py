"""Vectors, classes and relevance of random tiny models: those of transformers in float32."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.tiny_engine import LetterTokenizer
from models.drawn_models import VOCAB, draw_config, vary
from models.test_parity import prompts
from models.tiny_models import TINY, TinyModel, edit_json

from batchinfer.config import Config, EmbedConfig, EngineConfig, ModelConfig, RerankConfig, TaskConfig
from batchinfer.engine.loading import load_engine
from batchinfer.feed import steps
from batchinfer.models.architectures import ARCHITECTURES, STEMS, named_architecture
from batchinfer.models.pool_spec import pool_spec, yes_no_spec
from batchinfer.models.spec import load_spec
from batchinfer.types import JobError, PoolSpec, Request, SamplingParams

CLASSIFIERS = [name for name in ARCHITECTURES if name not in ("Olmo2ForCausalLM", "GraniteForCausalLM")]
"""Transformers has the others only without this head."""


def vectors(folder: Path, pool: PoolSpec, texts: Sequence[np.ndarray], **options: Any) -> list[np.ndarray]:
    """What our engine says, with prefix cache, chunked prefill and more texts than slots."""
    sizes = {"dtype": "fp32", "threads": 1, "page_size": 4, "num_pages": 100, "max_slots": 3, "max_step_tokens": 20}
    engine = load_engine(
        ModelConfig(path=str(folder)),
        EngineConfig(**({"device": "cpu"} | sizes | options)),
        tokenizer=LetterTokenizer(),  # type: ignore[arg-type]
        pool=pool,
    )
    requests = [Request(i, np.asarray(text, np.int32), SamplingParams()) for i, text in enumerate(texts)]
    done = {completion.id: completion for step in steps(engine, requests) for completion in step}
    engine.close()
    assert [done[i].error for i in range(len(texts))] == [None] * len(texts)
    return [done[i].samples[0].vector for i in range(len(texts))]


def save(model: Any, folder: Path) -> Any:
    vary(model, large=("embed", "wte"))
    model.save_pretrained(folder)
    return model.eval()


def configure(folder: Path, task: str, activation: str = "auto", **embed: Any) -> Config:
    return Config(TaskConfig(task, activation), ModelConfig(path=str(folder)), embed=EmbedConfig(**embed))


@pytest.mark.feature(
    "tasks", "embed: the vectors of transformers, decoders of each architecture (last, mean and cls in turn)"
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embeddings_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    """Saved as the base model or with its LM head: what the head is does not matter."""
    from transformers import AutoModel, AutoModelForCausalLM

    torch.manual_seed(5)
    kind = AutoModel if len(architecture) % 2 else AutoModelForCausalLM
    model = save(kind.from_config(draw_config(architecture, 3), attn_implementation="eager"), tmp_path)
    base, texts = getattr(model, model.base_model_prefix, model), prompts(1)
    pooling = ("last", "mean", "cls")[list(ARCHITECTURES).index(architecture) % 3]
    pool = pool_spec(configure(tmp_path, "embed", pooling=pooling, dimensions=5))
    for text, vector in zip(texts, vectors(tmp_path, pool, texts), strict=True):
        with torch.inference_mode():
            states = base(torch.from_numpy(text).long()[None]).last_hidden_state[0].double()
        pooled = {"last": states[-1], "mean": states.mean(0), "cls": states[0]}[pooling][:5]
        np.testing.assert_allclose(vector, torch.nn.functional.normalize(pooled, dim=0).numpy(), atol=2e-5)


@pytest.mark.feature("tasks", "classify: the probabilities of transformers, each architecture that has the head there")
@pytest.mark.parametrize("architecture", CLASSIFIERS)
@pytest.mark.hardware("task=embed, classify")
def test_classes_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(7)
    config = draw_config(architecture, 4)
    config.num_labels, config.pad_token_id = 3, 0
    config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    model = save(model, tmp_path)
    pool = pool_spec(configure(tmp_path, "classify"))
    assert pool.labels == ("no", "maybe", "yes")
    texts = [*prompts(2), np.array([5, 6, 7, 0, 0], np.int32)]  # the last one ends with padding
    for text, vector in zip(texts, vectors(tmp_path, pool, texts), strict=True):
        with torch.inference_mode():
            logits = model(torch.from_numpy(text).long()[None]).logits[0]
        np.testing.assert_allclose(vector, logits.double().softmax(0).numpy(), atol=2e-5)


@pytest.mark.feature("tasks", "classify: sigmoid of one label and of labels that do not exclude each other")
@pytest.mark.parametrize(
    ("problem", "count", "asked", "function"),
    [
        (None, 1, "auto", torch.sigmoid),
        ("multi_label_classification", 4, "auto", torch.sigmoid),
        ("regression", 2, "auto", lambda x: x),
        ("single_label_classification", 2, "none", lambda x: x),
        (None, 3, "sigmoid", torch.sigmoid),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_what_makes_probabilities(
    device: str, problem: str, count: int, asked: str, function: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(9)
    config = draw_config("LlamaForCausalLM", 1)
    config.num_labels, config.problem_type = count, problem
    model = save(AutoModelForSequenceClassification.from_config(config), tmp_path)
    text = prompts(3)[0]
    (vector,) = vectors(tmp_path, pool_spec(configure(tmp_path, "classify", asked)), [text], device=device)
    with torch.inference_mode():
        expected = function(model(torch.from_numpy(text).long()[None]).logits[0].double())
    np.testing.assert_allclose(vector, expected.numpy(), atol=5e-5)


@pytest.mark.feature("tasks", "rerank: the probability of yes against no by the LM head, tied, soft-capped or scaled")
@pytest.mark.parametrize("name", ["qwen3", "llama-biased-tied", "gemma2", "granite"])
def test_yes_against_no(tiny: Any, name: str) -> None:
    model: TinyModel = tiny(name)
    pool = PoolSpec("last", 2, "tokens", "softmax", tokens=(11, 40))
    got = vectors(model.folder, pool, model.ids.tolist())
    expected = model.logits[:, -1, [11, 40]].double().softmax(1)
    np.testing.assert_allclose(np.stack(got), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "llama-biased-tied"])
def test_yes_against_no_of_int8_weights(tiny: Any, name: str) -> None:
    model: TinyModel = tiny(name)
    pool = PoolSpec("last", 2, "tokens", "softmax", tokens=(11, 40))
    dense, short = (np.stack(vectors(model.folder, pool, model.ids.tolist(), weights=w)) for w in ("auto", "int8"))
    assert 0 < np.abs(short - dense).max() < 0.05


def test_a_prompt_may_fill_the_whole_context(tiny: Any) -> None:
    longest = TINY["llama"][1].get("max_position_embeddings", 64)
    (vector,) = vectors(tiny("llama").folder, PoolSpec("last", 64), [np.arange(longest) % VOCAB])
    assert np.isfinite(vector).all()


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


MODULES = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
MODULES += [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]


@pytest.mark.feature("tasks", "embed: a folder of sentence-transformers says how its states are pooled")
@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "word_embedding_dimension": 64}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_the_folder_decides_the_pooling(copy_of: Any, settings: dict[str, Any], pooling: str) -> None:
    folder = copy_of("llama")
    assert pool_spec(configure(folder, "embed")) == PoolSpec("last", 64, activation="normalise")
    write_json(folder / "modules.json", [*MODULES, {"path": "2_Normalize", "type": "x.Normalize"}])
    write_json(folder / "1_Pooling" / "config.json", settings)
    assert pool_spec(configure(folder, "embed")).pooling == pooling
    assert pool_spec(configure(folder, "embed", pooling="cls", normalize=False)) == PoolSpec("cls", 64)


@pytest.mark.parametrize(
    ("modules", "settings", "message"),
    [
        ([*MODULES, {"path": "2_LSTM", "type": "x.LSTM"}], {"pooling_mode": "mean"}, "the step 'LSTM' is not"),
        (MODULES, {"pooling_mode_max_tokens": True}, "pooling by max_tokens is not supported"),
        (MODULES, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls_token, mean_tokens"),
        (MODULES, {}, "pooling by nothing is not supported"),
        ([{"path": "../x", "type": "x.Pooling"}], {}, "must lie in the model's folder"),
        ({"path": ""}, {}, "must hold a JSON list of objects"),
    ],
)
def test_poolings_that_are_not_supported(copy_of: Any, modules: Any, settings: dict[str, Any], message: str) -> None:
    folder = copy_of("llama")
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling" / "config.json", settings)
    with pytest.raises(JobError, match=message):
        pool_spec(configure(folder, "embed"))


def test_tasks_that_do_not_fit_the_model(copy_of: Any) -> None:
    folder = copy_of("llama")
    with pytest.raises(JobError, match=r"embed\.dimensions=65 is more than the 64"):
        pool_spec(configure(folder, "embed", dimensions=65))
    with pytest.raises(JobError, match="task=classify needs a model with a classification head"):
        pool_spec(configure(folder, "classify"))
    edit_json(folder / "config.json", architectures=["LlamaForSequenceClassification"], id2label={"0": "a", "1": "b"})
    with pytest.raises(JobError, match="needs a head of one value, and this one tells 2 classes apart"):
        pool_spec(configure(folder, "rerank"))
    with pytest.raises(JobError, match="has no LM head"):
        load_engine(ModelConfig(path=str(folder)), EngineConfig(device="cpu"))
    with pytest.raises(JobError, match=r"lacks 1 tensors of the model, the first is 'score\.weight'"):
        vectors(folder, pool_spec(configure(folder, "classify")), [[3]])
    for wrong in ({"0": "a", "2": "b"}, [], {}, {"x": "a"}):
        edit_json(folder / "config.json", id2label=wrong)
        with pytest.raises(JobError, match="id2label must name the classes by their numbers"):
            pool_spec(configure(folder, "classify"))
    edit_json(folder / "config.json", id2label=None, num_labels=0)
    with pytest.raises(JobError, match="num_labels=0 must be a whole number above 0"):
        pool_spec(configure(folder, "classify"))
    edit_json(folder / "config.json", num_labels=None, problem_type="guess")
    with pytest.raises(JobError, match="problem_type='guess' is not supported"):
        pool_spec(configure(folder, "classify"))


class Words:
    """A tokenizer of whole words."""

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[np.ndarray]:
        assert not add_special_tokens
        return [np.arange(3, 3 + len(text.split())) for text in texts]


def test_yes_and_no_are_one_token_each(tiny: Any) -> None:
    spec = load_spec(str(tiny("llama").folder))
    good = yes_no_spec("m", spec, RerankConfig(yes_token="Yes", no_token="No"), Words())  # type: ignore[arg-type]
    assert (good.tokens, good.activation, good.head) == ((3, 3), "softmax", "tokens")
    with pytest.raises(JobError, match=r"rerank\.no_token='not at all' is 3 tokens of m; it must be one"):
        yes_no_spec("m", spec, RerankConfig(yes_token="yes", no_token="not at all"), Words())  # type: ignore[arg-type]
    with pytest.raises(JobError, match=r"needs rerank\.yes_token and rerank\.no_token"):
        yes_no_spec("m", spec, RerankConfig(), Words())  # type: ignore[arg-type]
    with pytest.raises(JobError, match="it has neither"):
        yes_no_spec("m", spec.with_head("hidden"), RerankConfig(), Words())  # type: ignore[arg-type]


def test_names_of_the_same_layers_with_other_heads() -> None:
    for stem, name in STEMS.items():
        assert named_architecture(f"{stem}Model") == (name, "hidden")
        assert named_architecture(f"{stem}ForSequenceClassification") == (name, "classes")
    for name in ARCHITECTURES:
        assert named_architecture(name) == (name, "tokens")
    for unknown in ("Gemma3ForSequenceClassification", "LlamaForTokenClassification", "Model", "", "BloomModel"):
        assert named_architecture(unknown) is None
