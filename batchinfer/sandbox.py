"""Jinja for strangers' templates: nothing but text out, and what one rendering may cost is bounded.

A chat template comes with a model and a prompt template with a task; either can loop for ever or fill the memory by a
few characters ("{{ 'x' * 10 ** 10 }}", doubling a value in a loop, a macro that calls itself twice). Jinja's own
sandbox keeps a template from Python's internals and no more. Here every loop turn and call counts against
``MAX_STEPS``, and every value that an operation makes against ``MAX_VALUE`` (one) and ``MAX_WORK`` (all together), in
characters (an item of a list counts as eight), before it is made where an operation can multiply its operands.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1 << 20  # characters; the longest chat templates known have 30,000
MAX_OUTPUT = 16 << 20  # characters: far beyond any context length
MAX_STEPS = 500_000  # one or two seconds
MAX_VALUE = 64 << 20
MAX_WORK = 512 << 20
MAX_BITS = 4096  # of a whole number
ITEM = 8  # bytes of a pointer; what a number or a bracket takes in print

UNFIT_FILTERS = ("random", "urlize", "pprint")
"""A template gives the same text each time, and none needs a slow search for links."""

MULTIPLYING = frozenset(
    ("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "indent", "tojson", "batch", "slice", "wordwrap")
)
"""Filters and methods whose result can be as large as the product of what they are given."""

ITEM_FILTERS = "attr batch count d default dictsort first groupby items last length list map max min reject rejectattr"
SHALLOW = frozenset((*ITEM_FILTERS.split(), *"reverse select selectattr slice sort sum unique".split()))  # noqa: SIM905
"""Filters that hand items on as they are. All others may write out what they are given, to its depth."""

WIDE_FIELD = re.compile(r"\d{5}|\*|:[^}]*\{")
"""A width in a format text that is huge, or comes from a value."""


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment whose templates come from :meth:`compile` and are rendered by :meth:`render`, one at a time."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(
        self,
        finalize: Callable[[Any], Any] = lambda value: value,
        filters: Mapping[str, Callable[..., Any]] | None = None,
        **options: Any,
    ):
        """``finalize``: of every printed value. ``filters``: beside Jinja's own. ``options``: of jinja2.Environment."""

        def checked(value: Any) -> Any:
            self._charge(0 if isinstance(value, str) else _deep(value))
            return finalize(value)

        super().__init__(finalize=checked, **options)
        self._steps = self._work = 0
        self.globals.pop("lipsum", None)  # random text
        known = {**self.filters, **(filters or {}), "concatenated": lambda items: "".join(map(str, items))}
        bounded = {name: self._bounded(name, function) for name, function in known.items() if name not in UNFIT_FILTERS}
        self.filters = {**bounded, "counted": self._counted}

    def compile_template(self, source: str, check: Callable[[nodes.Template], None] = lambda tree: None) -> Any:
        """The template, after ``check`` has seen its tree. jinja2.TemplateError if it has a wrong syntax, ValueError if
        it is too long or too deep."""
        if len(source) > MAX_SOURCE:
            raise ValueError(f"it has {len(source)} characters, and the limit is {MAX_SOURCE}")
        try:
            tree = self.parse(source)
            check(tree)
            return self.from_string(_Rewriting().visit(tree))
        except jinja2.TemplateError:
            raise
        except (RecursionError, MemoryError, SyntaxError, OverflowError, ValueError) as error:
            raise ValueError(f"it is nested too deeply, or too large ({type(error).__name__})") from None

    def render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """The text. Raises whatever the template raises; SecurityError if it costs too much."""
        self._steps, self._work = MAX_STEPS, MAX_WORK
        pieces, length = [], 0
        try:
            for piece in template.generate(**variables):
                length += len(piece)
                if length > MAX_OUTPUT:
                    raise SecurityError(f"the text is longer than {MAX_OUTPUT} characters")
                pieces.append(piece)
        finally:
            self._steps = self._work = 0
        return "".join(pieces)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) <= 2**16 and abs(right) <= 64):
            raise SecurityError("** takes a base up to 65536 and an exponent up to 64")
        if operator == "*":
            self._charge(_length(left) * right if _sized(left) and isinstance(right, int) else 0)
            self._charge(_length(right) * left if _sized(right) and isinstance(left, int) else 0)
        elif operator == "+" and _sized(left) and _sized(right):
            self._charge(_length(left) + _length(right))
        elif operator == "%" and isinstance(left, str):
            self._charge_format(left, left.count("%"), right)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MAX_BITS:
            raise SecurityError(f"a number has more than {MAX_BITS} bits")
        return result

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        self._step()
        if isinstance(function, LoopContext):  # of a recursive loop
            args = (self._counted(args[0]), *args[1:])
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            self._charge_text_method(function.__name__, owner, args, kwargs)
        elif getattr(function, "__name__", "") in ("format", "format_map"):  # what Jinja puts in place of str's
            text = function.__wrapped__.__self__
            self._charge_format(text, text.count("{"), [args, kwargs])
        result = super().call(context, function, *args, **kwargs)
        self._charge(_length(result) if _sized(result) else 0)
        return result

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter with its price."""

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            given = [a for a in args if not isinstance(a, (Context, jinja2.Environment, nodes.EvalContext))]
            self._step()
            given = [self._taken(a) if isinstance(a, Iterator) and name not in SHALLOW else a for a in given]
            args = (*args[: len(args) - len(given)], *given)
            value, rest = given[0] if given else None, given[1:]
            if name not in SHALLOW:
                self._charge(_deep(value))
            if name in MULTIPLYING:
                self._charge((1 + _deep(value)) * _factor([*rest, *kwargs.values()]))
            elif name in ("replace", "join"):
                self._charge_text_method(name, value, rest, kwargs)
            elif name == "format":
                self._charge_format(str(value), str(value).count("%"), [rest, kwargs])
            result = function(*args, **kwargs)
            if isinstance(result, Iterator):
                return self._charged(result)
            self._charge(_length(result) if _sized(result) else 0)
            return result

        return bounded

    def _charge_text_method(self, name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """``name``: a method of str, or the filter of that name (whose value is a list, for join)."""
        if name == "replace":
            old, new = (str(a) for a in [*args, *kwargs.values()][:2])
            self._charge(len(str(value)) + str(value).count(old) * len(new))
        elif name == "join":
            items, separator = (value, args[0] if args else "") if not isinstance(value, str) else (args[0], value)
            self._charge(_deep(items) + (len(items) if _sized(items) else 0) * len(str(separator)))
        elif name in MULTIPLYING:
            self._charge((1 + len(value)) * _factor([*args, *kwargs.values()]))

    def _charge_format(self, text: str, fields: int, values: Any) -> None:
        if WIDE_FIELD.search(text):
            raise SecurityError("a width in a format text has at most four digits")
        self._charge(len(text) + fields * (10_000 + _deep(values)))

    def _step(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise SecurityError(f"one text takes more than {MAX_STEPS} turns of loops and calls")

    def _charge(self, size: int) -> None:
        """Of a value about to be made, or made by an operation that can only shorten what it is given."""
        self._work -= max(size, 0)
        if size > MAX_VALUE or self._work < 0:
            raise SecurityError(f"the template makes more than {MAX_VALUE} characters at once or {MAX_WORK} in all")

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """What every loop goes over."""
        for item in items:
            self._step()
            yield item

    def _charged(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self._step()
            self._charge(_length(item) if _sized(item) else ITEM)
            yield item

    def _taken(self, items: Iterator[Any]) -> list[Any]:
        taken = []
        for item in items:
            self._step()
            taken.append(item)
        return taken


class _Rewriting(NodeTransformer):
    """Loops over what is counted; "~" as a filter, so that it has a price."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        items = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(items, "concatenated", [], [], None, None, lineno=node.lineno)


def _sized(value: Any) -> bool:
    return hasattr(value, "__len__")


def _length(value: Any) -> int:
    return len(value) * (1 if isinstance(value, (str, bytes)) else ITEM)


def _factor(values: Iterable[Any]) -> int:
    """How many times over an argument can make a value be repeated."""
    sizes = [abs(v) if isinstance(v, int) else _deep(v) for v in values]
    return max([1, *sizes])


def _deep(value: Any) -> int:
    """Characters that writing ``value`` out takes, about: every item of its containers, as often as it is in them."""
    total, todo = 0, [value]
    while todo and total <= MAX_VALUE:
        item = todo.pop()
        if isinstance(item, (str, bytes)):
            total += len(item)
        elif isinstance(item, dict):
            total += ITEM * len(item)
            todo.extend(item.keys())
            todo.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            total += ITEM * len(item)
            todo.extend(item)
        else:
            total += ITEM * len(item) if _sized(item) else ITEM
    return total
