"""Templates over columns: what they read, what they may not do, and what one row can cost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from batchinfer import sandbox
from batchinfer.data import template
from batchinfer.data.template import RowTemplate
from batchinfer.types import ExitCode, JobError


def test_rendering():
    text = "{% for m in facts %}\n- {{ m.key }}={{ m['value'] }}\n{% endfor %}\nQ: {{ q | trim }}"
    text += "{% if a is none %}?{% endif %}"
    row = {"facts": [{"key": "k", "value": 1}, {"key": "l", "value": 2}], "q": " why ", "a": None}
    assert RowTemplate(text).render(row) == "- k=1\n- l=2\nQ: why?"


def test_a_row_is_never_template_code():
    assert RowTemplate("{{ q }}").render({"q": "{{ 7 * 7 }}{% include 'x' %}"}) == "{{ 7 * 7 }}{% include 'x' %}"


def test_columns():
    made = RowTemplate("{% set x = a %}{{ x }}{% for i in range(n) %}{{ i + b }}{% endfor %}{{ loop_ | default('') }}")
    assert made.columns(["a", "b", "c", "n"]) == (["a", "b", "n"], ["loop_"])
    assert made.columns(["b", "range"]) == (["b", "range"], ["a", "loop_", "n"])


def test_a_column_may_have_the_name_of_a_builtin():
    made = RowTemplate("{{ range }}")
    assert made.columns(["range"]) == (["range"], [])
    assert made.render({"range": "5-6"}) == "5-6"


def test_from_a_file(tmp_path: Path):
    path = tmp_path / "ask.j2"
    path.write_text("Q: {{ q }}\n")
    assert RowTemplate(str(path)).render({"q": "x"}) == "Q: x"
    assert template.template_text(str(path)) == "Q: {{ q }}\n"
    with pytest.raises(JobError, match=r"none\.jinja cannot be read") as caught:
        RowTemplate(str(tmp_path / "none.jinja"))
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.feature("input", "prompts from a sandboxed Jinja template over columns")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ q", "line 1"),
        ("a\n{% for x %}", "line 2"),
        ("{{ q | nofilter }}", "nofilter"),
        ("{% include 'secrets' %}", "other templates"),
        ("{% import 'x' as y %}", "other templates"),
        ("{% extends 'x' %}", "other templates"),
        ("{% for x in q recursive %}{{ loop(x) }}{% endfor %}", "recursive"),
    ],
)
def test_templates_that_are_refused(text: str, expected: str):
    with pytest.raises(JobError, match=expected) as caught:
        RowTemplate(text)
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.feature("job", "null, empty, over-long and non-UTF-8 prompts, unknown roles ... are error rows")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ q.nope }}", "UndefinedError"),
        ("{{ nope }}", "'nope' is undefined"),
        ("{{ none_ }}", "a null would be printed"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ q + 1 }}", "TypeError"),
        ("{{ q.__class__.__mro__ }}", "SecurityError"),
        ("{{ items.append(1) }}", "SecurityError"),
        (
            "{% for i in range(999) %}{% for j in range(999) %}{% for k in 'x' %}{% endfor %}{% endfor %}{% endfor %}",
            "turns",
        ),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ 'x' * 10 ** 9 }}", "makes more than"),
        ("{{ 10 ** 9 * [1] }}", "makes more than"),
        ("{{ 9 ** 9 ** 9 }}", "exponent up to"),
        ("{% for i in range(100) %}{{ 'x' * 1000000 }}{% endfor %}", "longer than 16777216 characters"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_rows_that_fail_leave_the_next_row_unharmed(text: str, expected: str):
    made = RowTemplate("{% if bad %}" + text + "{% endif %}{{ q }}")
    row = {"q": "fine", "none_": None, "items": [], "bad": True}
    with pytest.raises(ValueError, match=re.escape(expected)):
        made.render(row)
    assert made.render({**row, "bad": False}) == "fine"


def test_the_turns_of_each_row_are_counted_anew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "MAX_STEPS", 11)  # ten turns and the call of range
    made = RowTemplate("{% for i in range(n) %}{{ i }}{% endfor %}")
    for _ in range(3):
        assert made.render({"n": 10}) == "0123456789"
    with pytest.raises(ValueError, match="more than 11 turns"):
        made.render({"n": 11})
