"""Lines of the OpenAI batch API: requests -> rows, rows -> results.

The formats are those of "Batch API" in OpenAI's API reference: a request is {custom_id, method, url, body}, a result
{id, custom_id, response, error}. Taken are chat and text completions without tools or images, and the settings of
sampling that vLLM adds to a body.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchinfer.types import ExitCode, JobError

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

NUMBERS = (int, float)

SAMPLING: dict[str, tuple[str, pa.DataType, Any]] = {
    "max_tokens": ("max_tokens", pa.int64(), int),
    "max_completion_tokens": ("max_tokens", pa.int64(), int),
    "min_tokens": ("min_tokens", pa.int64(), int),
    "temperature": ("temperature", pa.float64(), NUMBERS),
    "top_p": ("top_p", pa.float64(), NUMBERS),
    "top_k": ("top_k", pa.int64(), int),
    "min_p": ("min_p", pa.float64(), NUMBERS),
    "n": ("n", pa.int64(), int),
    "best_of": ("best_of", pa.int64(), int),
    "seed": ("seed", pa.int64(), int),
    "presence_penalty": ("presence_penalty", pa.float64(), NUMBERS),
    "frequency_penalty": ("frequency_penalty", pa.float64(), NUMBERS),
    "repetition_penalty": ("repetition_penalty", pa.float64(), NUMBERS),
    "ignore_eos": ("ignore_eos", pa.bool_(), bool),
    "logit_bias": ("logit_bias", pa.map_(pa.int64(), pa.float64()), dict),
    "include_stop_str_in_output": ("include_stop", pa.bool_(), bool),
    "skip_special_tokens": ("skip_special_tokens", pa.bool_(), bool),
    "truncate_prompt_tokens": ("truncate_prompt_tokens", pa.int64(), int),
    "prompt_logprobs": ("prompt_logprobs", pa.int64(), int),
    "stop_token_ids": ("stop_token_ids", pa.list_(pa.int64()), list),
    "allowed_token_ids": ("allowed_token_ids", pa.list_(pa.int64()), list),
    "bad_words": ("bad_words", pa.list_(pa.string()), list),
}
"""Key of a body -> (sampling field, its column's type, the types that JSON may give)."""

FORMS = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
"""Key of vLLM's structured_outputs -> sampling field."""

WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "tools": ([],),
    "tool_choice": ("none",),
    "echo": (False,),
    "suffix": ("",),
}
"""Keys that are taken with these values, or null, which ask for nothing."""


def is_request(value: dict[str, Any]) -> bool:
    """Whether a line is a request, and not a row of some other table."""
    return {"custom_id", "body"} <= value.keys()


