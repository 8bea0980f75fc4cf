"""The notebook door, as people use it: right arguments in every form, wrong ones, and a cell that is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.tiny_engine import LetterTokenizer, make_decoder, make_engine

from batchinfer import LLM, SamplingParams
from batchinfer import llm as door
from batchinfer.types import ErrorCode

SHORT = SamplingParams(max_tokens=6)


class ChatTokenizer(LetterTokenizer):
    def render_chat(self, messages: list[dict[str, str]]) -> str:
        return "".join(f"{message['role'].upper()}:{message['content']};" for message in messages)


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    engine = make_engine(make_decoder())
    engine.tokenizer = ChatTokenizer()
    monkeypatch.setattr(door, "load_engine", lambda *_, **__: engine)
    yield LLM("model")
    engine.close()


def texts(completions: list[Any]) -> list[str]:
    return [completion.samples[0].text for completion in completions]


@pytest.mark.feature("commands", "LLM in a notebook: texts, token ids, chats; settings for all or for each prompt")
def test_prompts_in_every_form(llm: LLM) -> None:
    ids = LetterTokenizer().encode_batch(["USER:HELLO;"])[0]
    forms: list[Any] = ["USER:HELLO;", ids, ids.tolist(), tuple(ids.tolist()), [{"role": "user", "content": "HELLO"}]]
    together = texts(llm.generate(forms, SHORT))
    assert set(together) == {together[0]}
    assert together[0]
    assert texts(llm.generate("USER:HELLO;", SHORT)) == together[:1]
    assert llm.generate([], SHORT) == []


def test_settings_for_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n) for n in (1, 4, 2)]
    done = llm.generate(["A", "B", "C"], params)
    assert [len(completion.samples[0].token_ids) for completion in done] == [1, 4, 2]
    with pytest.raises(ValueError, match="2 prompts and 3 sampling parameters"):
        llm.generate(["A", "B"], params)


def test_settings_as_people_write_them(llm: LLM) -> None:
    plain = llm.generate(["ABC"], SamplingParams(max_tokens=40, ignore_eos=True))[0].samples[0].text
    stop = plain[5:7]
    for form in (stop, [stop], (stop,)):
        given: Any = form
        (text,) = texts(llm.generate(["ABC"], SamplingParams(max_tokens=40, ignore_eos=True, stop=given)))
        assert text == plain[: plain.find(stop)]
    numbers: Any = {"max_tokens": np.int64(3), "temperature": 1, "stop_token_ids": [5, 6], "bad_words": ["A"]}
    assert llm.generate(["ABC"], SamplingParams(**numbers))[0].error is None


def test_a_schema_as_an_object(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    schema: Any = {"type": "integer", "minimum": 10, "maximum": 99}
    (text,) = texts(llm.generate(["ABC"], SamplingParams(json_schema=schema)))
    assert 10 <= int(text) <= 99


def test_scores_of_texts_and_of_token_ids(llm: LLM) -> None:
    encode = LetterTokenizer().encode_batch
    of_texts = llm.score(["ABC ", "D"], ["DE", "EFG"])
    of_ids = llm.score(encode(["ABC", "D"]), encode(["DE", "EFG"]))
    for one, other in zip(of_texts, of_ids, strict=True):
        assert one.samples[0].token_ids.tolist() == other.samples[0].token_ids.tolist()
        np.testing.assert_array_equal(one.samples[0].logprobs.chosen, other.samples[0].logprobs.chosen)
    assert [len(completion.samples[0].token_ids) for completion in of_texts] == [2, 3]


PROMPTS = ["AB"]
WRONG: list[tuple[Callable[[LLM], Any], type[Exception], str]] = [
    (lambda m: m.generate([None]), TypeError, r"prompts\[0\]=None is no prompt: it must be a text, a list of token"),
    (lambda m: m.generate(["A", 5]), TypeError, r"prompts\[1\]=5 is no prompt"),
    (lambda m: m.generate([[1.5, 2]]), TypeError, r"prompts\[0\]=\[1.5, 2\] is no prompt"),
    (lambda m: m.generate([[{"role": "user"}]]), ValueError, r"prompts\[0\]\[0\] has no text 'content'"),
    (lambda m: m.generate(PROMPTS, adapter="law"), ValueError, "there is no adapter 'law'; there are none: give LLM"),
    (lambda m: m.generate(PROMPTS, SamplingParams(temperature="hot")), TypeError, "sampling.temperature='hot'.*number"),
    (lambda m: m.generate(PROMPTS, SamplingParams(temperature=-1)), ValueError, r"temperature=-1.0.*\[0, 100\]"),
    (lambda m: m.generate(PROMPTS, SamplingParams(max_tokens=2.5)), TypeError, "sampling.max_tokens=2.5.*whole number"),
    (lambda m: m.generate(PROMPTS, SamplingParams(stop=[1])), TypeError, r"sampling.stop=\[1\].*list of texts"),
    (lambda m: m.generate(PROMPTS, SamplingParams(n=True)), TypeError, "sampling.n=True"),
    (lambda m: m.score(["A"], ["B", "C"]), ValueError, "1 prompts and 2 continuations"),
    (lambda m: m.score([[1, 2]], ["C"]), TypeError, r"continuations\[0\] is a text: so must prompts\[0\] be"),
    (lambda _: LLM("model", max_modellen=5), TypeError, "no option 'max_modellen', did you mean 'max_model_len'"),
    (
        lambda _: LLM("model", max_slots="x"),
        TypeError,
        r"engine.max_slots='x' is not allowed: it must be a whole number",
    ),
]


@pytest.mark.feature("commands", "LLM in a notebook: a wrong argument is named, with what is allowed")
@pytest.mark.parametrize(("call", "kind", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_arguments(llm: LLM, call: Callable[[LLM], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(llm)
    assert texts(llm.generate(["ABC"], SHORT))[0]  # and it goes on


def test_what_the_engine_refuses_is_the_prompts_own_error(llm: LLM) -> None:
    done = llm.generate(["", "A" * 500, [5, 2**40], [-1], "AB"], SHORT)
    codes = [ErrorCode.EMPTY_PROMPT, ErrorCode.PROMPT_TOO_LONG, ErrorCode.BAD_TOKEN_IDS, ErrorCode.BAD_TOKEN_IDS]
    assert [completion.error and completion.error.code for completion in done] == [*codes, None]


@pytest.mark.feature("commands", "LLM in a notebook: after an interrupted call the next one starts afresh")
def test_an_interrupted_call_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[i] for i in range(2, 40)]
    want = texts(llm.generate(prompts, SHORT))
    real, steps = llm._engine.step, iter(range(100))

    def step() -> list[Any]:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return real()

    monkeypatch.setattr(llm._engine, "step", step)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[3], "", *prompts], SamplingParams(max_tokens=50))
    assert llm._engine.num_open == 0
    assert texts(llm.generate(prompts, SHORT)) == want
    assert llm.stats().pages_used == 0


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"is neither a folder nor a \.gguf file"):
        LLM(str(tmp_path / "nothing"))
