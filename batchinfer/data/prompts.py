"""Rows -> requests: the prompt's text and token ids, the row's sampling parameters, and what is wrong with the row."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from batchinfer.config import VECTOR_TASKS, Config, InputConfig, RerankConfig
from batchinfer.data.adapters import AdapterChoice
from batchinfer.data.columns import prompt_source
from batchinfer.data.pairs import PairPrompts
from batchinfer.data.reader import Unreadable, python_values
from batchinfer.data.sampling import row_samplings
from batchinfer.data.template import RowTemplate
from batchinfer.data.texts import any_length, checked, first_error, plain_text
from batchinfer.types import Chunk, Completion, ErrorCode, Request, RowError, SamplingParams

ROLES = ("system", "developer", "user", "assistant", "tool")
SLICE_ROWS = 256  # rows tokenised by one call: enough to keep the tokenizer's threads busy


POOLED = SamplingParams(max_tokens=1, ignore_eos=True)
"""Of a row that becomes a vector: no token of it is ever chosen, and the engine has room for one."""


class Tokenizer(Protocol):
    vocab_size: int

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[np.ndarray]: ...

    def encode_pairs(self, pairs: list[tuple[str, str]]) -> list[tuple[np.ndarray, int]]: ...

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
        reasoning: bool = False,
        rerank: RerankConfig | None = None,
        adapters: Iterable[str] = (),
    ):
        """``sampling`` holds for every field that a row does not override, with ``run_seed`` for its seed;
        ``max_model_len`` counts prompt and new tokens together; ``reasoning`` is that of every Request. ``rerank``
        makes prompts of pairs, if those are what ``config`` asks for. JobError(64) if it has no or several prompt
        sources, or a template that does not parse."""
        self._source = prompt_source(config)
        self._pair_prompts = None
        if self._source.kind == "query_column":
            self._pair_prompts = PairPrompts(config, rerank or RerankConfig(), tokenizer)
        self._template = RowTemplate(self._source.name) if self._source.kind == "template" else None
        self._adapters = AdapterChoice(adapters, config.adapter_column)
        self._continuation = config.continuation_column
        self._overrides = dict(config.sampling_columns)
        self._sampling = replace(sampling, seed=run_seed)
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._reasoning = reasoning

    @staticmethod
    def of(config: Config, tokenizer: Tokenizer, max_model_len: int) -> PromptBuilder:
        """That of a job whose engine's sequences are at most ``max_model_len`` tokens."""
        sampling = POOLED if config.task.name in VECTOR_TASKS else config.sampling
        return PromptBuilder(
            config.input,
            sampling,
            tokenizer,
            max_model_len,
            run_seed=config.sampling.seed,
            reasoning=config.output.reasoning != "off",
            rerank=config.rerank,
            adapters=config.model.adapters,
        )

    def build(self, table: pa.Table, chunk: Chunk) -> list[Request | Completion]:
        """One entry per row of ``table`` (the chunk's rows in plain types, see reader.py), in row order."""
        if table.num_rows != chunk.rows:
            raise ValueError(f"{table.num_rows} rows do not make {chunk}")
        built: list[Request | Completion] = []
        for start in range(0, chunk.rows, SLICE_ROWS):
            rows = table.slice(start, SLICE_ROWS)
            built += self._adapters.choose(rows, self._built(rows, chunk.row_id(start)))
        return built

    def _built(self, rows: pa.Table, first: int) -> list[Request | Completion]:
        if self._continuation is not None:
            pairs = self._pairs(rows, self._continuation)
            return [self._scored(first + i, pair) for i, pair in enumerate(pairs)]
        if self._pair_prompts is not None:
            return [self._pair(first + i, pair) for i, pair in enumerate(self._pair_prompts.prompts(rows))]
        prompts, samplings = self._prompts(rows), row_samplings(rows, self._overrides, self._sampling)
        return [self._request(first + i, *given) for i, given in enumerate(zip(prompts, samplings, strict=True))]

    def _request(
        self, row: int, prompt: np.ndarray | RowError, sampling: SamplingParams | RowError
    ) -> Request | Completion:
        if isinstance(prompt, RowError):
            return Completion(row, 0, error=prompt)
        if isinstance(sampling, SamplingParams):
            prompt = sampling.truncated(prompt)
        length = len(prompt)
        if length == 0:
            return Completion(row, 0, error=RowError(ErrorCode.EMPTY_PROMPT, "the prompt has no tokens"))
        if length + 1 > self._max_model_len:
            reason = f"{length} prompt tokens leave no room for a new one: the limit is {self._max_model_len} together"
            return Completion(row, length, error=RowError(ErrorCode.PROMPT_TOO_LONG, reason))
        if isinstance(sampling, RowError):
            return Completion(row, length, error=sampling)
        return Request(row, prompt, sampling, row_seed(sampling.seed, row), reasoning=self._reasoning)

    def _pair(self, row: int, pair: tuple[np.ndarray, int | None] | RowError) -> Request | Completion:
        if isinstance(pair, RowError):
            return Completion(row, 0, error=pair)
        prompt, second_from = pair
        made = self._request(row, prompt, self._sampling)
        return replace(made, second_from=second_from) if isinstance(made, Request) else made

    def _scored(self, row: int, pair: tuple[np.ndarray, np.ndarray] | RowError) -> Request | Completion:
        if isinstance(pair, RowError):
            return Completion(row, 0, error=pair)
        context, whole = pair
        start = max(1, len(context))  # nothing foretells the first token of a text that has no beginning-of-text token
        if len(whole) <= start:
            reason = "the continuation adds no token to the prompt" if len(whole) else "there are no tokens"
            return Completion(row, len(context), error=RowError(ErrorCode.EMPTY_CONTINUATION, reason))
        if len(whole) + 1 > self._max_model_len:
            reason = (
                f"prompt and continuation have {len(whole)} tokens: the limit is {self._max_model_len - 1} together"
            )
            return Completion(row, len(context), error=RowError(ErrorCode.PROMPT_TOO_LONG, reason))
        return Request(row, whole, self._sampling, scored_from=start)

    def _pairs(self, rows: pa.Table, column: str) -> list[tuple[np.ndarray, np.ndarray] | RowError]:
        """Token ids of each row's prompt, and of prompt and continuation together: what the second has after the length
        of the first is scored. Spaces at the end of a prompt go to the continuation, for that is where tokenizers
        have them; both as in lm-evaluation-harness (Gao et al. 2024, doi:10.5281/zenodo.12608602)."""
        if self._source.kind == "token_ids_column":
            size = self._tokenizer.vocab_size
            ids = ([_token_ids(value, size) for value in rows[name]] for name in (self._source.name, column))
            return [first_error(*pair) or (pair[0], np.concatenate(pair)) for pair in zip(*ids, strict=True)]
        added = [plain_text(value) for value in python_values(rows[column])]
        parts = [first_error(*pair) or _split(*pair) for pair in zip(self._texts(rows, any_length), added, strict=True)]
        good = [pair for pair in parts if not isinstance(pair, RowError)]
        encoded = iter(zip(self._encode([a for a, _ in good]), self._encode([a + b for a, b in good]), strict=True))
        return [part if isinstance(part, RowError) else next(encoded) for part in parts]

    def _prompts(self, rows: pa.Table) -> list[np.ndarray | RowError]:
        """Token ids (int32) or the error of each row."""
        if self._source.kind == "token_ids_column":
            return [_token_ids(ids, self._tokenizer.vocab_size) for ids in rows[self._source.name]]
        texts = self._texts(rows, checked)
        encoded = iter(self._encode([text for text in texts if isinstance(text, str)]))
        return [next(encoded) if isinstance(text, str) else text for text in texts]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        """A chat template writes special tokens itself; raw text gets those that the model wants around any text."""
        if not texts:
            return []
        special = self._source.kind != "messages_column"
        return [np.asarray(ids, np.int32) for ids in self._tokenizer.encode_batch(texts, add_special_tokens=special)]

    def _texts(self, rows: pa.Table, check: Callable[[str | RowError], str | RowError]) -> list[str | RowError]:
        if self._template is not None:
            names, _ = self._template.columns(rows.column_names)
            columns = [python_values(rows[name]) for name in names]
            return [check(self._rendered(names, [c[i] for c in columns])) for i in range(rows.num_rows)]
        make = self._chat if self._source.kind == "messages_column" else plain_text
        return [check(make(value)) for value in python_values(rows[self._source.name])]

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
            values = {key: plain_text(message[key] if message else None) for key in ("role", "content")}
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


def _split(context: str, continuation: str) -> tuple[str, str] | RowError:
    kept = context.rstrip(" ")
    return first_error(any_length(context + continuation)) or (kept, context[len(kept) :] + continuation)


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
