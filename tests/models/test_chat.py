"""Chat templates against transformers' renderer, and templates that misbehave."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from batchinfer import sandbox
from batchinfer.models.chat import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "Grüße!\n  2 > 1?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": 'say "{{ hi }}"'},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "blocks are trimmed": "a\n  {% if true %}\n  b\n  {% endif %}\nc {# note #}\n",
    "special tokens": "{{ bos_token }}{{ messages[0].content | trim }}{{ eos_token }}[{{ unk_token }}]",
    "tojson": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% generation %}{% set x = messages[0].role %}{{ x }}{% endgeneration %}[{{ x }}]",
    "no tools": "{{ tools is none }} {{ documents is none }} {{ tools is defined }} {{ custom is defined }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro turn(m) %}[{{ m.role | upper }}]{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "string methods": "{{ messages[1].content.split('\n') | join('|') }} {{ messages[0]['content'].startswith('Be') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_as_transformers_does(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs, _ = render_jinja_template([MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=True, **SPECIAL)
    assert ChatTemplate(TEMPLATES[name], SPECIAL).render(MESSAGES) == theirs[0]


def test_the_date_is_the_clock_or_the_given_one() -> None:
    source = "{{ strftime_now('%d %b %Y') }}"
    assert ChatTemplate(source, {}, datetime(2026, 3, 1)).render(MESSAGES) == "01 Mar 2026"
    assert len(ChatTemplate(source, {}).render(MESSAGES)) == 11


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ custom.field }}", "'custom' is undefined"),
        ("{{ messages[9].content }}", "has no element 9"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update({'role': 'x'}) }}", "unsafe"),
        ("{% for i in range(10 ** 7) %}x{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_what_a_template_may_not_do_is_the_rows_error(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"the chat template refuses the messages: .*{reason}"):
        ChatTemplate(source, SPECIAL).render(MESSAGES)


def test_messages_are_not_changed_by_rendering() -> None:
    before = [dict(message) for message in MESSAGES]
    ChatTemplate("{% for m in messages %}{% set m = {} %}{% endfor %}", {}).render(MESSAGES)
    assert before == MESSAGES


def test_too_much_text(monkeypatch: Any) -> None:
    monkeypatch.setattr(sandbox, "MAX_OUTPUT", 1000)
    source = "{% for a in range(100) %}{% for b in range(100) %}xxxx{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="longer than 1000 characters"):
        ChatTemplate(source, {}).render(MESSAGES)


def test_no_messages() -> None:
    with pytest.raises(ValueError, match="there are no messages"):
        ChatTemplate(CHATML, {}).render([])


def test_a_template_that_does_not_compile() -> None:
    with pytest.raises(ValueError, match=r"does not compile: .*endfor"):
        ChatTemplate("{% for m in messages %}", {})
