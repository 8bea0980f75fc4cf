"""Constrained texts: which tokens may come next, by a JSON schema, a regular expression, choices or a grammar.

The work is llguidance's (https://github.com/guidance-ai/llguidance: an Earley parser over a lexer of regular expression
derivatives, walking the vocabulary as a prefix tree). Its limits on size and effort are counted, not timed, so that a
row is refused on every machine or on none.
"""

from __future__ import annotations

import importlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from batchinfer.models.tokenizer import Tokenizer
from batchinfer.types import CONSTRAINTS, SamplingParams

CACHED = 256
"""Grammars that are kept compiled. A copy costs microseconds; compiling up to a second where a schema is large."""

BUDGET = {
    "initial_lexer_fuel": 1_000_000,
    "max_grammar_size": 500_000,
    "max_lexer_states": 250_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
}
"""What a form may cost: 20 ms for its expressions, so many symbols, 250 to 500 MB at most if a text walks through all
states of its lexer, and for one mask 14 ms of the lexer and 2.5 ms of the parser. In units of llguidance's, and its
defaults."""

MOST_THREADS = 32
"""llguidance's own limit: more wait for one another."""


class Constraint:
    """How far one text has come in its grammar."""

    def __init__(self, matcher: Any):
        self.matcher = matcher

    def copy(self) -> Constraint:
        return Constraint(self.matcher.deep_copy())

    def take(self, tokens: Iterable[int]) -> None:
        """The text goes on with these. ValueError if they may not follow, or the grammar has become too complex."""
        for token in tokens:
            if self.matcher.is_stopped() and not self.matcher.is_error():
                return  # the text is complete: this is its end
            if not self.matcher.consume_token(int(token)):
                raise ValueError(self.failure)

    @property
    def failure(self) -> str:
        """Why the text can't go on; "" if it can."""
        return self.matcher.get_error().partition("\n")[0]  # what follows is a dump of its state


class Constraints:
    """Compiled grammars for one tokenizer, and the masks of the texts that follow them. llguidance is loaded, and the
    vocabulary read (0.2 s for 49,152 tokens), when the first is asked for. ``threads`` of the host compute masks."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, threads: int = 1):
        self._tokenizer, self._vocab_size, self._threads = tokenizer, vocab_size, threads
        self._vocabulary: Any = None
        self._compiled: OrderedDict[tuple[str, Any], Constraint | ValueError] = OrderedDict()

    def constraint(self, params: SamplingParams) -> Constraint | None:
        """At the beginning of a text; None if ``params`` has no constraint. ValueError says what is wrong with it."""
        key = next(((name, value) for name in CONSTRAINTS if (value := getattr(params, name))), None)
        if key is None:
            return None
        if key not in self._compiled:
            try:
                self._compiled[key] = self._compile(*key)
            except ValueError as error:
                self._compiled[key] = error
            if len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        found = self._compiled[key]
        if isinstance(found, ValueError):
            raise ValueError(str(found))
        return found.copy()

    def allow(self, constraints: Sequence[Constraint], rows: Sequence[int], masks: np.ndarray) -> list[str]:
        """Row rows[i] of ``masks`` int32 [N, ceil(V / 32)] gets the bits of the tokens that may come next by
        constraints[i]; once its text is complete only the end of text is left. Where the grammar has become too complex
        every token may come, and the list has the reason, else "".

        A mask takes 0.4 ms the first time that a text is at a place like this one (a string of 49,152 tokens'
        vocabulary), a few microseconds later; the threads share the rows, without Python's lock."""
        places = [(constraint.matcher, row) for constraint, row in zip(constraints, rows, strict=True)]
        if places:
            self._executor.unsafe_compute_mask_ptr(places, masks.ctypes.data, masks.strides[0], len(masks))
        failures = [constraint.failure for constraint in constraints]
        masks[[row for row, failure in zip(rows, failures, strict=True) if failure]] = -1
        return failures

    @cached_property
    def _executor(self) -> Any:
        return _library().LLExecutor(min(self._threads, MOST_THREADS))

    def _compile(self, kind: str, value: Any) -> Constraint:
        library = _library()
        vocabulary, limits = self._read_vocabulary(library), library.LLParserLimits(**BUDGET)
        matcher = library.LLMatcher(vocabulary, _grammar(library, kind, value), log_level=0, limits=limits)
        if matcher.is_error():
            raise _bad(kind, matcher.get_error())
        return Constraint(matcher)

    def _read_vocabulary(self, library: ModuleType) -> Any:
        if self._vocabulary is None:
            eos = list(self._tokenizer.eos_ids)
            if not eos:
                raise ValueError("the model names no end-of-text token, with which a constrained text could end")
            text = self._tokenizer.to_json()
            self._vocabulary = library.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=eos)
        return self._vocabulary


def check_constraint(params: SamplingParams) -> None:
    """ValueError unless the constraint of ``params``, if there is one, can be used; no tokenizer is needed."""
    kind = next((name for name in CONSTRAINTS if getattr(params, name)), None)
    if kind is not None:
        library = _library()
        grammar, limits = _grammar(library, kind, getattr(params, kind)), library.LLParserLimits(**BUDGET)
        reason = library.LLMatcher.validate_grammar(grammar, limits=limits)
        if reason:
            raise _bad(kind, reason)


def _library() -> ModuleType:
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise ValueError(f"llguidance is not installed ({error}): pip install 'batchinfer[grammar]'") from None


def _grammar(library: ModuleType, kind: str, value: Any) -> str:
    """In llguidance's own form. ValueError if it is not even JSON."""
    if kind == "json_schema":
        try:
            return library.LLMatcher.grammar_from_json_schema(value)
        except ValueError as error:
            raise _bad(kind, str(error)) from None
    if kind == "regex":
        return library.LLMatcher.grammar_from_regex(value)
    if kind == "grammar" and "::=" in value:
        try:
            value = importlib.import_module("llguidance.gbnf_to_lark").gbnf_to_lark(value)
        except Exception as error:  # its parser has no class of its own for what it can't read
            raise _bad(kind, str(error)) from None
    lark = value if kind == "grammar" else "start: " + " | ".join(json.dumps(text) for text in value)
    return library.LLMatcher.grammar_from_lark(lark)


def _bad(kind: str, reason: str) -> ValueError:
    return ValueError(f"{kind} can't be used: {' '.join(reason.split())}")
