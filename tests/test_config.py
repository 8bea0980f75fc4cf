"""The schema, its files, and the rules between keys."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from batchinfer.__main__ import compose, config_folder
from batchinfer.config import CHOICES, RANGES, Config, allowed, from_dict, items, to_dict
from batchinfer.rules import check
from batchinfer.types import ExitCode, JobError

PATHS = {"model.path": "m", "input.path": "i", "output.path": "o"}


def config_with(changes: dict[str, Any]) -> Config:
    values = to_dict(Config())
    for key, value in (PATHS | changes).items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return from_dict(values)


def test_the_files_and_the_schema_have_the_same_defaults() -> None:
    assert compose([]) == Config()


def test_the_files_name_and_explain_every_key() -> None:
    root = OmegaConf.load(config_folder() / "config.yaml")
    for key, _ in items():
        section, _, name = key.partition(".")
        file = config_folder() / section / "default.yaml"
        node = OmegaConf.to_container(OmegaConf.load(file) if file.exists() else root[section])
        assert name in node, f"{key} is missing in {file}"
    for file in config_folder().rglob("*.yaml"):
        assert file.read_text().startswith("# "), f"{file} does not say what it is for"


@pytest.mark.parametrize(
    "option", sorted(f"{p.parent.name}={p.stem}" for p in config_folder().glob("*/*.yaml")), ids=str
)
def test_every_group_option_is_a_valid_configuration(option: str) -> None:
    needs = {
        "task=score": ["input.continuation_column=y"],
        "task=rerank": ["input.query_column=q", "input.document_column=d"],
    }
    check(compose([option, *needs.get(option, [])]), required=())


def test_a_configuration_survives_json() -> None:
    changes = {"sampling.stop": ("\n", "ü"), "sampling.logprobs": 3, "input.sampling_columns": {"n": "count"}}
    changes |= {"sampling.logit_bias": {5: 1.5, 70: -3.0}, "sampling.bad_words": ("no", "never")}
    config = config_with(changes)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    hash(config.sampling)  # shared by requests


@pytest.mark.parametrize("values", [{"sampling": {"temprature": 1}}, {"experiment": {"x": 1}}, {"foo": 3}])
def test_from_dict_refuses_unknown_keys(values: dict[str, Any]) -> None:
    with pytest.raises(KeyError):
        from_dict(values)


def test_missing_paths_are_named_together() -> None:
    with pytest.raises(JobError, match=r"model\.path, output\.path: missing.*give model\.path=PATH output\.path=PATH"):
        check(dataclasses.replace(Config(), input=dataclasses.replace(Config().input, path="x")))
    check(Config(), required=())


def test_a_mapping_of_tokens_on_the_command_line() -> None:
    config = compose(["sampling.logit_bias={50256: -5, 11: 2.5}", "sampling.bad_words=[no, 'as an AI']"])
    assert config.sampling.logit_bias == {50256: -5.0, 11: 2.5}
    assert config.sampling.bad_words == ("no", "as an AI")
    again = yaml.safe_load(OmegaConf.to_yaml(to_dict(config)))
    assert from_dict(again).sampling == config.sampling
    with pytest.raises(JobError, match="a mapping of tokens to numbers"):
        compose(["sampling.logit_bias={word: 1}"])


SCORE = {"task.name": "score", "input.continuation_column": "y"}
RERANK = {"task.name": "rerank", "input.query_column": "q", "input.document_column": "d"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine.dtype": "fp8"}, "engine.dtype='fp8' is not allowed: it must be one of auto, bf16, fp16, fp32"),
        ({"engine.device": "gpu0"}, "engine.device='gpu0' is not allowed: it must be one of auto, cpu"),
        ({"output.reasoning": "on"}, "output.reasoning='on' is not allowed: it must be one of off, auto"),
        ({**SCORE, "output.reasoning": "auto"}, "the task score generates no text"),
        ({"engine.lookup": 65}, "engine.lookup=65 is not allowed: it must be a whole number in [0, 64]"),
        ({"sampling.best_of": 2, "sampling.n": 3}, "sampling.best_of=2 is not allowed"),
        ({"sampling.logit_bias": {3: 200.0}}, "sampling.logit_bias[3]=200.0 is not allowed"),
        ({"engine.device": "cpu", "engine.ops": "triton"}, "of a GPU, and engine.device is cpu"),
        ({"engine.device": "cpu", "engine.kernels": "k.zip"}, "it is for a GPU, and engine.device is cpu"),
        ({"engine.device": "cuda", "engine.weights": "int8"}, "it is for the CPU, and engine.device is cuda"),
        ({"engine.weights": "keep", "model.dummy_weights": True}, "has no file whose weights could be kept"),
        ({"output.compression": "brotli"}, "one of zstd, snappy, lz4, gzip, none"),
        ({"cluster.mpi": "True"}, 'in a YAML file write "on" and "off" in quotes'),
        ({"output.rows_per_chunk": 0}, "output.rows_per_chunk=0 is not allowed: it must be a whole number in [1, "),
        ({"job.max_error_fraction": 1.5}, "job.max_error_fraction=1.5 is not allowed: it must be a number in [0, 1]"),
        ({"job.max_error_fraction": float("nan")}, "job.max_error_fraction=nan"),
        ({"job.progress_seconds": 0.0}, "job.progress_seconds=0.0"),
        ({"engine.max_slots": 0}, "engine.max_slots=0"),
        ({"engine.page_size": 24}, "engine.page_size=24 is not allowed: it must be a power of two"),
        ({"engine.num_pages": 8, "engine.kv_cache_gb": 1.0}, "engine.kv_cache_gb is given too"),
        ({"engine.max_step_tokens": 64}, "engine.max_step_tokens=64 is not allowed: a step must hold one token"),
        ({"model.dummy_weights": True}, "it is for batchinfer bench"),
        ({"engine.max_model_len": 1}, "engine.max_model_len=1"),
        ({"sampling.temperature": -1.0}, "sampling.temperature=-1.0 is not allowed"),
        ({"sampling.max_tokens": 0}, "sampling.max_tokens=0 is not allowed"),
        ({"sampling.min_tokens": 300}, "sampling.min_tokens=300 is not allowed: min_tokens must lie in [0, 256]"),
        ({"sampling.top_p": 0.0}, "sampling.top_p=0.0 is not allowed"),
        ({"sampling.n": 0}, "sampling.n=0 is not allowed"),
        ({"sampling.logprobs": 65}, "sampling.logprobs=65 is not allowed"),
        ({"sampling.stop": ("",)}, "sampling.stop holds an empty string"),
        ({"sampling.detokenize": False}, "sampling.detokenize=False is not allowed: nothing would be left of a row"),
        ({"sampling.detokenize": False, "sampling.stop": ("a",)}, "sampling.stop and detokenize=false are both given"),
        ({"input.messages_column": "m", "input.template": "{{ x }}"}, "a prompt has one source"),
        ({"input.messages_column": "m", "input.prompt_column": "text"}, "input.prompt_column is given too"),
        ({"input.prompt_column": ""}, "input.prompt_column='' is not allowed: it is empty"),
        ({"input.template": ""}, "input.template='' is not allowed: it is empty"),
        ({"input.sampling_columns": {"max_toks": "x"}}, "input.sampling_columns.max_toks='x' is not allowed"),
        ({"task.name": "score"}, "task.name='score' is not allowed: it needs the column to score"),
        ({"input.continuation_column": "y"}, "only task=score looks at it"),
        (SCORE | {"input.sampling_columns": {"n": "n"}}, "the task score chooses no tokens"),
        (SCORE | {"input.retry_errors_of": "old"}, "it takes over generated rows alone"),
        ({"task.name": "embed", "input.sampling_columns": {"n": "n"}}, "the task embed chooses no tokens"),
        ({"task.name": "embed", "output.token_ids": True}, "the task embed gives no tokens"),
        ({"task.name": "classify", "input.retry_errors_of": "old"}, "it takes over generated rows alone"),
        ({"embed.dimensions": 64}, "embed.dimensions=64 is not allowed: only task=embed looks at it"),
        ({"task.name": "embed", "embed.pooling": "max"}, "it must be one of auto, last, mean, cls"),
        ({"task.name": "embed", "task.activation": "none"}, "only task=classify and task=rerank looks at it"),
        ({"task.name": "rerank"}, "it needs two columns: give input.query_column=NAME input.document_column=NAME"),
        ({"task.name": "rerank", "input.query_column": "q"}, "it needs two columns"),
        ({"input.adapter_column": "a"}, "there are no adapters: give model.adapters={NAME: FOLDER, ...}"),
        ({"model.adapters": {"a": "x", "b": "y"}}, "there are several, and a row goes through one"),
        ({"input.document_column": "d"}, "only task=rerank looks at it"),
        (RERANK | {"input.template": "{{ q }}"}, "a prompt has one source"),
        (RERANK | {"rerank.yes_token": "yes"}, "rerank.no_token is None: give both tokens, or none"),
        (RERANK | {"rerank.yes_token": "yes", "rerank.no_token": "False"}, 'in a YAML file write "yes" and "no"'),
        (RERANK | {"rerank.yes_token": "a", "rerank.no_token": "b"}, "it must ask for one of the two tokens"),
        ({"sampling.regex": "a", "sampling.choice": ("b",)}, "sampling.regex and choice are both given"),
        ({"sampling.regex": "a", "sampling.ignore_eos": True}, "sampling.regex ends the text where it is complete"),
        ({"output.path": "i/out"}, "output.path='i/out' is not allowed: it lies within input.path=i"),
        ({"output.path": "./i/"}, "it lies within input.path=i"),
    ],
)
def test_each_rule_names_key_value_and_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError) as caught:
        check(config_with(changes))
    assert caught.value.exit_code == ExitCode.USAGE
    assert message in str(caught.value)


def test_what_looks_alike_is_allowed() -> None:
    check(config_with({"output.path": "input_results", "input.path": "input"}))
    check(config_with({"engine.max_step_tokens": 256, "engine.max_slots": 256}))
    check(config_with({"input.sampling_columns": {"max_tokens": "limit"}, "input.columns": []}))


def test_the_tables_of_rules_name_real_keys() -> None:
    known = dict(items())
    assert set(CHOICES) | set(RANGES) <= set(known)
    for key, choices in CHOICES.items():
        assert known[key] in choices
    for key, (low, high) in RANGES.items():
        assert low <= known[key] <= high
    for key in known:
        assert allowed(key)
