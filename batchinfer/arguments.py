"""What Python code hands over, as the engine takes it: settings of the type that they must have, prompts as token ids.

Pure: no torch, no engine. A wrong argument is a TypeError or ValueError that names it, and what is allowed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from numbers import Integral, Real
from typing import Any

import numpy as np

from batchinfer.config import EngineConfig, allowed, type_of
from batchinfer.models.tokenizer import Tokenizer
from batchinfer.types import SamplingParams

Prompt = str | Sequence[int] | np.ndarray | Sequence[Mapping[str, str]]
"""Plain text, token ids, or chat messages with the keys role and content."""


def engine_config(options: Mapping[str, Any]) -> EngineConfig:
    """The fields of the configuration group ``engine`` from keyword arguments."""
    names = [field.name for field in fields(EngineConfig)]
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            guess = f", did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"there is no option {name!r}{guess} The engine has {', '.join(names)}")
    return EngineConfig(**{name: typed(f"engine.{name}", value) for name, value in options.items()})


def sampling_params(given: SamplingParams) -> SamplingParams:
    """The same with lists as tuples, one text in the place of several as a tuple of it, and a JSON schema that is an
    object as its text; each value within its range."""
    schema = given.json_schema
    if isinstance(schema, Mapping):
        given = replace(given, json_schema=json.dumps(schema))
    values = {field.name: typed(f"sampling.{field.name}", getattr(given, field.name)) for field in fields(given)}
    params = SamplingParams(**values)
    params.check()
    return params


def typed(key: str, value: Any) -> Any:
    """The value of a dotted key as the type that the schema says. TypeError where it is of another one."""
    kind, _, optional = type_of(key).partition(" | ")
    if value is None and optional:
        return None
    try:
        return _AS[kind](value)
    except (TypeError, KeyError):
        raise TypeError(f"{key}={value!r} is not allowed: it must be {allowed(key)}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError
    return int(value)


def _number(value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError
    return bool(value)


_AS = {
    "str": _text,
    "int": _whole,
    "float": _number,
    "bool": _flag,
    "tuple[str, ...]": lambda value: (value,) if isinstance(value, str) else tuple(_text(item) for item in value),
    "tuple[int, ...]": lambda value: tuple(_whole(item) for item in value),
    "dict[int, float]": lambda value: {_whole(token): _number(bias) for token, bias in dict(value).items()},
}


def several(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """A text alone is one prompt, and not as many as it has letters."""
    return [prompts] if isinstance(prompts, str) else list(prompts)  # type: ignore[arg-type]


def token_ids(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[np.ndarray]:
    """int32, one array for each. TypeError and ValueError name the prompt by its place."""
    encoded: list[np.ndarray | None] = []
    texts: dict[bool, list[tuple[int, str]]] = {True: [], False: []}  # whether special tokens come around them
    for index, prompt in enumerate(prompts):
        encoded.append(None)
        if isinstance(prompt, str):
            texts[True].append((index, prompt))
        elif _is_chat(prompt):
            texts[False].append((index, _rendered(index, prompt, tokenizer)))
        else:
            encoded[index] = _ids(index, prompt)
    for special, found in texts.items():
        arrays = tokenizer.encode_batch([text for _, text in found], add_special_tokens=special) if found else []
        for (index, _), ids in zip(found, arrays, strict=True):
            encoded[index] = ids
    return encoded  # type: ignore[return-value]


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _rendered(index: int, messages: Any, tokenizer: Tokenizer) -> str:
    for place, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise ValueError(f"prompts[{index}][{place}] has no text {key!r}: a message has role and content")
    try:
        return tokenizer.render_chat(list(messages))
    except ValueError as error:
        raise ValueError(f"prompts[{index}]: {error}") from None


def _ids(index: int, prompt: Any) -> np.ndarray:
    wanted = f"prompts[{index}]={prompt!r:.60} is no prompt: it must be a text, a list of token ids, or chat messages"
    if not isinstance(prompt, (Sequence, np.ndarray)):
        raise TypeError(wanted)
    ids = np.asarray(prompt)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise TypeError(wanted)
    return np.clip(ids, -1, 2**31 - 1).astype(np.int32)  # beyond is in no vocabulary either


def scored_ids(
    prompts: Sequence[Prompt], continuations: Sequence[Any], tokenizer: Tokenizer
) -> tuple[list[np.ndarray], list[int]]:
    """Token ids int32 of prompt and continuation together, and where the scored part begins. Of two texts: the tokens
    of both in one, behind those of the prompt alone, whose last spaces go to the continuation, as
    ``task=score`` has it (data/prompts.py)."""
    wholes: list[Prompt] = []
    before: list[Prompt] = []
    for index, (prompt, added) in enumerate(zip(prompts, continuations, strict=True)):
        texts = [isinstance(prompt, str), isinstance(added, str)]
        if texts[1] and not texts[0]:
            raise TypeError(f"continuations[{index}] is a text: so must prompts[{index}] be")
        if all(texts):
            before.append(prompt.rstrip(" "))
            wholes.append(prompt + added)
        else:
            before.append(prompt)
            wholes.append(_ids(index, added))
    first, rest = token_ids(before, tokenizer), token_ids(wholes, tokenizer)
    joined = [
        whole if isinstance(added, str) else np.concatenate([start, whole])
        for start, whole, added in zip(first, rest, continuations, strict=True)
    ]
    return joined, [max(1, len(start)) for start in first]
