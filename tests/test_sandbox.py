"""Templates that would never end or fill the memory are stopped; those that people write are not."""

from __future__ import annotations

import time
from typing import Any

import jinja2
import pytest
from faults.bounded import Failure, bounded

from batchinfer.sandbox import MAX_SOURCE, Sandbox

LOOP = "{% for i in range(99999) %}"
BOMBS = {
    "nested loops": LOOP * 3 + "{% endfor %}" * 3,
    "a loop over pairs": "{% for a in x %}{% for b in x %}{% for c in x %}{% endfor %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": (
        "{% for i in range(50) recursive %}{% if loop.depth < 40 %}{{ loop(range(50)) }}{% endif %}{% endfor %}"
    ),
    "200 MB at once": "{{ 'x' * 200000000 }}",
    "200 MB by filter": "{{ 'x' | center(200000000) }}",
    "200 MB by method": "{{ 'x'.ljust(200000000) }}{{ 'x'.rjust(200000000) }}",
    "zeros": "{{ '1'.zfill(10 ** 9) }}",
    "tabs": "{{ '\\t'.expandtabs(10 ** 9) }}",
    "a wide field": "{{ '%0999999999d' % 1 }}",
    "a wide field by filter": "{{ '%0999999999d' | format(1) }}",
    "a wide field by method": "{{ '{:>999999999}'.format(1) }}",
    "a width from a value": "{{ '{:>{}}'.format('x', 10 ** 9) }}",
    "a width from a star": "{{ '%*d' % (10 ** 9, 1) }}",
    "a text many times": "{% set t = 'y' * 1000000 %}{{ '%(t)s' * 1000 % {'t': t} }}",
    "doubling by +": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling a list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "squaring": "{% set n = namespace(x=99) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a tower": "{{ 9 ** 9 ** 9 }}",
    "replace": "{% set t = 'y' * 100000 %}{{ t.replace('y', t) }}",
    "replace by filter": "{% set t = 'y' * 100000 %}{{ t | replace('y', t) }}",
    "replace nothing": "{% set t = 'y' * 100000 %}{{ t.replace('', t) }}",
    "join": "{% set t = 'y' * 100000 %}{{ t.join(t | list) }}",
    "join by filter": "{% set t = 'y' * 100000 %}{{ range(90000) | join(t) }}",
    "a list of references": "{% set t = 'y' * 1000000 %}{{ ([t] * 1000) | join }}",
    "printing references": "{% set t = 'y' * 1000000 %}{{ [t] * 1000 }}",
    "printing nested references": "{% set t = [['y' * 10000] * 1000] * 1000 %}{{ t }}",
    "JSON of references": "{{ ([['y' * 10000] * 1000] * 1000) | tojson }}",
    "JSON with a deep indent": "{{ x | tojson(indent=10 ** 9) }}",
    "upper of references": "{{ ([['y' * 10000] * 1000] * 1000) | upper }}",
    "indent": "{{ ('\\n' * 100000) | indent(100000) }}",
    "batches": "{{ x | batch(10 ** 9, 'y') | list }}",
    "slices": "{{ x | slice(10 ** 9) | list }}",
    "mapped texts": "{{ (['y' * 1000000] * 1000) | map('upper') | list }}",
    "mapped replacements": "{{ (['y' * 1000] * 1000) | map('replace', 'y', 'y' * 1000) | join }}",
    "translate": "{{ ('y' * 100000).translate({121: 'y' * 100000}) }}",
    "a large range": "{% for i in range(10 ** 12) %}{% endfor %}",
    "an endless cycle of pieces": LOOP + "{{ 'y' * 1000 }}{% endfor %}",
}
UNSAFE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by filter": "{{ '' | attr('__class__') }}",
    "class by map": "{{ [''] | map(attribute='__class__') | list }}",
    "class by format": "{{ '{0.__class__}'.format('') }}",
    "class by format_map": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "globals": "{{ say.__globals__ }}",
    "code": "{{ say.__code__.co_consts }}",
    "the loop's frame": "{% for i in x %}{{ loop._iterator.gi_frame }}{% endfor %}",
    "macro": "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
    "self": "{{ self.__init__.__globals__ }}",
    "changing a list": "{{ x.append(1) }}",
    "changing a dict": "{{ {'a': 1}.update({}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends '/etc/passwd' %}",
    "random": "{{ x | random }}",
    "random text": "{{ lipsum() }}",
}
TOO_DEEP = {
    "parentheses": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "loops": "{% for i in x %}" * 200 + "{% endfor %}" * 200,
    "conditions": "{% if x %}" * 3000 + "{% endif %}" * 3000,
    "a long source": "x" * (MAX_SOURCE + 1),
}
VARIABLES: dict[str, Any] = {"x": list(range(300)), "say": time.sleep}


