"""What a sample says: its tokens as text, without what ended it, and its thoughts apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from batchinfer.engine.stopping import Decode, completes_stop, cut_text
from batchinfer.engine.thoughts import Marks, find_marks, is_open, split
from batchinfer.models.tokenizer import Tokenizer
from batchinfer.types import Request, SamplingParams


@dataclass(frozen=True)
class Ending:
    """A sample that has ended, or was dropped. ``tokens`` int32: all of it; ``by_string``: its newest token completed a
    stop string."""

    request: Request
    tokens: np.ndarray
    by_string: bool = False


@dataclass(frozen=True)
class Text:
    """``reasoning`` is None where none was asked for, or the sample has none."""

    text: str
    reasoning: str | None = None


class Texts:
    """The texts of one tokenizer's samples."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    @cached_property
    def _marks(self) -> Marks | None:
        return find_marks(self._tokenizer.token_id)

    def stop_ids(self, request: Request) -> np.ndarray:
        """Tokens that end its samples, int32."""
        params = request.sampling
        ids = params.stop_token_ids if params.ignore_eos else self._tokenizer.eos_ids + params.stop_token_ids
        return np.array(ids, np.int32)

    def first_stop(self, params: SamplingParams, tokens: np.ndarray, known: int) -> int | None:
        """How many of ``tokens`` there were when a stop string was complete, one of those after the first ``known``;
        None if none is."""
        decode = self._decode(params)
        ends = range(max(known + 1, params.min_tokens), len(tokens) + 1)
        return next((end for end in ends if completes_stop(tokens[:end], params.stop, decode)), None)

    def of(self, endings: Sequence[Ending]) -> list[Text]:
        """One for each, "" where none is wanted. Those that need no search are decoded together."""
        parts = [self._parts(ending) for ending in endings]
        made: list[list[str | None]] = [[None, None] for _ in endings]
        for special in (False, True):
            places = [
                (i, part)
                for i, ending in enumerate(endings)
                if ending.request.sampling.skip_special_tokens is not special
                for part in (0, 1)
                if parts[i][part] is not None
            ]
            decode = partial(self._tokenizer.decode_batch, skip_special_tokens=not special)
            texts = decode([parts[i][part] for i, part in places])
            for (i, part), text in zip(places, texts, strict=True):
                made[i][part] = text
        for i, ending in enumerate(endings):
            if ending.by_string:
                thoughts, answer = parts[i]
                last = 0 if thoughts is not None and not len(answer) else 1
                made[i][last] = self._cut(ending, parts[i][last])
        return [Text(*_stripped(*pair)) for pair in made]

    def _parts(self, ending: Ending) -> tuple[np.ndarray | None, np.ndarray]:
        """Tokens of thoughts, and of the answer."""
        request, tokens = ending.request, ending.tokens
        if not request.sampling.detokenize:
            return None, tokens[:0]
        ends = not request.sampling.include_stop and len(tokens) and tokens[-1] in self.stop_ids(request)
        shown = tokens[:-1] if ends and not ending.by_string else tokens
        if not request.reasoning or self._marks is None:
            return None, shown
        return split(shown, self._marks, is_open(request.prompt, self._marks))

    def _cut(self, ending: Ending, tokens: np.ndarray) -> str:
        params = ending.request.sampling
        return cut_text(tokens, params.stop, self._decode(params), keep=params.include_stop)

    def _decode(self, params: SamplingParams) -> Decode:
        return partial(self._tokenizer.decode_batch, skip_special_tokens=params.skip_special_tokens)


def _stripped(thoughts: str | None, answer: str) -> tuple[str, str | None]:
    """Templates put line breaks on both sides of the marks."""
    return (answer, None) if thoughts is None else (answer.lstrip("\n"), thoughts.strip("\n"))
