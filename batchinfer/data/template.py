"""Jinja templates over the columns of a row, in a sandbox that bounds what one row can cost."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError, safe_range

from batchinfer.types import ExitCode, JobError

MAX_OUTPUT = 16 << 20  # characters: far beyond any context length
MAX_ITERATIONS = 1_000_000  # of all loops of one row together: about a second
SUFFIXES = (".j2", ".jinja")


class RowTemplate:
    """A template whose variables are columns. Rows are data: nothing in a row is ever read as template code."""

    def __init__(self, template: str):
        """``template``: the text itself, or the path of a file that ends in .j2 or .jinja. JobError(64) if it cannot be
        read or parsed, or uses include, import, extends or recursive loops."""
        self.text = template_text(template)
        self._left = 0  # iterations that the row may still make
        environment = _Environment(
            undefined=jinja2.StrictUndefined, finalize=_no_null, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters["counted"] = self._counted
        environment.globals = {"range": safe_range, "namespace": jinja2.utils.Namespace}
        try:
            tree = environment.parse(self.text)
            for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
                raise jinja2.TemplateSyntaxError("a prompt template cannot refer to other templates", node.lineno)
            self._names = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
            self._unbound = meta.find_undeclared_variables(tree)
            for loop in tree.find_all(nodes.For):
                if loop.recursive:
                    raise jinja2.TemplateSyntaxError("a prompt template cannot have recursive loops", loop.lineno)
                loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
            self._template = environment.from_string(tree)
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", None)
            place = f", line {line}" if line else ""
            raise JobError(f"input.template{place}: {error.message}", ExitCode.USAGE) from None

    def columns(self, existing: Iterable[str]) -> tuple[list[str], list[str]]:
        """Columns that the template reads, and names that it uses but that neither it nor ``existing`` has."""
        existing = list(existing)
        used = self._names | self._unbound
        return [name for name in existing if name in used], sorted(self._unbound - set(existing))

    def render(self, row: dict[str, Any]) -> str:
        """The text for one row. ValueError says why there is none; whatever the template does, the next row is safe."""
        self._left = MAX_ITERATIONS
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(row):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_OUTPUT:
                    raise ValueError(f"the result is longer than {MAX_OUTPUT} characters")
            text = "".join(pieces)
            text.encode()
        except Exception as error:  # a template can raise anything: filters and methods of values run in it
            raise ValueError(f"{type(error).__name__}: {error}") from None
        return text

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._left -= 1
            if self._left < 0:
                raise SecurityError(f"the loops of one row make more than {MAX_ITERATIONS} turns")
            yield item


class _Environment(ImmutableSandboxedEnvironment):
    """No method that changes a value, no private attribute, no operator that makes a huge value of two small ones."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) <= 2**16 and abs(right) <= 64):
            raise SecurityError("** takes a base up to 65536 and an exponent up to 64")
        sizes = [len(v) if hasattr(v, "__len__") else v for v in (left, right)]
        if operator == "*" and any(hasattr(v, "__len__") for v in (left, right)) and sizes[0] * sizes[1] > MAX_OUTPUT:
            raise SecurityError(f"* makes more than {MAX_OUTPUT} characters")
        return super().call_binop(context, operator, left, right)


def template_text(template: str) -> str:
    """The text of ``input.template``, read from its file if it names one. It belongs into the job's fingerprint."""
    if not template.endswith(SUFFIXES):
        return template
    try:
        with open(os.path.expanduser(template), encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"input.template={template} cannot be read: {error}", ExitCode.USAGE) from None


def _no_null(value: Any) -> Any:
    if value is None:
        raise ValueError("a null would be printed as the word None; write {{ column or '' }}")
    return value
