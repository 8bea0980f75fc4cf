"""What a model and the settings of a task make of a text, where nothing is generated: PoolSpec. No torch.

A folder in the layout of sentence-transformers (modules.json) says how its states are pooled; any other leaves that to
the settings.
"""

from __future__ import annotations

import os

from batchinfer.config import VECTOR_TASKS, Config, EmbedConfig, RerankConfig
from batchinfer.models.encoder_spec import EncoderSpec, encoder_spec
from batchinfer.models.files import ModelError, read_json
from batchinfer.models.labels import activation, labels
from batchinfer.models.model_spec import ModelSpec
from batchinfer.models.sentence_modules import read_modules
from batchinfer.models.spec import load_spec
from batchinfer.models.tokenizer import Tokenizer, load_tokenizer
from batchinfer.types import ExitCode, JobError, PoolSpec


def pool_spec(config: Config) -> PoolSpec | None:
    """What becomes of a row's text by the job's task; None if it is generating or scoring. Raises JobError (64) where
    model and task do not fit."""
    if config.task.name not in VECTOR_TASKS:
        return None
    path = config.model.path
    spec = encoder_spec(path) or load_spec(path)
    if config.task.name == "embed":
        return embed_spec(path, spec, config.embed)
    if spec.head == "classes":
        return class_spec(path, spec, config.task.name, config.task.activation)
    if config.task.name == "classify":
        raise ModelError(
            f"{path}: task=classify needs a model with a classification head (its architecture in config.json: "
            "...ForSequenceClassification)"
        )
    return yes_no_spec(path, spec, config.rerank, load_tokenizer(path))


def embed_spec(path: str, spec: ModelSpec | EncoderSpec, settings: EmbedConfig) -> PoolSpec:
    """Of the task embed."""
    modules, pooling = read_modules(path), settings.pooling
    width = modules.dense[-1].outputs if modules.dense else spec.width
    if modules.dense and modules.dense[0].inputs != spec.width:
        raise ModelError(f"{path}: {modules.dense[0].folder} must take the model's {spec.width} values")
    if settings.dimensions > width:
        raise JobError(
            f"embed.dimensions={settings.dimensions} is more than the {width} that the vectors of {path} have",
            ExitCode.USAGE,
        )
    if pooling == "auto":
        pooling = modules.mode() or ("mean" if isinstance(spec, EncoderSpec) else "last")
    return PoolSpec(
        pooling,  # type: ignore[arg-type]
        settings.dimensions or width,
        activation="normalise" if settings.normalize else "",
        dense=modules.dense,
    )


def class_spec(path: str, spec: ModelSpec | EncoderSpec, task: str, wanted: str) -> PoolSpec:
    """Of a model with a classification head, whose padding transformers leaves out of account too."""
    where = os.path.join(path, "config.json")
    config = read_json(where)
    names = labels(config, where)
    if task == "rerank" and len(names) != 1:
        raise ModelError(
            f"{where}: task=rerank needs a head of one value, and this one tells {len(names)} classes apart"
        )
    kind = activation(config, where) if wanted == "auto" else "" if wanted == "none" else wanted
    pad = config.get("pad_token_id")
    encoder = isinstance(spec, EncoderSpec)
    return PoolSpec(
        "cls" if encoder else "last",
        len(names),
        head="classes",
        activation=kind,  # type: ignore[arg-type]
        labels=names,
        pad_id=pad if type(pad) is int and not encoder else None,
    )


def yes_no_spec(path: str, spec: ModelSpec | EncoderSpec, settings: RerankConfig, tokenizer: Tokenizer) -> PoolSpec:
    """Of a model that is asked for one of two tokens: its first value is the probability of the one for
    yes against the other."""
    if spec.head != "tokens":
        raise ModelError(f"{path}: task=rerank needs a classification head of one value, or an LM head; it has neither")
    if settings.yes_token is None or settings.no_token is None:
        raise ModelError(
            f"{path} has an LM head: task=rerank needs rerank.yes_token and rerank.no_token, the tokens that it "
            "answers with, and rerank.template, which asks for them (rerank=qwen3 sets all of them)"
        )
    ids = []
    for key, text in (("yes_token", settings.yes_token), ("no_token", settings.no_token)):
        (found,) = tokenizer.encode_batch([text], add_special_tokens=False)
        if len(found) != 1:
            raise ModelError(f"rerank.{key}={text!r} is {len(found)} tokens of {path}; it must be one")
        ids.append(int(found[0]))
    return PoolSpec("last", len(ids), head="tokens", activation="softmax", tokens=tuple(ids))