def render(source: str, **options: Any) -> str:
    sandbox = Sandbox(**options)
    return sandbox.render(sandbox.compile_template(source), VARIABLES)


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.feature("safety", "templates: loops, calls, numbers and texts of one rendering are bounded")
def test_a_bomb_is_stopped_in_time_and_memory(name: str) -> None:
    outcome = bounded(lambda: render(BOMBS[name]), seconds=10)
    assert outcome.signal == 0, f"signal {outcome.signal} after {outcome.seconds:.1f} s"
    assert isinstance(outcome.value, Failure), f"it gave {len(outcome.value)} characters"
    assert outcome.value.name in ("SecurityError", "RecursionError", "OverflowError"), outcome.value
    assert outcome.rss_mib < 600
    assert outcome.events == ()


@pytest.mark.parametrize("name", UNSAFE)
def test_what_is_unsafe_is_refused_or_undefined(name: str) -> None:
    try:
        text = render(UNSAFE[name])
    except (jinja2.TemplateError, TypeError):
        return
    assert text in ("", "[Undefined]")


@pytest.mark.parametrize("name", TOO_DEEP)
def test_a_source_that_is_too_deep_or_too_long(name: str) -> None:
    outcome = bounded(lambda: Sandbox().compile_template(TOO_DEEP[name]) and None, seconds=10)
    assert outcome.signal == 0
    assert outcome.value.name in ("ValueError", "TemplateSyntaxError"), outcome.value


def test_the_next_rendering_has_its_whole_budget() -> None:
    sandbox = Sandbox()
    bomb = sandbox.compile_template("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}")
    good = sandbox.compile_template("{% for i in x %}{{ i }}{% if not loop.last %},{% endif %}{% endfor %}")
    for _ in range(3):
        with pytest.raises(jinja2.sandbox.SecurityError, match="turns of loops"):
            sandbox.render(bomb, {"n": 90000})
        assert sandbox.render(good, {"x": [1, 2, 3]}) == "1,2,3"


WRITTEN = [
    "{{ x[:3] | join(', ') }}{% for i in x if i < 3 %}{{ loop.index }}{{ loop.length }}{{ loop.nextitem }}{% endfor %}",
    "{{ 'a-b' | replace('-', ' ') | title }} {{ '%s=%d' | format('k', 3) }} {{ '{:>5}{}'.format('x', 2) }}{{ 7 % 4 }}",
    "{{ {'a': [1, {'b': none}]} | tojson(indent=2) }} {{ 'a\nb' | indent(4) }} {{ 'x' | center(9) }}{{ x|length }}",
    "{{ x | batch(100) | map('sum') | list }} {{ x | map('string') | map('length') | sum }} {{ [3, 1] | sort }}",
    "{{ x | select('odd') | list | length }} {{ [{'r': 1}] | map(attribute='r') | first }} {{ 'a' ~ 1 ~ [2] ~ none }}",
    "{% macro f(a, b='c') %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}{% call f(2) %}{% endcall %}",
    "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% else %}n{% endfor %}{% for i in [] %}{% else %}no{% endfor %}",
    "{% for i in [[1, [2]], 3] recursive %}{{ i if i is number else loop(i) }}{% endfor %}{{ '=' * 10 }}{{ [0] * 3 }}",
    "{% set ns = namespace(s='') %}{% for i in x %}{% set ns.s = ns.s + i | string %}{% endfor %}{{ ns.s | length }}",
    "{{ 'abc'.upper().center(9, '*') }} {{ ' a '.strip() }} {{ 'a,b'.split(',') }} {{ 'k' in {'k': 1} }} {{ x | max }}",
]


@pytest.mark.parametrize("source", WRITTEN)
def test_what_people_write_is_rendered_as_jinja_does(source: str) -> None:
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(source).render(**VARIABLES)
    assert render(source) == plain


def test_undefined_and_finalize_are_jinjas_own() -> None:
    assert render("{{ nothing }}|{{ nothing ~ 'a' }}|{% for i in nothing %}{% endfor %}") == "|a|"
    with pytest.raises(jinja2.UndefinedError):
        render("{{ nothing ~ 'a' }}", undefined=jinja2.StrictUndefined)
    assert render("{{ 1 }}{{ 'a' }}", finalize=lambda value: f"<{value}>") == "<1><a>"
