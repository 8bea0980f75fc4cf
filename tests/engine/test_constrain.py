"""Texts that must follow a schema, an expression, choices or a grammar. The tiny model knows the characters # to `."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from engine.test_ahead import LaggingRunner
from engine.tiny_engine import (
    EOS,
    VOCAB,
    LetterTokenizer,
    RunnerMaker,
    make_decoder,
    make_engine,
    random_prompts,
    run,
)

from batchinfer.engine import constrain
from batchinfer.engine.constrain import Constraint, Constraints, check_constraint
from batchinfer.engine.runner import HostRunner
from batchinfer.types import CONSTRAINTS, Completion, ErrorCode, Request, SamplingParams

pytest.importorskip("llguidance")

LISTS = '{"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 4}'
RANDOM = SamplingParams(max_tokens=60, temperature=2.0)
KINDS = {
    "regex": replace(RANDOM, regex="[A-F]{3}(-[0-9]{2}){1,2}"),
    "choice": replace(RANDOM, choice=("YES", "NO", "NO_WAY")),
    "json_schema": replace(RANDOM, json_schema=LISTS),
    "grammar": replace(RANDOM, grammar='start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]/'),
}
"""A text of each ends sooner or later, most of them before max_tokens."""


def fits(text: str, params: SamplingParams) -> bool:
    if params.regex:
        return re.fullmatch(params.regex, text) is not None
    if params.choice:
        return text in params.choice
    if params.grammar:
        return re.fullmatch(r"[0-9+()]+", text) is not None and isinstance(eval(text), int)
    value = json.loads(text)
    return 2 <= len(value) <= 4 and all(isinstance(item, int) for item in value)


def requests(**changes: object) -> list[Request]:
    """Four of each kind and four without, in turn."""
    params = [*KINDS.values(), RANDOM]
    return [
        Request(i, prompt, replace(params[i % len(params)], **changes), seed=i)
        for i, prompt in enumerate(random_prompts(4 * len(params)))
    ]


def outcome(done: dict[int, Completion]) -> dict[int, list[tuple]]:
    return {i: [(s.token_ids.tolist(), s.text, s.finish_reason) for s in c.samples] for i, c in done.items()}


@pytest.mark.feature("engine", "JSON schema, regular expression, choices or grammar for the whole text, per job or row")
def test_texts_are_what_they_must_be() -> None:
    asked = requests()
    done = run(make_engine(make_decoder()), asked)
    ended = 0
    for request in asked:
        (sample,) = done[request.id].samples
        if not request.sampling.constrained:
            continue
        if sample.finish_reason == "stop":
            ended += 1
            assert fits(sample.text, request.sampling), sample.text
            assert sample.token_ids[-1] == EOS
        else:
            assert len(sample.token_ids) == request.sampling.max_tokens
    assert ended >= 12


def test_neighbours_do_not_notice() -> None:
    asked = requests()
    alone = run(make_engine(make_decoder()), [r for r in asked if not r.sampling.constrained])
    together = outcome(run(make_engine(make_decoder()), asked))
    assert outcome(alone) == {i: together[i] for i in alone}


@pytest.mark.parametrize(
    "options",
    [{"num_pages": 40, "expected_share": 0.05}, {"make_runner": LaggingRunner}, {"max_slots": 3, "max_step_tokens": 5}],
    ids=str,
)
def test_preemption_and_a_step_ahead_change_nothing(options: dict) -> None:
    asked = requests(n=2)
    expected = outcome(run(make_engine(make_decoder()), asked))
    engine = make_engine(make_decoder(), **options)
    assert outcome(run(engine, asked)) == expected
    assert "num_pages" not in options or engine.stats().preemptions > 0


def test_an_interrupted_text_goes_on() -> None:
    asked = requests()
    expected = outcome(run(make_engine(make_decoder()), asked))
    engine = make_engine(make_decoder(), max_slots=32)
    done: dict[int, Completion] = {}
    for request in asked:
        engine.add(request)
    for _ in range(8):
        done |= {completion.id: completion for completion in engine.step()}
    begun = {state.id: state for state in engine.unfinished()}
    assert any(asked[i].sampling.constrained for i in begun)
    rest = [replace(r, so_far=begun[r.id].samples) if r.id in begun else r for r in asked if r.id not in done]
    assert outcome(done | run(make_engine(make_decoder()), rest)) == expected


def test_gbnf_is_understood() -> None:
    """The same language as in Lark."""
    gbnf = replace(RANDOM, grammar='root ::= term ("+" term)*\nterm ::= [0-9] | "(" root ")"')
    prompts = random_prompts(12)
    want, got = (
        run(make_engine(make_decoder()), [Request(i, p, params, seed=i) for i, p in enumerate(prompts)])
        for params in (KINDS["grammar"], gbnf)
    )
    assert outcome(got) == outcome(want)
    assert any(completion.samples[0].finish_reason == "stop" for completion in got.values())


@pytest.mark.feature("engine", "a form that would take too much to compile, or to follow, is an error row")
@pytest.mark.parametrize("unit", ["initial_lexer_fuel", "max_grammar_size", "step_lexer_fuel"])
def test_the_budget_of_a_form(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed. With the real budget it takes a form of megabytes, and seconds, to get there."""
    monkeypatch.setitem(constrain.BUDGET, unit, 40)
    rich = replace(KINDS["json_schema"], json_schema="", regex="([A-F]{3}|[0-9]{9}|(X[a-z]*Y){4}){1,30}")
    if unit == "max_grammar_size":
        rich = replace(rich, regex="", grammar="start: " + " ".join(f'"{i}"?' for i in range(60)))
    done = run(make_engine(make_decoder()), [Request(100, np.array([5], np.int32), rich), *requests()[4:5]])
    assert done[100].error is not None
    assert done[100].error.code is ErrorCode.BAD_CONSTRAINT
    assert done[4].error is None


