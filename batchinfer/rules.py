"""What a configuration may hold: each value within its bounds, and the keys at peace with each other."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from batchinfer.config import CHOICES, DEFAULTS, MISSING, RANGES, VECTOR_TASKS, Config, InputConfig, allowed, items
from batchinfer.types import ExitCode, JobError, SamplingParams

REQUIRED = ("model.path", "input.path", "output.path")

PROMPT_KEYS = ("input.messages_column", "input.template", "input.token_ids_column", "input.query_column")
"""Prompt sources that stand in place of input.prompt_column."""

OWN_KEYS = {
    ("embed",): ("embed.pooling", "embed.dimensions", "embed.normalize"),
    ("rerank",): ("input.query_column", "input.document_column"),
    ("classify", "rerank"): ("task.activation",),
}
"""Tasks, and the keys that would be ignored with any other. (rerank's own section may come with a group's option.)"""


def check(config: Config, required: tuple[str, ...] = REQUIRED) -> None:
    """Raise JobError(64) for the first value that is missing, out of its range or at odds with another.

    ``required`` names the keys that the command cannot do without.
    """
    value = dict(items(config))
    absent = [key for key in required if value[key] in (MISSING, "")]
    if absent:
        arguments = " ".join(f"{key}=PATH" for key in absent)
        raise JobError(f"{', '.join(absent)}: missing, and required; give {arguments}", ExitCode.USAGE)
    for key, words in CHOICES.items():
        if value[key] not in words:
            note = ' (in a YAML file write "on" and "off" in quotes)' if value[key] in ("True", "False") else ""
            raise _refused(key, value[key], f"it must be {allowed(key)}{note}")
    for key, (low, high) in RANGES.items():
        if not low <= value[key] <= high:  # also catches NaN
            raise _refused(key, value[key], f"it must be {allowed(key)}")
    try:
        config.sampling.check()
    except ValueError as error:
        raise JobError(f"sampling.{error}", ExitCode.USAGE) from None
    _check_prompt(value)
    _check_task(value)
    if "output.path" in required:
        _check_texts(value)
    _check_adapters(value)
    _check_engine(value)
    _check_dummy_weights(value, required)
    _check_paths(value)


def _check_prompt(value: dict[str, Any]) -> None:
    given = [key for key in PROMPT_KEYS if value[key] is not None]
    if value["input.prompt_column"] != InputConfig.prompt_column:
        given.append("input.prompt_column")
    if len(given) > 1:
        reason = f"{given[1]} is given too, and a prompt has one source: keep one of them and set the other to null"
        raise _refused(given[0], value[given[0]], reason)
    for key in (*PROMPT_KEYS, "input.prompt_column"):
        if value[key] == "":
            raise _refused(key, "", "it is empty")
    fields = [f.name for f in dataclasses.fields(SamplingParams)]
    for name, column in value["input.sampling_columns"].items():
        if name not in fields:
            key = f"input.sampling_columns.{name}"
            raise _refused(key, column, f"sampling has no field {name!r}; it has {', '.join(fields)}")


def _check_task(value: dict[str, Any]) -> None:
    task, column = value["task.name"], value["input.continuation_column"]
    if task == "score" and not column:
        raise _refused("task.name", task, "it needs the column to score: give input.continuation_column=NAME")
    if task != "score" and column is not None:
        raise _refused("input.continuation_column", column, "only task=score looks at it: give that, or set it to null")
    if task != "generate" and value["input.sampling_columns"]:
        reason = f"the task {task} chooses no tokens: leave it out"
        raise _refused("input.sampling_columns", dict(value["input.sampling_columns"]), reason)
    if task != "generate" and value["output.reasoning"] != "off":
        raise _refused(
            "output.reasoning", value["output.reasoning"], f"the task {task} generates no text: set it to off"
        )
    if task != "generate" and value["input.retry_errors_of"] is not None:
        raise _refused("input.retry_errors_of", value["input.retry_errors_of"], "it takes over generated rows alone")
    if task in VECTOR_TASKS and value["output.token_ids"]:
        raise _refused("output.token_ids", True, f"the task {task} gives no tokens: leave it out")
    for owners, keys in OWN_KEYS.items():
        for key in keys:
            if task not in owners and value[key] != DEFAULTS[key]:
                raise _refused(key, value[key], f"only task={' and task='.join(owners)} looks at it")
    if task == "rerank":
        _check_rerank(value)


def _check_rerank(value: dict[str, Any]) -> None:
    pair = ("input.query_column", "input.document_column")
    if not all(value[key] for key in pair):
        raise _refused("task.name", "rerank", f"it needs two columns: give {' '.join(f'{key}=NAME' for key in pair)}")
    tokens = [value["rerank.yes_token"], value["rerank.no_token"]]
    for key, token in zip(("rerank.yes_token", "rerank.no_token"), tokens, strict=True):
        if token in ("True", "False"):  # what YAML makes of yes and no
            raise _refused(key, token, 'it is no token of a known model; in a YAML file write "yes" and "no" in quotes')
    if any(tokens) and not all(tokens):
        raise _refused("rerank.yes_token", tokens[0], f"rerank.no_token is {tokens[1]!r}: give both tokens, or none")
    if all(tokens) and value["rerank.template"] is None:
        raise _refused(
            "rerank.template", None, "it must ask for one of the two tokens (rerank=qwen3 has one that does)"
        )
    if all(tokens) and value["task.activation"] != "auto":
        reason = "the relevance is the probability of rerank.yes_token, against rerank.no_token"
        raise _refused("task.activation", value["task.activation"], reason)


def _check_texts(value: dict[str, Any]) -> None:
    if not value["sampling.detokenize"] and not value["output.token_ids"]:
        raise _refused("sampling.detokenize", False, "nothing would be left of a row: give output.token_ids=true too")


def _check_adapters(value: dict[str, Any]) -> None:
    names, column = list(value["model.adapters"]), value["input.adapter_column"]
    if column is not None and not names:
        raise _refused("input.adapter_column", column, "there are no adapters: give model.adapters={NAME: FOLDER, ...}")
    if column is None and len(names) > 1:
        reason = "there are several, and a row goes through one: give input.adapter_column=NAME"
        raise _refused("model.adapters", dict(value["model.adapters"]), reason)


def _check_engine(value: dict[str, Any]) -> None:
    page_size, length = value["engine.page_size"], value["engine.max_model_len"]
    device, ops = value["engine.device"], value["engine.ops"]
    if ops != "auto" and device in ("cpu", "reference"):
        raise _refused("engine.ops", ops, f"it chooses among the kernels of a GPU, and engine.device is {device}")
    if value["engine.kernels"] is not None and device in ("cpu", "reference"):
        raise _refused("engine.kernels", value["engine.kernels"], f"it is for a GPU, and engine.device is {device}")
    if value["engine.weights"] == "int8" and device not in ("auto", "cpu", "reference"):
        raise _refused("engine.weights", value["engine.weights"], f"it is for the CPU, and engine.device is {device}")
    if page_size & (page_size - 1):
        raise _refused("engine.page_size", page_size, "it must be a power of two")
    if value["engine.num_pages"] and value["engine.kv_cache_gb"]:
        reason = "engine.kv_cache_gb is given too, and both fix the size of the KV cache: keep one, set the other to 0"
        raise _refused("engine.num_pages", value["engine.num_pages"], reason)
    if value["engine.max_step_tokens"] < value["engine.max_slots"]:
        reason = f"a step must hold one token of each of engine.max_slots={value['engine.max_slots']} sequences"
        raise _refused("engine.max_step_tokens", value["engine.max_step_tokens"], reason)
    if length == 1:
        raise _refused(
            "engine.max_model_len", length, "a sequence is a prompt token and a new one at least: 0, or >= 2"
        )


def _check_dummy_weights(value: dict[str, Any], required: tuple[str, ...]) -> None:
    if value["model.dummy_weights"] and value["engine.weights"] == "keep":
        raise _refused("engine.weights", "keep", "model.dummy_weights=true has no file whose weights could be kept")
    if value["model.dummy_weights"] and "output.path" in required:
        raise _refused("model.dummy_weights", True, "a job's rows would be noise; it is for batchinfer bench")


def _check_paths(value: dict[str, Any]) -> None:
    """The output folder may not lie within the input: the next run would read its own results."""
    source, target = value["input.path"], value["output.path"]
    if MISSING in (source, target):
        return
    source, target = os.path.realpath(source), os.path.realpath(target)
    if target == source or target.startswith(source.rstrip(os.sep) + os.sep):
        raise _refused("output.path", value["output.path"], f"it lies within input.path={value['input.path']}")


def _refused(key: str, value: Any, reason: str) -> JobError:
    return JobError(f"{key}={value!r} is not allowed: {reason}", ExitCode.USAGE)
