"""Rows of a query and a document -> token ids of the prompt that asks how well they fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from batchinfer.data.reader import python_values
from batchinfer.data.template import RowTemplate
from batchinfer.data.texts import checked, first_error, plain_text
from batchinfer.types import ErrorCode, ExitCode, JobError, RowError

if TYPE_CHECKING:
    from batchinfer.config import InputConfig, RerankConfig

VARIABLES = ("query", "document", "instruction")


class PairTokenizer(Protocol):
    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[np.ndarray]: ...

    def encode_pairs(self, pairs: list[tuple[str, str]]) -> list[tuple[np.ndarray, int]]: ...


class PairPrompts:
    """Both texts through ``rerank.template``, or as the tokenizer joins a pair where there is none."""

    def __init__(self, input: InputConfig, rerank: RerankConfig, tokenizer: PairTokenizer):
        """JobError(64) for a template that does not parse, or has other variables."""
        self._columns = input.query_column, input.document_column
        self._instruction = rerank.instruction
        self._tokenizer = tokenizer
        self._template = None if rerank.template is None else RowTemplate(rerank.template, "rerank.template")
        if self._template is not None and (unknown := self._template.columns(VARIABLES)[1]):
            raise JobError(
                f"rerank.template has the variable {unknown[0]!r}; it may have {', '.join(VARIABLES)}", ExitCode.USAGE
            )

    def prompts(self, rows: pa.Table) -> list[tuple[np.ndarray, int | None] | RowError]:
        """Token ids (int32) and where the document begins (None if nobody asks), or the error of each row."""
        queries, documents = (
            [_named(name, checked(plain_text(value))) for value in python_values(rows[name])] for name in self._columns
        )
        pairs = [first_error(*pair) or pair for pair in zip(queries, documents, strict=True)]
        if self._template is not None:
            prompts = [pair if isinstance(pair, RowError) else checked(self._rendered(*pair)) for pair in pairs]
            encode: Any = self._encode
        else:
            prompts, encode = pairs, self._tokenizer.encode_pairs
        good = [prompt for prompt in prompts if not isinstance(prompt, RowError)]
        encoded = iter(encode(good) if good else ())
        return [p if isinstance(p, RowError) else next(encoded) for p in prompts]

    def _encode(self, texts: list[str]) -> list[tuple[np.ndarray, None]]:
        return [(np.asarray(ids, np.int32), None) for ids in self._tokenizer.encode_batch(texts)]

    def _rendered(self, query: str, document: str) -> str | RowError:
        try:
            return self._template.render(dict(zip(VARIABLES, (query, document, self._instruction), strict=True)))
        except ValueError as error:
            return RowError(ErrorCode.TEMPLATE_ERROR, str(error))


def _named(column: str, text: str | RowError) -> str | RowError:
    return RowError(text.code, f"column {column!r}: {text.message}") if isinstance(text, RowError) else text
