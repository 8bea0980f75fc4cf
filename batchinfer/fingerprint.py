"""What decides a job's output, as the plan records it: a job with another fingerprint is another job."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from batchinfer import __version__
from batchinfer.config import Config, RerankConfig, to_dict
from batchinfer.data.columns import prompt_source
from batchinfer.data.template import template_text
from batchinfer.types import PoolSpec


def fingerprint(
    config: Config, model: Mapping[str, str], retried: str | None = None, pool: PoolSpec | None = None
) -> dict[str, Any]:
    """All that decides the output beside the input files: a plan with another one is another job's. Names are those of
    the configuration's keys, so that a refusal can be read. ``retried``: id of the plan whose good rows are taken
    over. ``pool``: what becomes of a row where no text does."""
    source = prompt_source(config.input)
    prompt = template_text(source.name) if source.kind == "template" else source.name
    return {
        **({"task": config.task.name} if config.task.name != "generate" else {}),
        **({"pool": _pool(pool)} if pool is not None else {}),
        **({"rerank": _rerank(config.rerank)} if config.task.name == "rerank" else {}),
        "model": dict(model),
        **({"adapter_column": config.input.adapter_column} if config.input.adapter_column else {}),
        "input": {
            source.kind: prompt,
            "columns": config.input.columns,
            "sampling_columns": config.input.sampling_columns,
            **({"retry_errors_of": retried} if retried else {}),
            **({"continuation": config.input.continuation_column} if config.input.continuation_column else {}),
            **({"document_column": config.input.document_column} if config.input.document_column else {}),
        },
        "output": {
            "prefix": config.output.prefix,
            "token_ids": config.output.token_ids,
            **({"reasoning": config.output.reasoning} if config.output.reasoning != "off" else {}),
        },
        "sampling": json.loads(json.dumps(to_dict(config)["sampling"])),  # as the plan's file gives it back
        "engine": {"max_model_len": config.engine.max_model_len},
    }


def numeric(config: Config) -> dict[str, Any]:
    """What may change the last bits of a logit, and so a token here and there: noted in the plan and in every part."""
    engine = {"device": config.engine.device, "ops": config.engine.ops, "dtype": config.engine.dtype}
    if config.engine.weights != "auto":
        engine["weights"] = config.engine.weights
    if config.engine.kv_dtype != "auto":
        engine["kv_dtype"] = config.engine.kv_dtype
    return {"engine": engine, "batchinfer": __version__}


def _pool(pool: PoolSpec) -> dict[str, Any]:
    """Layers that a model lacks are no part of it, so that plans from before there were any stay valid."""
    fields = dataclasses.asdict(pool)
    return fields if pool.dense else {key: value for key, value in fields.items() if key != "dense"}


def _rerank(settings: RerankConfig) -> dict[str, Any]:
    """The prompt of a pair; its answer's tokens are in the pool."""
    template = settings.template
    text = None if template is None else template_text(template, "rerank.template")
    return {"template": text, "instruction": settings.instruction}
