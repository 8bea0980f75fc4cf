"""Jinja templates over the columns of a row, in a sandbox that bounds what one row can cost."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import safe_range

from batchinfer.sandbox import Sandbox
from batchinfer.types import ExitCode, JobError

SUFFIXES = (".j2", ".jinja")


class RowTemplate:
    """A template whose variables are columns. Rows are data: nothing in a row is ever read as template code."""

    def __init__(self, template: str, key: str = "input.template"):
        """``template``: the text itself, or the path of a file that ends in .j2 or .jinja, the value of ``key``.
        JobError(64) if it cannot be read or parsed, or uses include, import, extends or recursive loops."""
        self.text = template_text(template, key)
        self._sandbox = Sandbox(_no_null, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        self._sandbox.globals = {"range": safe_range, "namespace": jinja2.utils.Namespace}
        try:
            self._template = self._sandbox.compile_template(self.text, self._look)
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", None)
            place = f", line {line}" if line else ""
            raise JobError(f"{key}{place}: {error.message}", ExitCode.USAGE) from None
        except ValueError as error:
            raise JobError(f"{key}: {error}", ExitCode.USAGE) from None

    def _look(self, tree: nodes.Template) -> None:
        """What the template reads; jinja2.TemplateSyntaxError for what it may not do."""
        for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            raise jinja2.TemplateSyntaxError("a prompt template cannot refer to other templates", node.lineno)
        for loop in tree.find_all(nodes.For):
            if loop.recursive:
                raise jinja2.TemplateSyntaxError("a prompt template cannot have recursive loops", loop.lineno)
        self._names = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
        self._unbound = meta.find_undeclared_variables(tree)

    def columns(self, existing: Iterable[str]) -> tuple[list[str], list[str]]:
        """Columns that the template reads, and names that it uses but that neither it nor ``existing`` has."""
        existing = list(existing)
        used = self._names | self._unbound
        return [name for name in existing if name in used], sorted(self._unbound - set(existing))

    def render(self, row: dict[str, Any]) -> str:
        """The text for one row. ValueError says why there is none; whatever the template does, the next row is safe."""
        try:
            text = self._sandbox.render(self._template, row)
            text.encode()
        except Exception as error:  # a template can raise anything: filters and methods of values run in it
            raise ValueError(f"{type(error).__name__}: {error}") from None
        return text


def template_text(template: str, key: str = "input.template") -> str:
    """The text of a template, read from its file if it names one. It belongs into the job's fingerprint."""
    if not template.endswith(SUFFIXES):
        return template
    try:
        with open(os.path.expanduser(template), encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{key}={template} cannot be read: {error}", ExitCode.USAGE) from None


def _no_null(value: Any) -> Any:
    if value is None:
        raise ValueError("a null would be printed as the word None; write {{ column or '' }}")
    return value
