"""What a model and the settings of a task make of a text, where nothing is generated: PoolSpec. No torch.

A folder in the layout of sentence-transformers (modules.json) says how its states are pooled; any other leaves that to
the settings.
"""

from __future__ import annotations

import os

from batchinfer.config import VECTOR_TASKS, Config, EmbedConfig, RerankConfig
from batchinfer.models.encoder_spec import EncoderSpec, encoder_spec
from batchinfer.models.files import ModelError, read_json, read_json_objects
from batchinfer.models.gguf import is_gguf
from batchinfer.models.labels import activation, labels
from batchinfer.models.model_spec import ModelSpec
from batchinfer.models.spec import load_spec
from batchinfer.models.tokenizer import Tokenizer, load_tokenizer
from batchinfer.types import ExitCode, JobError, Pooling, PoolSpec

MODES: dict[str, Pooling] = {
    "lasttoken": "last",
    "mean_tokens": "mean",
    "mean": "mean",
    "cls_token": "cls",
    "cls": "cls",
}
"""What 1_Pooling/config.json may say: "pooling_mode_" and this is true, or this is the "pooling_mode"."""

MODULES = ("Transformer", "Pooling", "Normalize")
"""Steps of a sentence-transformers model that are known here."""


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
    if settings.dimensions > spec.width:
        raise JobError(
            f"embed.dimensions={settings.dimensions} is more than the {spec.width} that the vectors of {path} have",
            ExitCode.USAGE,
        )
    folder, pooling = _pooling_folder(path), settings.pooling
    if pooling == "auto":
        usual = "mean" if isinstance(spec, EncoderSpec) else "last"
        pooling = usual if folder is None else _mode(os.path.join(folder, "config.json"))
    return PoolSpec(
        pooling,  # type: ignore[arg-type]
        settings.dimensions or spec.width,
        activation="normalise" if settings.normalize else "",
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


def _pooling_folder(path: str) -> str | None:
    """Where a sentence-transformers folder says how it pools; None for any other. Raises ModelError for steps that are
    not known."""
    where = os.path.join(path, "modules.json")
    if is_gguf(path) or not os.path.exists(where):
        return None
    found = None
    for module in read_json_objects(where):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in MODULES:
            raise ModelError(f"{where}: the step {kind!r} is not supported; supported are {', '.join(MODULES)}")
        if kind == "Pooling":
            folder = str(module.get("path", ""))
            if os.path.isabs(folder) or os.pardir in folder.split("/"):
                raise ModelError(f"{where}: the path {folder!r} must lie in the model's folder")
            found = os.path.join(path, folder)
    return found


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
