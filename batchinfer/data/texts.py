"""Values of a text column: what is no text, or no text that is worth tokenising, is the row's error."""

from __future__ import annotations

from typing import Any

from batchinfer.data.reader import Unreadable
from batchinfer.types import ErrorCode, RowError

MAX_PROMPT_CHARS = 16 << 20  # no context holds a text of this length


def plain_text(value: Any) -> str | RowError:
    """The text of a string, or of bytes that are UTF-8."""
    if value is None:
        return RowError(ErrorCode.NULL_PROMPT, "the value is null")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            return RowError(ErrorCode.INVALID_UTF8, f"byte {error.start} of the text is not UTF-8")
    return RowError(ErrorCode.INVALID_UTF8, value.reason) if isinstance(value, Unreadable) else value


def checked(text: str | RowError) -> str | RowError:
    """The text, unless it is empty or far too long."""
    if text == "":
        return RowError(ErrorCode.EMPTY_PROMPT, "the prompt is an empty text")
    return any_length(text)


def any_length(text: str | RowError) -> str | RowError:
    """Also an empty one."""
    if isinstance(text, str) and len(text) > MAX_PROMPT_CHARS:
        reason = f"the text of {len(text)} characters is longer than the limit of {MAX_PROMPT_CHARS} before tokenising"
        return RowError(ErrorCode.PROMPT_TOO_LONG, reason)
    return text


def first_error(*parts: object) -> RowError | None:
    """The first of the parts that is one."""
    return next((part for part in parts if isinstance(part, RowError)), None)