class Requests:
    """All requests of a file, checked. ``schema`` has the columns that any of them needs; sampling fields stand in
    columns named sampling_FIELD, null where a request leaves the job's own value."""

    def __init__(self, lines: Iterable[tuple[str, Any]]):
        """``lines``: (place in words, value). JobError(66) names the first line that can't be done."""
        seen: set[str] = set()
        kinds: dict[str, pa.DataType] = {}
        self._url = ""
        for place, value in lines:
            row = self._row(place, value)
            if row["custom_id"] in seen:
                raise _refused(place, f"custom_id {row['custom_id']!r} has been used by a line before")
            seen.add(row["custom_id"])
            kinds.update((name, _kind(name)) for name, item in row.items() if item is not None)
        order = ["custom_id", "model", "messages", "prompt"]
        names = [name for name in order if name in kinds] + sorted(kinds.keys() - set(order))
        self.schema = pa.schema([(name, kinds[name]) for name in names])

    @property
    def settings(self) -> list[str]:
        """What a job needs to be told about the columns."""
        passed = [name for name in ("custom_id", "model") if name in self.schema.names]
        fields = [name for name in self.schema.names if name.startswith("sampling_")]
        overrides = ", ".join(f"{name.removeprefix('sampling_')}: {name}" for name in fields)
        return [
            "input.messages_column=messages" if self._url == CHAT else "input.prompt_column=prompt",
            f"'input.columns=[{', '.join(passed)}]'",
            *([f"'input.sampling_columns={{{overrides}}}'"] if fields else []),
        ]

    def table(self, lines: Iterable[tuple[str, Any]]) -> pa.Table:
        """Some of the lines as rows."""
        return pa.Table.from_pylist([self._row(place, value) for place, value in lines], self.schema)

    def _row(self, place: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not is_request(value):
            raise _refused(place, "it has no custom_id and body, which the lines before have")
        custom_id, url, body = value["custom_id"], value.get("url", CHAT), value["body"]
        if not isinstance(custom_id, str) or not isinstance(body, dict):
            raise _refused(place, "custom_id must be a text, and body an object")
        if url not in (CHAT, TEXT):
            raise _refused(place, f"url={url!r} is not supported; allowed: {CHAT}, {TEXT}")
        self._url = self._url or url
        if url != self._url:
            raise _refused(place, f"url={url!r} differs from that of the first line: make a file for each")
        rest = {key: item for key, item in body.items() if item is not None and key not in WITHOUT_EFFECT}
        row = {"custom_id": custom_id, "model": _take(place, rest, "model", str)}
        if url == CHAT:
            row["messages"] = [_message(place, message) for message in _take(place, rest, "messages", list) or ()]
        else:
            row["prompt"] = _take(place, rest, "prompt", str)
        row |= _sampling(place, rest, url)
        for key, item in rest.items():
            if item not in NEUTRAL.get(key, ()):
                others = ("stop", "logprobs", "top_logprobs", "response_format", "structured_outputs")
                known = ", ".join(sorted({*SAMPLING, *others}))
                raise _refused(place, f"body.{key}={item!r} is not supported; supported are {known}")
        return row


def _sampling(place: str, rest: dict[str, Any], url: str) -> dict[str, Any]:
    """The sampling columns; what they use is taken out of ``rest``."""
    row: dict[str, Any] = {}
    for key, (field, column, kinds) in SAMPLING.items():
        value = _take(place, rest, key, kinds)
        if kinds is list:
            _check_items(place, key, value, str if column.value_type == pa.string() else int)
        if value is not None:
            row[f"sampling_{field}"] = _biases(place, value) if kinds is dict else value
    stop = _take(place, rest, "stop", (str, list))
    if stop is not None:
        row["sampling_stop"] = [stop] if isinstance(stop, str) else stop
        _check_items(place, "stop", row["sampling_stop"], str)
    top = _take(place, rest, "top_logprobs", int)
    logprobs = _take(place, rest, "logprobs", bool if url == CHAT else int)
    if logprobs is not None and logprobs is not False:
        row["sampling_logprobs"] = (top or 0) if url == CHAT else logprobs
    return row | _form(place, rest)


def _form(place: str, rest: dict[str, Any]) -> dict[str, Any]:
    """What the text must be, in OpenAI's way or vLLM's; taken out of ``rest``."""
    wanted, asked = _take(place, rest, "response_format", dict), _take(place, rest, "structured_outputs", dict)
    if wanted and wanted.get("type") != "text":
        types = {"json_object": {"schema": {"type": "object"}}, "json_schema": wanted.get("json_schema")}
        named = types.get(str(wanted.get("type")))
        if not isinstance(named, dict) or "schema" not in named:
            allowed = "text, json_object, and json_schema with json_schema.schema"
            raise _refused(place, f"body.response_format={wanted!r} is not supported; allowed types: {allowed}")
        return {"sampling_json_schema": json.dumps(named["schema"])}
    given = {key: value for key, value in (asked or {}).items() if value not in (None, False)}
    if not given:
        return {}
    ((key, value), *more) = given.items()
    if more or key not in FORMS or not isinstance(value, (list,) if key == "choice" else (str, dict)):
        raise _refused(place, f"body.structured_outputs={asked!r} is not supported; give one of {', '.join(FORMS)}")
    return {f"sampling_{FORMS[key]}": json.dumps(value) if isinstance(value, dict) else value}


def _biases(place: str, value: dict[str, Any]) -> list[tuple[int, float]]:
    """JSON's keys are texts."""
    try:
        return [(int(token), float(bias)) for token, bias in value.items()]
    except (ValueError, TypeError):
        raise _refused(place, f"body.logit_bias={value!r} must map token ids to numbers") from None


def _take(place: str, rest: dict[str, Any], key: str, kinds: Any) -> Any:
    value = rest.pop(key, None)
    is_flag = isinstance(value, bool) and kinds is not bool
    if value is not None and (is_flag or not isinstance(value, kinds)):
        names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise _refused(place, f"body.{key}={value!r} must be {names}")
    return value


def _check_items(place: str, key: str, values: list[Any] | None, kind: type) -> None:
    for value in values or ():
        if not isinstance(value, kind) or isinstance(value, bool):
            raise _refused(place, f"body.{key}={values!r} must be a list of {kind.__name__}")


def _message(place: str, message: Any) -> dict[str, str | None]:
    """Role and content. Content in parts is joined; parts that are not text, and calls of tools, are refused."""
    if not isinstance(message, dict):
        raise _refused(place, "a message is not an object with role and content")
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise _refused(place, "a message has a part that is not text")
        content = "".join(texts)
    if message.get("tool_calls") or not isinstance(content, (str, type(None))):
        raise _refused(place, "a message has tool calls or a content that is not text")
    return {"role": message.get("role"), "content": content}


def _kind(name: str) -> pa.DataType:
    texts = pa.list_(pa.string())
    special = {"messages": MESSAGES, "sampling_stop": texts, "sampling_choice": texts, "sampling_logprobs": pa.int64()}
    sampling = {f"sampling_{field}": kind for field, kind, _ in SAMPLING.values()}
    return special.get(name) or sampling.get(name) or pa.string()


def _refused(place: str, reason: str) -> JobError:
    return JobError(f"{place}: {reason}", ExitCode.INPUT)


@dataclass(frozen=True)
class JobFacts:
    """What the results of a job have in common. ``model`` stands in where a row names none; ``created`` is in seconds
    since 1970; ``prefix`` is output.prefix."""

    plan: str
    model: str
    chat: bool
    created: int
    prefix: str = ""


def result_line(row: dict[str, Any], number: int, job: JobFacts) -> dict[str, Any]:
    """The result of output row ``number`` of the job. Log-probabilities are left out: the format wants the texts of
    tokens, and the output has their ids."""
    identity = f"{job.plan[:12]}-{number}"
    line: dict[str, Any] = {"id": f"batch_req_{identity}", "custom_id": row["custom_id"], "response": None}
    names = ("status", "error_code", "error", "generated_text", "finish_reason", "prompt_tokens", "completion_tokens")
    status, code, message, *generated = (row[job.prefix + name] for name in names)
    if status != "ok":
        return {**line, "error": {"code": code, "message": message}}
    prompt_tokens = generated.pop(2)
    texts, reasons, counts = (value if isinstance(value, list) else [value] for value in generated)
    thoughts = row.get(job.prefix + "reasoning")
    thoughts = thoughts if isinstance(thoughts, list) else [thoughts] * len(texts)
    choices = [
        {
            "index": i,
            **({"message": _answer(text, thought)} if job.chat else {"text": text}),
            "logprobs": None,
            "finish_reason": reason,
        }
        for i, (text, reason, thought) in enumerate(zip(texts, reasons, thoughts, strict=True))
    ]
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": sum(counts)}
    body = {
        "id": f"{'chatcmpl' if job.chat else 'cmpl'}-{identity}",
        "object": "chat.completion" if job.chat else "text_completion",
        "created": job.created,
        "model": row.get("model") or job.model,
        "choices": choices,
        "usage": {**usage, "total_tokens": sum(usage.values())},
    }
    return {**line, "response": {"status_code": 200, "request_id": identity, "body": body}, "error": None}


def _answer(text: str, thoughts: str | None) -> dict[str, str]:
    """``reasoning`` is not OpenAI's, but where vLLM has it."""
    return {"role": "assistant", "content": text} | ({} if thoughts is None else {"reasoning": thoughts})