BAD = [
    ("regex", "("),
    ("json_schema", '{"type": "nonsense"}'),
    ("grammar", "start: missing"),
    ("grammar", "root ::= ["),
]


@pytest.mark.parametrize(("kind", "text"), BAD)
def test_a_bad_constraint_is_an_error_row(kind: str, text: str) -> None:
    bad = replace(RANDOM, **{kind: text})
    asked = [*requests(), *(Request(100 + i, np.array([5], np.int32), bad) for i in range(2))]
    done = run(make_engine(make_decoder()), asked)
    for i in (100, 101):
        assert done[i].error is not None
        assert done[i].error.code is ErrorCode.BAD_CONSTRAINT
        assert done[i].error.message.startswith(f"{kind} can't be used: ")
    assert all(done[i].error is None for i in range(100) if i in done)
    with pytest.raises(ValueError, match=kind):
        check_constraint(bad)


@pytest.mark.parametrize("make_runner", [HostRunner, LaggingRunner])
def test_what_cannot_go_on_is_an_error_row(make_runner: RunnerMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """llguidance bounds the effort for a step; no small grammar goes beyond it."""
    calls: list[int] = []

    def failure(self: Constraint) -> str:
        calls.append(1)
        return "too complex" if len(calls) in (9, 30) else ""

    monkeypatch.setattr(Constraint, "failure", property(failure))
    engine = make_engine(make_decoder(), make_runner=make_runner)
    done = run(engine, requests(n=2))
    while engine._scheduler.num_steps_ahead:
        engine.step()
    assert engine.stats().pages_used == 0
    failed = [c for c in done.values() if c.error]
    assert [c.error.code for c in failed if c.error] == [ErrorCode.BAD_CONSTRAINT] * 2
    assert "too complex" in failed[0].error.message
    monkeypatch.undo()
    expected = outcome(run(make_engine(make_decoder()), requests(n=2)))
    assert outcome({i: c for i, c in done.items() if not c.error}) == {
        i: value for i, value in expected.items() if not done[i].error
    }


def test_compiled_once_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrain, "CACHED", 2)
    compiled: list[str] = []
    real = Constraints._compile
    monkeypatch.setattr(Constraints, "_compile", lambda self, *key: compiled.append(key[1]) or real(self, *key))
    constraints = Constraints(LetterTokenizer(), VOCAB)  # type: ignore[arg-type]
    for regex in ("A", "B", "A", "C", "A", "B", "(", "("):
        try:
            constraints.constraint(replace(RANDOM, regex=regex))
        except ValueError:
            assert regex == "("
    assert compiled == ["A", "B", "C", "B", "("]
    assert constraints.constraint(RANDOM) is None


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_what_contradicts_a_constraint(kind: str) -> None:
    KINDS[kind].check()
    other = "regex" if kind != "regex" else "json_schema"
    for change in ({"ignore_eos": True}, {"min_tokens": 3}, {other: "x"}):
        with pytest.raises(ValueError, match=f"{kind}.*remove one"):
            replace(KINDS[kind], **change).check()
