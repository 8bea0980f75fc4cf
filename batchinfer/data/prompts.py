"""Rows -> requests: the prompt's text and token ids, the row's sampling parameters, and what is wrong with the row."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from batchinfer.data.columns import prompt_source
from batchinfer.data.reader import Unreadable, python_values
from batchinfer.data.sampling import row_samplings
from batchinfer.data.template import RowTemplate
from batchinfer.types import Chunk, Completion, ErrorCode, Request, RowError, SamplingParams

if TYPE_CHECKING:
    from batchinfer.config import InputConfig

ROLES = ("system", "developer", "user", "assistant", "tool")
SLICE_ROWS = 256  # rows tokenised by one call: enough to keep the tokenizer's threads busy
MAX_PROMPT_CHARS = 16 << 20  # no context holds a text of this length, so it is not worth tokenising


class Tokenizer(Protocol):
    vocab_size: int

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[np.ndarray]: ...

    def render_chat(self, messages: list[dict[str, str]]) -> str: ...


class PromptBuilder:
    """Makes the requests of one chunk. A row that cannot be a request becomes a Completion with its error instead,
    and its neighbours are what they would be without it."""

    def __init__(
        self,
        config: InputConfig,
        sampling: SamplingParams,
        tokenizer: Tokenizer,
        max_model_len: int,
        run_seed: int,
    ):
        """``sampling`` holds for every field that a row does not override, with ``run_seed`` for its seed;
        ``max_model_len`` counts prompt and new tokens together. JobError(64) if ``config`` has no or several prompt
        sources, or a template that does not parse."""
        self._source = prompt_source(config)
        self._template = RowTemplate(self._source.name) if self._source.kind == "template" else None
        self._overrides = dict(config.sampling_columns)
        self._sampling = replace(sampling, seed=run_seed)
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len

    def build(self, table: pa.Table, chunk: Chunk) -> list[Request | Completion]:
        """One entry per row of ``table`` (the chunk's rows in plain types, see reader.py), in row order."""
        if table.num_rows != chunk.rows:
            raise ValueError(f"{table.num_rows} rows do not make {chunk}")
        built: list[Request | Completion] = []
        for start in range(0, chunk.rows, SLICE_ROWS):
            rows = table.slice(start, SLICE_ROWS)
            prompts = self._prompts(rows)
            samplings = row_samplings(rows, self._overrides, self._sampling)
            for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
                built.append(self._request(chunk.row_id(start + i), prompt, sampling))
        return built

    def _request(
        self, row: int, prompt: np.ndarray | RowError, sampling: SamplingParams | RowError
    ) -> Request | Completion:
        if isinstance(prompt, RowError):
            return Completion(row, 0, error=prompt)
        length = len(prompt)
        if length == 0:
            return Completion(row, 0, error=RowError(ErrorCode.EMPTY_PROMPT, "the prompt has no tokens"))
        if length + 1 > self._max_model_len:
            reason = f"{length} prompt tokens leave no room for a new one: the limit is {self._max_model_len} together"
            return Completion(row, length, error=RowError(ErrorCode.PROMPT_TOO_LONG, reason))
        if isinstance(sampling, RowError):
            return Completion(row, length, error=sampling)
        return Request(row, prompt, sampling, row_seed(sampling.seed, row))

    def _prompts(self, rows: pa.Table) -> list[np.ndarray | RowError]:
        """Token ids (int32) or the error of each row."""
        if self._source.kind == "token_ids_column":
            return [_token_ids(ids, self._tokenizer.vocab_size) for ids in rows[self._source.name]]
        texts = self._texts(rows)
        good = [text for text in texts if isinstance(text, str)]
        # A chat template writes the special tokens itself; raw text gets those that the model wants around any text.
        special = self._source.kind != "messages_column"
        encoded = iter(self._tokenizer.encode_batch(good, add_special_tokens=special) if good else ())
        return [np.asarray(next(encoded), np.int32) if isinstance(text, str) else text for text in texts]

    def _texts(self, rows: pa.Table) -> list[str | RowError]:
        if self._template is not None:
            names, _ = self._template.columns(rows.column_names)
            columns = [python_values(rows[name]) for name in names]
            return [_checked(self._rendered(names, [c[i] for c in columns])) for i in range(rows.num_rows)]
        make = self._chat if self._source.kind == "messages_column" else _text
        return [_checked(make(value)) for value in python_values(rows[self._source.name])]

    def _rendered(self, names: list[str], values: list[Any]) -> str | RowError:
        for name, value in zip(names, values, strict=True):
            if isinstance(value, Unreadable):
                return RowError(ErrorCode.INVALID_UTF8, f"column {name!r}: {value.reason}")
        try:
            return self._template.render(dict(zip(names, values, strict=True)))
        except ValueError as error:
            return RowError(ErrorCode.TEMPLATE_ERROR, str(error))

    def _chat(self, messages: Any) -> str | RowError:
        if isinstance(messages, Unreadable):
            return RowError(ErrorCode.INVALID_UTF8, messages.reason)
        if messages is None:
            return RowError(ErrorCode.NULL_PROMPT, "the list of messages is null")
        chat = []
        for position, message in enumerate(messages):
            values = {key: _text(message[key] if message else None) for key in ("role", "content")}
            for key, value in values.items():
                if isinstance(value, RowError):
                    code = value.code if value.code is ErrorCode.INVALID_UTF8 else ErrorCode.BAD_MESSAGES
                    return RowError(code, f"message {position}, {key}: {value.message}")
            if values["role"] not in ROLES:
                reason = f"message {position} has the role {values['role']!r}; allowed: {', '.join(ROLES)}"
                return RowError(ErrorCode.BAD_MESSAGES, reason)
            chat.append(values)
        if not chat:
            return RowError(ErrorCode.EMPTY_PROMPT, "the list of messages is empty")
        try:
            return self._tokenizer.render_chat(chat)
        except ValueError as error:
            return RowError(ErrorCode.BAD_MESSAGES, f"the chat template refuses the messages: {error}")


def row_seed(run_seed: int, row_id: int) -> int:
    """The unsigned 64-bit seed of a row: the first 8 bytes, little-endian, of SHA-256 over the ASCII text
    "batchinfer row" and the two numbers as little-endian unsigned 64-bit words. Results rest on it: never change it."""
    digest = hashlib.sha256(b"batchinfer row" + struct.pack("<QQ", run_seed, row_id)).digest()
    return int.from_bytes(digest[:8], "little")


def _text(value: Any) -> str | RowError:
    if value is None:
        return RowError(ErrorCode.NULL_PROMPT, "the value is null")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            return RowError(ErrorCode.INVALID_UTF8, f"byte {error.start} of the text is not UTF-8")
    return RowError(ErrorCode.INVALID_UTF8, value.reason) if isinstance(value, Unreadable) else value


def _checked(text: str | RowError) -> str | RowError:
    if text == "":
        return RowError(ErrorCode.EMPTY_PROMPT, "the prompt is an empty text")
    if isinstance(text, str) and len(text) > MAX_PROMPT_CHARS:
        reason = f"the text of {len(text)} characters is longer than the limit of {MAX_PROMPT_CHARS} before tokenising"
        return RowError(ErrorCode.PROMPT_TOO_LONG, reason)
    return text


def _token_ids(ids: pa.ListScalar, vocab_size: int) -> np.ndarray | RowError:
    if not ids.is_valid:
        return RowError(ErrorCode.NULL_PROMPT, "the list of token ids is null")
    if ids.values.null_count:
        return RowError(ErrorCode.BAD_TOKEN_IDS, "the list of token ids holds a null")
    values = ids.values.to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero((values < 0) | (values >= vocab_size))
    if wrong.size:
        reason = f"token id {values[wrong[0]]} at position {wrong[0]} is outside the vocabulary of {vocab_size}"
        return RowError(ErrorCode.BAD_TOKEN_IDS, reason)
    return values.astype(np.int32)
