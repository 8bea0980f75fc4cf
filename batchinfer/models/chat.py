"""Chat templates: messages -> prompt text, by the model's own Jinja template in a sandbox.

The environment is the one that templates are written for (transformers' ``apply_chat_template``): trimmed blocks, loop
controls, ``raise_exception``, ``strftime_now``, a ``tojson`` that does not escape for HTML, and ``{% generation %}``
blocks, which mark text for training and mean nothing here. A template is a stranger's program: it sees plain strings,
lists and dicts only, in a sandbox that bounds what it costs (sandbox.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from batchinfer.sandbox import Sandbox


class _GenerationTag(jinja2.ext.Extension):
    tags = {"generation"}  # noqa: RUF012 (the name and form that Jinja asks for)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class ChatTemplate:
    """A compiled template. ``special`` are the names of special tokens that it may use (bos_token, eos_token, ...).
    ``now`` is the time that ``strftime_now`` tells (None: the clock), for text that must not change from day to day."""

    def __init__(self, source: str, special: Mapping[str, str], now: datetime | None = None):
        extensions = [_GenerationTag, jinja2.ext.loopcontrols]
        sandbox = Sandbox(filters={"tojson": _to_json}, trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        sandbox.globals["raise_exception"] = _raise
        sandbox.globals["strftime_now"] = lambda form: (now or datetime.now()).strftime(form)
        self.special = dict(special)
        self._sandbox = sandbox
        try:
            self._template = sandbox.compile_template(source)
        except (jinja2.TemplateError, ValueError) as error:
            raise ValueError(f"the chat template does not compile: {error}") from None

    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt for ``messages``, ending where the assistant begins. Raises ValueError with the reason."""
        if not messages:
            raise ValueError("there are no messages")
        variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return self._sandbox.render(self._template, {**self.special, **variables})
        except Exception as error:  # a template can raise anything; it is this row's error, whatever it is
            raise ValueError(f"the chat template refuses the messages: {error or type(error).__name__}") from None


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
